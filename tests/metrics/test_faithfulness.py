import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import explanation_reference as reference

from mlvision.errors import InputError
from mlvision.metrics import (
    cross_label_drops,
    cross_label_matrix,
    deletion_measures,
    patch_order,
    specificity,
)

NAN = math.nan


def frozen(array):
    """An array that raises where it is written to."""
    array = np.array(array)
    array.flags.writeable = False
    return array


def random_scores(seed, num_images=3, num_places=3, num_classes=4):
    """(before, after, labels, targets), with empty places whose scores are NaN, and unknown targets."""
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(num_images, num_classes))
    after = rng.normal(size=(num_images, num_places, num_classes))
    labels = rng.integers(-1, num_classes, (num_images, num_places))
    after[labels < 0] = NAN
    targets = rng.choice([0.0, 1.0, 1.0, NAN], (num_images, num_classes))
    return before, after, labels, targets


@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 6), eps=st.sampled_from([0.0, 0.5, 1.0]))
def test_curves_match_the_definition(seed, steps, eps):
    # Few levels, so that many curves end where they begin, or exactly eps from there.
    most, least = np.random.default_rng(seed).integers(-2, 3, (2, 5, steps + 1)) / 2
    expected = [reference.deletion(*row, eps) for row in zip(most.tolist(), least.tolist(), strict=True)]
    np.testing.assert_allclose(
        np.stack(deletion_measures(frozen(most), frozen(least), eps), axis=1), expected, rtol=0, atol=1e-14
    )


def test_curves_by_hand():
    found = deletion_measures(np.array([[2.0, 0.0, -1.0, -2.0]]), np.array([[2.0, 2.0, 1.0, -2.0]]))
    # Trapezoids: (1 - 0.5 - 1.5) / 3 and (2 + 1.5 - 0.5) / 3. Both curves run over 4, from 2 to -2.
    assert found.morf[0] == pytest.approx(-1 / 3, rel=1e-15)
    assert found.lerf[0] == found.insertion[0] == 1
    assert found.srg[0] == pytest.approx(4 / 3, rel=1e-15)
    assert found.aopc[0] == (2 + 3 + 4) / 3
    assert found.normalised_morf[0] == pytest.approx((-1 / 3 + 2) / 4, rel=1e-15)
    assert found.normalised_lerf[0] == (1 + 2) / 4
    assert found.normalised_srg[0] == pytest.approx(1 / 3, rel=1e-15)


def test_one_step_knows_no_order():
    found = deletion_measures(np.array([[5.0, 1.0]]), np.array([[5.0, 1.0]]))
    assert [measure[0] for measure in found] == [3, 3, 0, 3, 4, 0.5, 0.5, 0]


def test_a_flat_curve_has_no_normalised_measures_and_spoils_no_other_row():
    most = np.array([[1.0, 7.0, 1.0], [1.0, 0.5, 0.0], [1.0, 1.0, 1.0 - 2**-12]])
    found = deletion_measures(most, most[:, [0, 1, 2]])
    np.testing.assert_array_equal(found.normalised_morf, [NAN, 0.5, NAN])  # 2**-12 is under the default eps
    np.testing.assert_array_equal(found.normalised_srg, [NAN, 0, NAN])
    np.testing.assert_array_equal(found.morf[:2], [4, 0.5])
    found = deletion_measures(most, most, eps=1e-4)
    np.testing.assert_array_equal(found.normalised_morf, [NAN, 0.5, (1 + 0.5) / 2])


def test_a_score_that_rises_turns_the_sign_of_the_normalised_gain():
    found = deletion_measures(np.array([[0.0, 0.0, 2.0]]), np.array([[0.0, 2.0, 2.0]]))
    assert (found.srg[0], found.normalised_srg[0]) == (1, -0.5)


@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_normalised_measures_ignore_scale_and_offset(seed, factor, shift):
    most, least = np.random.default_rng(seed).normal(size=(2, 4, 6))
    most[:, 0], least[:, 0], most[:, -1], least[:, -1] = 3, 3, -1, -1
    plain, changed = deletion_measures(most, least), deletion_measures(factor * most + shift, factor * least + shift)
    for name in ("normalised_morf", "normalised_lerf", "normalised_srg"):
        np.testing.assert_allclose(getattr(changed, name), getattr(plain, name), rtol=1e-9, atol=1e-12)
    for name in ("srg", "aopc"):
        np.testing.assert_allclose(getattr(changed, name), factor * getattr(plain, name), rtol=1e-9, atol=1e-12)


def removed_curve(worth, order):
    """Scores of a model that adds up what its patches are worth, after each patch of the order is gone."""
    return np.concatenate([[worth.sum()], worth.sum() - worth[order].cumsum()])[None]


