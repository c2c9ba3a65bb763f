"""Intervals by resampling: against the normal approximation, and by cases that leave no doubt."""

import numpy as np
import pytest

from mlvision.errors import InputError
from mlvision.metrics import average_precision, bootstrap_interval, mean_average_precision


def test_the_interval_of_a_mean_is_the_textbook_one():
    """A proportion of 400 images: plus and minus 1.96 standard errors."""
    rng = np.random.default_rng(0)
    hits = (rng.random((400, 1)) < 0.3).astype(np.float32)
    found = bootstrap_interval(hits, hits, lambda s, t: float(t.mean()), num_samples=4000)
    error = float(np.sqrt(hits.mean() * (1 - hits.mean()) / 400))
    assert found.value == pytest.approx(hits.mean())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.15 * error)
    narrow = bootstrap_interval(hits, hits, lambda s, t: float(t.mean()), num_samples=4000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * error, rel=0.1)


def test_map_of_images_and_not_of_entries_is_resampled():
    rng = np.random.default_rng(1)
    targets = (rng.random((60, 5)) < 0.3).astype(np.float32)
    scores = (targets + rng.normal(size=targets.shape)).astype(np.float32)
    found = bootstrap_interval(scores, targets, num_samples=200, seed=4)
    assert found.value == average_precision(scores, targets).mean()
    assert found.low < found.value < found.high
    assert found == bootstrap_interval(scores, targets, num_samples=200, seed=4)
    assert found != bootstrap_interval(scores, targets, num_samples=200, seed=5)
    perfect = bootstrap_interval(targets, targets, num_samples=50)
    assert (perfect.value, perfect.low, perfect.high) == (1, 1, 1)
    rows = []  # an image keeps its scores and its targets
    bootstrap_interval(scores, targets, lambda s, t: rows.append((s, t)) or 0.0, num_samples=2)
    pairs = {(*s, *t) for s, t in zip(scores.tolist(), targets.tolist(), strict=True)}
    for s, t in rows:
        assert {(*a, *b) for a, b in zip(s.tolist(), t.tolist(), strict=True)} <= pairs


def test_rare_classes_do_not_push_the_interval_off_its_value():
    """Images that come twice lift rare classes' average precision: by more than the interval is wide."""
    rng = np.random.default_rng(0)
    targets = (rng.random((200, 40)) < np.geomspace(0.003, 0.02, 40)).astype(np.float32)
    scores = rng.normal(size=targets.shape).astype(np.float32)
    found = bootstrap_interval(scores, targets, num_samples=200)
    rows = np.random.default_rng(0).integers(200, size=(200, 200))
    measured = [mean_average_precision(average_precision(scores[r], targets[r]))[0] for r in rows]
    assert np.quantile(measured, 0.025) > found.value
    assert found.low < found.value < found.high
    low, high = np.quantile(measured, [0.025, 0.975])
    assert found.high - found.low == pytest.approx(high - low)


def test_what_cannot_be_resampled_is_refused():
    some = np.zeros((3, 2), dtype=np.float32)
    for options, message in (
        ({"num_samples": 1}, "num_samples 1: expected at least 2"),
        ({"level": 1.0}, "level 1.0: expected a share between 0 and 1"),
    ):
        with pytest.raises(InputError, match=message):
            bootstrap_interval(some, some, **options)
    with pytest.raises(InputError, match="no image to draw from"):
        bootstrap_interval(some[:0], some[:0])
