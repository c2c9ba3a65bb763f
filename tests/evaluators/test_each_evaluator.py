"""What each evaluator gives; multilabel, calibration, by_size, real, bootstrap."""

import pytest
import torch
from factories import context
from judged import CLASSES, PLAIN, REAL, SIZED, SPACE, predictions

from mlvision.data.manifest import Manifest
from mlvision.data.records import Record
from mlvision.errors import InputError
from mlvision.evaluators import (
    EVALUATORS,
    BootstrapConfig,
    BySizeConfig,
    CalibrationConfig,
    MultilabelConfig,
    RealConfig,
)
from mlvision.metrics import average_precision, bootstrap_interval, multilabel_summary
from mlvision.types import Predictions

BUILT = {name: config().build(context(3)) for name, config in EVALUATORS.items() if name != "bootstrap"}
BUILT["bootstrap"] = BootstrapConfig(num_samples=20).build(context(3))


def test_the_space_of_the_predictions_counts():
    evaluator = MultilabelConfig().build(context(3))
    given = predictions(PLAIN, SPACE.with_softmax())
    found = evaluator.measure(given, PLAIN)
    expected = multilabel_summary(given.logits, given.targets, space=given.space)
    assert found == pytest.approx(expected, nan_ok=True)
    p = given.logits.double().softmax(dim=1)
    known = ~given.targets.isnan()
    bins = (p * 15).long().clamp(max=14)
    gaps = [abs((p - given.targets)[(bins == b) & known].sum().item()) for b in range(15)]
    ece = CalibrationConfig().build(context(3)).measure(given, PLAIN)
    assert ece == {"ECE": pytest.approx(sum(gaps) / known.sum().item(), abs=1e-6)}


def test_training_can_choose_by_what_is_better_the_higher_it_is():
    summary = BUILT["multilabel"].metrics(PLAIN)
    assert {"mAP", "CF1", "OP_exact3"} <= set(summary)
    assert not {"threshold", "num_images", "num_unknown"} & set(summary)
    assert BUILT["calibration"].metrics(PLAIN) == ()  # less is better
    assert BUILT["real"].metrics(PLAIN) == BUILT["by_size"].metrics(PLAIN) == ()  # not stated there
    assert BUILT["real"].metrics(REAL) == ("real_accuracy",)


def test_sizes_that_no_object_has_are_not_reported():
    """Boxes of 10, 99, 20 and 31 pixels: small and large ones, none between. An image without the class stays."""
    evaluator = BySizeConfig().build(context(3))
    assert evaluator.metrics(SIZED) == ("mAP_small", "mAP_large")
    logits = torch.tensor([[1.0, 5.0, 0.0], [4.0, 3.0, 0.0], [2.0, 4.0, 9.0], [0.0, 2.0, 0.0]])
    given = Predictions(logits, torch.from_numpy(SIZED.targets), torch.arange(4), SPACE)
    found = evaluator.measure(given, SIZED)
    # Class 0: image a is small, and stands behind c, b being left out; class 1: b and d are small, behind a and c.
    assert found == {"mAP_small": pytest.approx((1 / 2 + (1 / 3 + 2 / 4) / 2) / 2), "mAP_large": 1.0}
    assert evaluator.measure(predictions(PLAIN), PLAIN) == {}


def test_real_accuracy_looks_up_the_rows_of_the_predictions():
    evaluator = RealConfig().build(context(3))
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    given = Predictions(logits, torch.from_numpy(REAL.targets[[1, 2]]), torch.tensor([1, 2]), SPACE)
    assert evaluator.measure(given, REAL) == {"real_accuracy": 0.0}
    given = Predictions(logits, torch.from_numpy(REAL.targets[[0, 2]]), torch.tensor([0, 2]), SPACE)
    assert evaluator.measure(given, REAL) == {"real_accuracy": 0.5}
    assert evaluator.measure(predictions(PLAIN), PLAIN) == {}


def test_an_image_whose_highest_class_is_unknown_is_left_out_of_real_accuracy():
    """Of four images the first two hit and miss; the highest class of the others is unknown, in the last one of two."""
    evaluator = RealConfig().build(context(3))
    records = [Record("a", "a", (0, 2)), Record("b", "b", (1,), unknown=(2,)), Record("c", "c", (0,), unknown=(1,))]
    partial = Manifest(CLASSES, [*records, Record("d", "d", (0,), unknown=(2,))], "val", real_lists=True)
    logits = torch.tensor([[1.0, 0.0, 9.0], [9.0, 0.0, 1.0], [0.0, 9.0, 0.0], [3.0, 0.0, 3.0]])
    given = Predictions(logits, torch.from_numpy(partial.targets), torch.arange(4), SPACE)
    assert evaluator.measure(given, partial) == {"real_accuracy": 0.5}


def test_the_interval_is_that_of_mean_average_precision():
    given = predictions(PLAIN)
    found = BUILT["bootstrap"].measure(given, PLAIN)
    expected = bootstrap_interval(given.logits, given.targets, num_samples=20)
    assert found == pytest.approx({"mAP_low": expected.low, "mAP_high": expected.high})
    ap = average_precision(given.logits, given.targets)
    assert found["mAP_low"] <= ap[~ap.isnan()].mean() <= found["mAP_high"]


@pytest.mark.parametrize("number", [1, -1, 1_000_001])
def test_resamplings_have_a_range(number):
    with pytest.raises(InputError, match="evaluators.bootstrap.num_samples: expected 2 to a million"):
        BootstrapConfig(num_samples=number)
