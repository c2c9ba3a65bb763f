"""Odd input of every metric: no value outside its range, no traceback, no warning, the same for every dtype."""

import math
import warnings

import jaxtyping
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, ndcg_score
from torchmetrics.functional.classification import binary_calibration_error

from mlvision.errors import InputError
from mlvision.metrics import (
    average_precision,
    average_precision_by_size,
    average_precisions,
    bootstrap_interval,
    class_measures,
    decide,
    deletion_measures,
    entropy,
    expected_calibration_error,
    f_measures,
    gini,
    map_discrimination,
    multilabel_summary,
    ndcg_at_k,
    patch_order,
    per_class_table,
    precision_at_k,
    real_accuracy,
    spearman,
)
from mlvision.space import LabelSpace

NAN = math.nan


@pytest.fixture(autouse=True)
def as_a_user_runs_it(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def shares(values) -> list[float]:
    """The numbers of a metric's result that are shares: not the counts, nor the NaN of what is undefined."""
    if isinstance(values, dict):
        return shares([value for name, value in values.items() if not name.startswith("num_")])
    if isinstance(values, list | tuple):
        names = getattr(values, "_fields", [""] * len(values))
        return [s for name, value in zip(names, values, strict=True) if name != "num_skipped" for s in shares(value)]
    if isinstance(values, str):
        return []
    values = np.asarray(values, dtype=np.float64).ravel()
    return values[~np.isnan(values)].tolist()


def areas(scores) -> np.ndarray:
    return np.full(tuple(scores.shape), 50.0**2)


METRICS = {
    "average precisions": lambda s, t: average_precisions(s, t),
    "by size": lambda s, t: average_precision_by_size(s, t, areas(s)),
    "summary": lambda s, t: multilabel_summary(s, t),
    "summary, softmax": lambda s, t: multilabel_summary(s, t, space=LabelSpace.of(None, s.shape[1]).with_softmax()),
    "table": lambda s, t: per_class_table(s, t, [f"class {c}" for c in range(s.shape[1])]),
    "P@1": lambda s, t: precision_at_k(s, t, 1),
    "P@3": lambda s, t: precision_at_k(s, t, 3),
    "nDCG@1": lambda s, t: ndcg_at_k(s, t, 1),
    "nDCG@3": lambda s, t: ndcg_at_k(s, t, 3),
    "F-measures": lambda s, t: f_measures(decide(s, threshold=0.5, top_k=2), t),
    "measures of classes": lambda s, t: class_measures(decide(s, threshold=None, top_k=2), t),
    "calibration": lambda s, t: expected_calibration_error((s - s.min()) / max(np.ptp(s), 1) if s.size else s, t),
    "interval": lambda s, t: bootstrap_interval(s, t, num_samples=10) if len(s) else (),
}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS.keys())


@every_metric
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (1, 4), (2, 3), (9, 1), (9, 5), (3, 0)])
def test_every_value_is_a_share(metric, shape):
    rng = np.random.default_rng(0)
    some = (rng.random(shape) < 0.4).astype(np.float32)
    first_unknown = some.copy()
    first_unknown[:1] = NAN
    all_targets = (some, np.zeros_like(some), np.ones_like(some), np.full_like(some, NAN), first_unknown)
    normal = rng.normal(size=shape).astype(np.float32)
    for targets in all_targets:
        for scores in (normal, np.round(normal), np.full_like(normal, 0.5), 1e30 * normal):
            values = shares(metric(scores, targets))
            assert all(0 <= value <= 1 for value in values), values
            if np.isnan(targets).all() or not targets.size:  # but for the threshold, nothing is said of nothing
                assert set(values) <= {0.5}


@every_metric
def test_dtypes_of_targets_and_scores_change_nothing(metric):
    rng = np.random.default_rng(1)
    targets = (rng.random((12, 4)) < 0.4).astype(np.float32)
    scores = np.round(rng.random((12, 4)) * 8).astype(np.float32) / 8  # exact in half precision
    expected = shares(metric(scores, targets))
    for dtype in (bool, np.uint8, np.int8, np.int64, np.float16, np.float64):
        assert shares(metric(scores, targets.astype(dtype))) == expected
    for dtype in (np.float16, np.float64):
        assert shares(metric(scores.astype(dtype), targets)) == pytest.approx(expected, abs=1e-7)


