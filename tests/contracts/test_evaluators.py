"""What every evaluator of EVALUATORS keeps."""

import math

import numpy as np
import pytest
import torch
from factories import context
from judged import PLAIN, REAL, SIZED, UNSEEN, predictions

from mlvision.evaluators import (
    EVALUATORS,
    BootstrapConfig,
)

BUILT = {name: config().build(context(3)) for name, config in EVALUATORS.items() if name != "bootstrap"}
BUILT["bootstrap"] = BootstrapConfig(num_samples=20).build(context(3))
every_evaluator = pytest.mark.parametrize("evaluator", BUILT.values(), ids=BUILT.keys())
every_split = pytest.mark.parametrize(
    "manifest", [PLAIN, SIZED, REAL, UNSEEN], ids=["plain", "sized", "real", "unseen"]
)


@every_split
@every_evaluator
def test_names_are_those_of_what_is_measured(evaluator, manifest):
    metrics = evaluator.measure(predictions(manifest), manifest)
    assert set(evaluator.metrics(manifest)) <= metrics.keys()
    for name, value in metrics.items():
        assert isinstance(value, int | float), name
        assert not isinstance(value, np.generic), name
        assert not math.isinf(value), name


@every_split
def test_no_two_evaluators_share_a_name(manifest):
    names = [name for evaluator in BUILT.values() for name in evaluator.measure(predictions(manifest), manifest)]
    assert len(set(names)) == len(names)


@every_evaluator
def test_predictions_are_left_as_they_are(evaluator):
    given = predictions(SIZED)
    before = [given.logits.clone(), given.targets.clone(), given.index.clone()]
    evaluator.measure(given, SIZED)
    assert all(torch.equal(a, b) for a, b in zip(before, (given.logits, given.targets, given.index), strict=True))
