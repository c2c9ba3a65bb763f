import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import metrics_reference as reference
from sklearn.metrics import ndcg_score

from mlvision.errors import InputError
from mlvision.metrics import decide, f_measures
from mlvision.metrics.ranking import ndcg_at_k, precision_at_k

NAN = math.nan
MEASURES = [(precision_at_k, reference.precision_at_k), (ndcg_at_k, reference.ndcg_at_k)]
each_measure = pytest.mark.parametrize("measure", [precision_at_k, ndcg_at_k])


def simulated(num_images=200, num_classes=9, seed=0):
    rng = np.random.default_rng(seed)
    targets = (rng.random((num_images, num_classes)) < np.geomspace(0.1, 0.5, num_classes)).astype(np.float32)
    targets[:, 0] = 1
    return (rng.standard_normal(targets.shape) + targets).astype(np.float32), targets


# Few scores, so that ties are the rule; targets of all three kinds.
tables = st.tuples(st.integers(1, 4), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(
        *(
            st.lists(st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
            for values in (st.sampled_from([-2.0, -0.0, 0.0, 0.5]), st.sampled_from([0.0, 1.0, NAN]))
        )
    )
)


@pytest.mark.parametrize(("measure", "definition"), MEASURES)
@settings(deadline=None)  # the oracle is slow
@given(table=tables, k=st.integers(1, 8))
def test_matches_the_mean_over_all_orders_of_ties(measure, definition, table, k):
    expected = [definition(scores, targets, k) for scores, targets in zip(*table, strict=True)]
    np.testing.assert_allclose(measure(*map(np.array, table), k), expected, rtol=1e-12, atol=1e-15)


def test_by_hand():
    """Ranks: label, absent, (label, absent) tied, label; the unknown best score counts nowhere."""
    scores = np.array([[0.9, 0.7, 0.4, 0.4, 0.1, 5.0]])
    targets = np.array([[1.0, 0.0, 1.0, 0.0, 1.0, NAN]])
    hits = {1: 1, 2: 1, 3: 1.5, 4: 2, 5: 3, 10: 3}
    for k, expected in hits.items():
        assert precision_at_k(scores, targets, k)[0] == pytest.approx(expected / k, rel=1e-14)
    gains = 1 / np.log2([2, 3, 4, 5, 6])
    ideal = gains[:3].sum()
    assert ndcg_at_k(scores, targets, 1)[0] == 1
    assert ndcg_at_k(scores, targets, 3)[0] == pytest.approx((gains[0] + gains[2] / 2) / ideal, rel=1e-14)
    whole = gains[0] + (gains[2] + gains[3]) / 2 + gains[4]
    for k in (5, 10):
        assert ndcg_at_k(scores, targets, k)[0] == pytest.approx(whole / ideal, rel=1e-14)


@pytest.mark.parametrize("decimals", [7, 1, 0])
@pytest.mark.parametrize("k", [1, 3, 5, 20])
def test_ndcg_matches_sklearn_with_ties(decimals, k):
    scores, targets = simulated()
    scores = scores.round(decimals)
    expected = [ndcg_score(y[None], s[None], k=k) for s, y in zip(scores, targets, strict=True)]
    np.testing.assert_allclose(ndcg_at_k(scores, targets, k), expected, rtol=1e-12)
    # Unknown classes: as if they were no classes.
    targets[:, 4] = NAN
    rest = [c for c in range(9) if c != 4]
    expected = [ndcg_score(y[None], s[None], k=k) for s, y in zip(scores[:, rest], targets[:, rest], strict=True)]
    np.testing.assert_allclose(ndcg_at_k(scores, targets, k), expected, rtol=1e-12)


def test_mean_precision_is_the_overall_precision_of_the_k_best():
    scores, targets = simulated()
    for k in (1, 3, 9):
        exact = f_measures(decide(scores, threshold=None, top_k=k), targets)
        assert precision_at_k(scores, targets, k).mean() == pytest.approx(exact.OP, rel=1e-12)


def test_the_best_and_the_worst_ranking():
    targets = np.array([[1.0, 1.0, 0.0, 0.0, 0.0]])
    best = np.array([[5.0, 4.0, 3.0, 2.0, 1.0]])
    assert precision_at_k(best, targets, 2)[0] == ndcg_at_k(best, targets, 4)[0] == 1
    assert precision_at_k(best, targets, 5)[0] == 2 / 5  # 1 is out of reach
    assert precision_at_k(-best, targets, 3)[0] == ndcg_at_k(-best, targets, 3)[0] == 0
    assert precision_at_k(0 * best, targets, 3)[0] == pytest.approx(2 / 5)  # chance


def test_undefined_images_are_nan():
    scores = np.zeros((3, 4))
    targets = np.array([[0, 0, 0, 0], [NAN, NAN, NAN, NAN], [NAN, 0, 1, NAN]])
    np.testing.assert_array_equal(precision_at_k(scores, targets, 1), [0, NAN, 0.5])
    np.testing.assert_array_equal(ndcg_at_k(scores, targets, 1), [NAN, NAN, 0.5])
    for measure in (precision_at_k, ndcg_at_k):
        assert measure(np.zeros((0, 3)), np.zeros((0, 3)), 2).shape == (0,)
        np.testing.assert_array_equal(measure(np.zeros((2, 0)), np.zeros((2, 0)), 2), [NAN, NAN])


@each_measure
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_classes_and_the_scale_of_each_image_never_matter(measure, seed):
    rng = np.random.default_rng(seed)
    scores, targets = simulated(num_images=30, num_classes=6, seed=seed)
    scores = scores.round(1)
    targets[rng.random(targets.shape) < 0.2] = NAN
    expected = measure(scores, targets, 3)
    order = rng.permutation(6)
    np.testing.assert_allclose(measure(scores[:, order], targets[:, order], 3), expected, rtol=1e-14)
    shift = rng.integers(-50, 50, (30, 1)).astype(np.float64)
    for rescaled in (scores.astype(np.float64) ** 3, np.arctan(scores.astype(np.float64)), 4.0 * scores):
        np.testing.assert_array_equal(measure(rescaled, targets, 3), expected)
    coarse = (scores * 10).round()  # a constant added rounds nothing here
    np.testing.assert_array_equal(measure(coarse + shift, targets, 3), measure(coarse, targets, 3))


@each_measure
def test_gives_back_the_kind_that_it_was_given(measure):
    scores, targets = simulated()
    ours = measure(scores, targets, 3)
    assert isinstance(ours, np.ndarray)
    assert ours.dtype == np.float64
    tensor = measure(torch.from_numpy(scores).requires_grad_(), torch.from_numpy(targets), 3)
    assert tensor.dtype == torch.float64
    np.testing.assert_array_equal(tensor.numpy(), ours)
    half = torch.from_numpy(scores).bfloat16()
    np.testing.assert_array_equal(
        measure(half, torch.from_numpy(targets), 3).numpy(), measure(half.float().numpy(), targets, 3)
    )


@each_measure
def test_inputs_are_left_alone(measure):
    scores, targets = simulated()
    targets[3, 3] = NAN
    before = scores.copy(), targets.copy()
    measure(scores, targets, 3)
    np.testing.assert_array_equal(scores, before[0])
    np.testing.assert_array_equal(targets, before[1])


@each_measure
def test_bad_input_is_named(measure):
    scores, targets = simulated(num_images=3, num_classes=3)
    with pytest.raises(InputError, match="k 0: expected at least 1"):
        measure(scores, targets, 0)
    with pytest.raises(InputError, match="targets of class 1: -1.0 in row 2"):
        measure(scores, np.where(np.arange(9).reshape(3, 3) == 7, -1, targets), 1)
    with pytest.raises(InputError, match="scores of class 2: 2 of 3 are NaN"):
        measure(np.array([[0, 0, NAN], [0, 0, 0], [0, 0, math.inf]]), targets, 1)