def test_integer_scores_rank_as_they_are():
    """Unsigned ones do not wrap around when the highest is looked for."""
    scores = np.array([[0, 3, 200, 7], [1, 0, 2, 255]])
    targets = np.array([[0, 0, 1, 1], [1, 0, 0, 1]])
    for dtype in (np.uint8, np.int64, np.float32):
        of_dtype = scores.astype(dtype)
        assert precision_at_k(of_dtype, targets, 1).tolist() == [1, 1]
        assert precision_at_k(of_dtype, targets, 2).tolist() == [1, 0.5]
        assert ndcg_at_k(of_dtype, targets, 4) == pytest.approx([1, ndcg_score(targets[1:], scores[1:])])
        assert patch_order(of_dtype.reshape(2, 2, 2)).tolist() == [[2, 3, 1, 0], [3, 2, 0, 1]]
    assert precision_at_k(scores > 2, targets, 3).tolist() == precision_at_k((scores > 2) * 1.0, targets, 3).tolist()
    half = torch.tensor([[0.25, 0.5, 0.125]], dtype=torch.bfloat16)
    assert ndcg_at_k(half, torch.tensor([[0, 1, 0]]), 3).tolist() == [1]


@every_metric
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_scores_that_cannot_be_ranked_are_refused(metric, value):
    scores, targets = np.random.default_rng(0).random((4, 3)).astype(np.float32), np.eye(4, 3, dtype=np.float32)
    scores[2, 1] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the shift that makes probabilities here
        with pytest.raises(InputError, match=r"scores of class \d: \d of 4 are NaN or infinite"):
            metric(scores, targets)


@every_metric
@pytest.mark.parametrize("value", [-1.0, 0.5, 2.0, math.inf])
def test_targets_that_are_no_labels_are_refused(metric, value):
    scores, targets = np.random.default_rng(0).random((4, 3)).astype(np.float32), np.eye(4, 3, dtype=np.float32)
    targets[3, 2] = value
    with pytest.raises(InputError, match=rf"targets of class 2: {value} in row \d, expected 1, 0 or NaN"):
        metric(scores, targets)


@pytest.mark.parametrize("scores", [np.full(40, 0.3), np.round(np.random.default_rng(3).random(40), 1)])
def test_ties_are_as_in_scikit_learn(scores):
    targets = (np.random.default_rng(4).random(40) < 0.3).astype(np.float64)
    scores, column = scores.astype(np.float32), targets[:, None]
    expected = average_precision_score(targets, scores)
    assert average_precision(scores[:, None], column)[0] == pytest.approx(expected)
    decided = decide(scores[:, None], threshold=0.3)
    assert f1_score(targets, decided[:, 0]) == pytest.approx(f_measures(decided, column).OF1)


def test_calibration_of_a_column_is_torchmetrics():
    rng = np.random.default_rng(5)
    scores, targets = rng.random(200).astype(np.float32), (rng.random(200) < 0.3).astype(np.float32)
    ours = expected_calibration_error(scores[:, None], targets[:, None], num_bins=10)
    # torchmetrics' bins hold their upper border, which no value here meets.
    theirs = binary_calibration_error(torch.from_numpy(scores), torch.from_numpy(targets).int(), n_bins=10)
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_what_does_not_fit_is_refused():
    scores, targets = np.zeros((4, 3), dtype=np.float32), np.zeros((4, 3), dtype=np.float32)
    with pytest.raises(InputError, match="decisions of float32: expected booleans"):
        f_measures(scores, targets)
    with pytest.raises(InputError, match="threshold nan: expected a number"):
        decide(scores, threshold=NAN)
    with pytest.raises(InputError, match=r"areas \(4, 1\): expected the shape of the scores, \(4, 3\)"):
        average_precision_by_size(scores, targets, np.zeros((4, 1)))
    with pytest.raises(InputError, match=r"label_lists, row 0: \[1.5\], expected classes 0 to 2"):
        real_accuracy(scores, [[1.5], [0], [0], [0]])
    with pytest.raises(InputError, match="eps inf: expected 0 or more, finite"):
        deletion_measures(np.zeros((1, 3)), np.zeros((1, 3)), eps=math.inf)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0, 2, 3), (3, 1, 1), (40, 3, 5)])
def test_measures_of_maps_keep_their_range(shape, dtype):
    rng = np.random.default_rng(6)
    maps = rng.integers(0, 120, shape)
    maps[:1] = 0
    maps[1:2] = 7
    if dtype == np.int8:
        maps[2:3, :1] = -128  # has no positive
    maps = maps.astype(dtype)
    for values in (gini(maps), entropy(maps)):
        assert ((values >= 0) & (values <= 1) | np.isnan(values)).all()
        assert np.isnan(values[:1]).all()
    correlation = spearman(maps, maps[::-1])
    assert ((correlation >= -1) & (correlation <= 1) | np.isnan(correlation)).all()
    assert np.isnan(map_discrimination(maps)) or 0 <= map_discrimination(maps) <= 2