@given(seed=st.integers(0, 2**32 - 1))
def test_of_an_additive_model_its_own_terms_are_the_best_map(seed):
    rng = np.random.default_rng(seed)
    worth = rng.integers(-3, 4, (3, 5)).astype(np.float64)  # with ties
    orders = [patch_order(maps[None])[0] for maps in (worth, rng.normal(size=worth.shape))]
    best, other = (
        deletion_measures(*(removed_curve(worth.ravel(), one) for one in (order, order[::-1]))) for order in orders
    )
    assert best.morf[0] <= other.morf[0] + 1e-12
    assert best.lerf[0] >= other.lerf[0] - 1e-12
    assert best.srg[0] >= max(other.srg[0], 0) - 1e-12
    # Putting the patches back, the most relevant first.
    inserted = np.concatenate([[0.0], worth.ravel()[orders[1]].cumsum()])
    assert other.insertion[0] == pytest.approx(reference.trapezoid(inserted.tolist()), abs=1e-12)


def test_cells_are_ordered_row_by_row_and_ties_by_index():
    maps = frozen([[[0.0, -1.0, 5.0], [5.0, -0.0, 2.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]])
    order = patch_order(maps)
    assert order.tolist() == [[2, 3, 5, 0, 4, 1], [0, 1, 2, 3, 4, 5]]
    assert order.argsort(axis=1).tolist()[0] == [3, 5, 0, 1, 4, 2]  # the rank of each cell


def test_many_equal_cells_keep_their_order():
    # Long enough that a sort which is not stable would mix them.
    maps = np.zeros((1, 20, 30))
    maps[0, 7, 11] = 1
    assert patch_order(maps)[0].tolist() == [221, *(k for k in range(600) if k != 221)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_order_is_of_the_callers_kind(dtype):
    maps = torch.tensor([[[0.5, 2.0, -1.0, 2.0]]], dtype=dtype)
    order = patch_order(maps)
    assert isinstance(order, torch.Tensor)
    assert order.dtype == torch.int64
    assert order.tolist() == [[1, 3, 0, 2]]
    assert isinstance(patch_order(maps.double().numpy()), np.ndarray)


@given(seed=st.integers(0, 2**32 - 1))
def test_drops_match_the_definition(seed):
    before, after, labels, targets = random_scores(seed)
    drops = cross_label_drops(frozen(before), frozen(after), frozen(labels))
    expected = [
        [[reference.drop(before, after, labels, i, k, b) for b in range(4)] for k in range(3)] for i in range(3)
    ]
    np.testing.assert_array_equal(drops, expected)

    expected = [
        [reference.specificity(drops[i][k], labels[i][k], targets[i]) for k in range(3)] for i in range(3)
    ]  # fmt: skip
    np.testing.assert_allclose(specificity(frozen(drops), frozen(labels), frozen(targets)), expected, atol=1e-14)

    mean, counts = cross_label_matrix(frozen(drops), frozen(labels), 4)
    expected, expected_counts = reference.cross_label_matrix(drops, labels, 4)
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-14)
    assert counts.tolist() == expected_counts


def test_drops_by_hand():
    # Two images, three classes. Without label 2's evidence the first image loses 3 of label 2 and 1 of label 0; without
    # label 0's evidence the second loses 4 of label 0 and gains 2 of label 1.
    before = np.array([[2.0, -1.0, 5.0], [1.0, 0.0, -3.0]])
    after = np.array([[[1.0, -1.0, 2.0], [NAN, NAN, NAN]], [[-3.0, 2.0, -3.0], [1.0, -5.0, -3.0]]])
    labels = np.array([[2, -1], [0, 1]])
    drops = cross_label_drops(before, after, labels)
    np.testing.assert_array_equal(drops, [[[1, 0, 3], [NAN] * 3], [[4, -2, 0], [0, 5, 0]]])

    present = np.array([[1, 0, 1], [1, 1, 1]])
    np.testing.assert_array_equal(specificity(drops, labels, present), [[3 - 1, NAN], [4 + 1, 5 - 0]])
    mean, counts = cross_label_matrix(drops, labels, 3)
    np.testing.assert_array_equal(mean, [[4, -2, 0], [0, 5, 0], [1, 0, 3]])
    np.testing.assert_array_equal(counts, [1, 1, 1])


def test_the_row_is_what_was_removed():
    drops = np.array([[[1.0, 2.0]], [[5.0, 8.0]]])
    mean, counts = cross_label_matrix(drops, np.array([[1], [1]]), 2)
    np.testing.assert_array_equal(mean, [[NAN, NAN], [3, 5]])
    np.testing.assert_array_equal(counts, [0, 2])


def test_specificity_needs_another_label_that_is_known_to_be_present():
    drops, labels = np.array([[[3.0, 1.0, -7.0]]] * 4), np.array([[0]] * 4)
    targets = np.array([[1, 0, NAN], [1, NAN, NAN], [0, 1, NAN], [0, 1, 1]])
    np.testing.assert_array_equal(specificity(drops, labels, targets), [[NAN], [NAN], [2], [3 + 3]])
    np.testing.assert_array_equal(specificity(drops[3:], labels[3:], np.array([[False, True, True]])), [[6]])


def test_a_map_that_tells_no_labels_apart_is_not_specific():
    # One map for all labels removes the same: of two labels that fall alike, neither falls more.
    drops = np.full((2, 3, 5), 0.7)
    labels = np.array([[0, 2, 4], [1, 2, 3]])
    np.testing.assert_allclose(specificity(drops, labels, np.ones((2, 5))), 0, atol=1e-15)


def test_an_image_without_labels_may_hold_anything():
    before, after = np.array([[NAN, NAN], [1.0, 2.0]]), np.array([[[NAN, NAN]], [[0.0, 0.0]]])
    drops = cross_label_drops(before, after, np.array([[-1], [1]]))
    np.testing.assert_array_equal(drops, [[[NAN, NAN]], [[1, 2]]])
    before[0], after[0] = 3, 1  # as a caller has it that fills empty places with some label
    np.testing.assert_array_equal(cross_label_drops(before, after, np.array([[-1], [1]])), drops)


def test_half_precision_is_subtracted_in_float64():
    before, after = torch.tensor([[1000.0, 0.0]]), torch.tensor([[[1.0, 0.0]]])
    labels = torch.tensor([[0]])
    for dtype in (torch.float16, torch.bfloat16):
        drops = cross_label_drops(before.to(dtype), after.to(dtype), labels)
        assert drops.dtype == np.float64
        assert drops[0, 0, 0] == 999  # which bfloat16 has not
        assert specificity(torch.from_numpy(drops), labels, torch.ones(1, 2))[0, 0] == 999
        assert cross_label_matrix(torch.from_numpy(drops), labels, 2).drops[0, 0] == 999
        curve = torch.tensor([[256.0, 0.0, 1.0]], dtype=dtype)
        assert deletion_measures(curve, curve).aopc[0] == (256 + 255) / 2


def test_bad_curves_are_named():
    curves = np.zeros((3, 4))
    with pytest.raises(InputError, match=r"curves \(3, 1\): expected \[rows, K \+ 1\] with at least one step"):
        deletion_measures(curves[:, :1], curves[:, :1])
    with pytest.raises(InputError, match="eps -1.0: expected 0 or more"):
        deletion_measures(curves, curves, eps=-1.0)
    bad = curves.copy()
    bad[1:, 2] = NAN
    with pytest.raises(
        InputError, match="least_relevant_first: 2 of 3 curves hold NaN or infinity, the first in row 1"
    ):
        deletion_measures(curves, bad)
    with pytest.raises(InputError, match="most_relevant_first: 2 of 3 curves"):
        deletion_measures(bad, curves)
    with pytest.raises(InputError, match="maps: 1 of 1 hold NaN or infinity"):
        patch_order(np.array([[[1.0, math.inf]]]))


def test_bad_scores_and_labels_are_named():
    before, after, labels = np.zeros((2, 3)), np.zeros((2, 1, 3)), np.array([[0], [3]])
    for call in (
        lambda: cross_label_drops(before, after, labels),
        lambda: specificity(after, labels, before),
        lambda: cross_label_matrix(after, labels, 3),
    ):
        with pytest.raises(InputError, match="labels: 3 is beyond the 3 classes"):
            call()
    labels[1] = 2
    with pytest.raises(InputError, match=r"drops \(2, 1, 3\): expected those of 4 classes"):
        cross_label_matrix(after, labels, 4)
    with pytest.raises(InputError, match=r"targets of class 1: -1\.0 in row 1"):
        specificity(after, labels, np.array([[0.0, 0, 0], [0, -1, 0]]))
    bad = after.copy()
    bad[1, 0, 2] = NAN
    for call in (lambda: specificity(bad, labels, before), lambda: cross_label_matrix(bad, labels, 3)):
        with pytest.raises(InputError, match="drops: hold NaN or infinity where there is a label"):
            call()
    with pytest.raises(InputError, match="scores_after: holds NaN or infinity"):
        cross_label_drops(before, bad, labels)
    with pytest.raises(InputError, match="scores_before: holds NaN or infinity"):
        cross_label_drops(bad[:, 0], after, labels)


def test_shapes_that_do_not_fit_are_refused(monkeypatch):
    # Without the suite's own shape checker, as a user runs it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match=r"curves of shapes \(2, 4\) and \(2, 3\): expected one shape"):
        deletion_measures(np.zeros((2, 4)), np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"maps \(2, 4\): expected \[N, h, w\]"):
        patch_order(np.zeros((2, 4)))
    labels = np.zeros((2, 1), dtype=np.int64)
    with pytest.raises(InputError, match=r"scores_before \(1, 3\): expected \(2, 3\) as in scores_after"):
        cross_label_drops(np.zeros((1, 3)), np.zeros((2, 1, 3)), labels)
    with pytest.raises(InputError, match=r"scores_after \(2, 2, 3\) and labels \(2, 1\): expected \[B, L, C\]"):
        cross_label_drops(np.zeros((2, 3)), np.zeros((2, 2, 3)), labels)
    with pytest.raises(InputError, match=r"drops \(2, 2, 3\) and labels \(2, 1\)"):
        cross_label_matrix(np.zeros((2, 2, 3)), labels, 3)
    with pytest.raises(InputError, match=r"targets \(2, 1\): expected the shape of the scores, \(2, 3\)"):
        specificity(np.zeros((2, 1, 3)), labels, np.zeros((2, 1)))
