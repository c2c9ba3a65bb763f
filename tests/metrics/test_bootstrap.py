"""Intervals by resampling: against the normal approximation, and by cases that leave no doubt."""

import jaxtyping
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


def three_rare_classes_and_a_common_one():
    """A resampling often loses rare classes, which are right: the middle lies below the value, and the upper end is 1."""
    rng = np.random.default_rng(6)
    targets = np.eye(12, 4, dtype=np.float32)
    targets[:, 3] = rng.random(12) < 0.3
    noise = np.array([0, 0, 0, 0.5]) * rng.normal(size=targets.shape)
    return (targets + noise).astype(np.float32), targets


def test_an_interval_ends_where_the_metric_does():
    scores, targets = three_rare_classes_and_a_common_one()
    free = bootstrap_interval(scores, targets, num_samples=200, bounds=(-np.inf, np.inf))
    assert free.high > 1
    found = bootstrap_interval(scores, targets, num_samples=200)
    assert found == (free.value, free.low, 1.0)
    # Of a metric of one's own nothing is known; a difference of two mAPs may be negative.
    lost = bootstrap_interval(scores, targets, lambda s, t: np.nanmean(average_precision(s, t)) - 1, num_samples=200)
    assert lost.high == pytest.approx(free.high - 1)
    assert lost.low < 0
    nothing = bootstrap_interval(-scores, targets, lambda s, t: 0.0, num_samples=2, bounds=(0.25, 1.0))
    assert (nothing.low, nothing.high) == (0.25, 0.25)


def test_nothing_is_said_where_no_resampling_can_be_measured():
    some = np.zeros((3, 2), dtype=np.float32)
    assert all(np.isnan(bootstrap_interval(some, some, num_samples=5)))
    assert all(np.isnan(bootstrap_interval(some[:1], some[:1], num_samples=5)))
    one = bootstrap_interval(some[:1], np.ones((1, 2), dtype=np.float32), num_samples=5)
    assert one == (1, 1, 1)


def test_what_cannot_be_resampled_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as a user runs it
    some = np.zeros((3, 2), dtype=np.float32)
    for options, message in (
        ({"num_samples": 1}, "num_samples 1: expected at least 2"),
        ({"level": 1.0}, "level 1.0: expected a share between 0 and 1"),
        ({"level": float("nan")}, "level nan: expected a share between 0 and 1"),
        ({"bounds": (1.0, 0.0)}, r"bounds \(1.0, 0.0\): expected the lowest and the highest value"),
    ):
        with pytest.raises(InputError, match=message):
            bootstrap_interval(some, some, **options)
    with pytest.raises(InputError, match="no image to draw from"):
        bootstrap_interval(some[:0], some[:0])
    with pytest.raises(InputError, match="targets of 3 images: expected those of the scores, 2"):
        bootstrap_interval(some[:2], some)
