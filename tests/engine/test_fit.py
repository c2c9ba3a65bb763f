"""What the loop does with the scalars that a method logs."""

import pytest
import torch

from mlvision.engine import trainer
from mlvision.engine.trainer import LossWindow, whole_output
from mlvision.types import StepOutput


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_a_scalar_that_some_steps_log_is_averaged_over_those_steps():
    window = LossWindow()
    for step in (1, 2, 3, 4):
        late = {"after_warm_up": 10.0} if step == 4 else {}
        even = {"even": float(step)} if step % 2 == 0 else {}
        window.add(scalars(loss=float(step), **even, **late))
    assert window.pop() == {"train/loss": 2.5, "train/even": 3.0, "train/after_warm_up": 10.0}
    window.add(scalars(loss=7.0))
    assert window.pop() == {"train/loss": 7.0}
    assert window.pop() == {}


def test_ranks_that_log_other_scalars_count_by_their_steps(monkeypatch):
    """A rank that saw a scalar in three steps weighs three times one that saw it once; one that never did, not at all."""
    monkeypatch.setattr(trainer, "gather", lambda function: [function(), {"loss": (3.0, 2), "there": (9.0, 3)}, {}])
    window = LossWindow()
    window.add(scalars(loss=1.0, here=5.0))
    window.add(scalars(loss=2.0, there=1.0))
    assert window.pop() == {"train/loss": 6 / 4, "train/here": 5.0, "train/there": 10 / 4}


def test_a_window_goes_on_from_a_checkpoint():
    whole, half = LossWindow(), LossWindow()
    steps = [scalars(loss=1.0), scalars(loss=2.0, rare=8.0), scalars(loss=6.0)]
    for values in steps:
        whole.add(values)
    for values in steps[:2]:
        half.add(values)
    saved = half.state()
    resumed = LossWindow()
    resumed.restore(saved, torch.device("cpu"))
    resumed.add(steps[2])
    assert resumed.pop() == whole.pop() == {"train/loss": 3.0, "train/rare": 8.0}


def test_a_window_of_an_earlier_checkpoint_has_one_count():
    window = LossWindow()
    window.restore({"sums": scalars(loss=6.0, cost=3.0), "count": 3}, torch.device("cpu"))
    window.add(scalars(loss=2.0, cost=1.0))
    assert window.pop() == {"train/loss": 2.0, "train/cost": 1.0}


def test_parts_of_a_step_that_log_other_scalars():
    parts = [scalars(share=0.2), scalars(share=0.4, rare=3.0)]
    output = whole_output([StepOutput(torch.tensor(loss), logs) for loss, logs in zip((1.0, 2.0), parts, strict=True)])
    assert output.loss.item() == 1.5
    assert {name: value.item() for name, value in output.logs.items()} == pytest.approx({"share": 0.3, "rare": 3.0})
