import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import metrics_reference as reference
from sklearn.metrics import precision_recall_fscore_support
from torchmetrics.functional.classification import multilabel_f1_score

from mlvision.errors import InputError
from mlvision.metrics import class_measures, decide, f_measures, multilabel_summary
from mlvision.space import reaches

NAN = math.nan
RULES = [(0.5, None), (0.5, 2), (None, 2), (None, 1), (0.25, 9)]


def simulated(num_images=300, num_classes=7, seed=0):
    rng = np.random.default_rng(seed)
    targets = (rng.random((num_images, num_classes)) < np.geomspace(0.05, 0.5, num_classes)).astype(np.float32)
    targets[0] = 1
    logits = rng.standard_normal(targets.shape) + 2 * targets - 1
    return (1 / (1 + np.exp(-logits))).astype(np.float32), targets


# Columns are drawn from few values, so ties within an image are the rule.
tables = st.tuples(st.integers(1, 6), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(
        st.lists(
            st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.9]), min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        ),
        st.lists(
            st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        ),
    )
)


@pytest.mark.parametrize(("threshold", "top_k"), RULES)
@given(table=tables)
def test_matches_the_definition(threshold, top_k, table):
    scores, targets = table
    decided = decide(np.array(scores), threshold=threshold, top_k=top_k)
    expected = reference.decisions(scores, threshold, top_k)
    assert decided.tolist() == expected
    ours = f_measures(decided, np.array(targets))
    if any(1.0 in row for row in targets):
        np.testing.assert_allclose(ours, reference.f_measures(expected, targets), rtol=1e-13, atol=0)
    else:
        assert all(math.isnan(value) for value in ours[:7])
        assert ours.num_skipped == len(targets[0])


def test_by_hand():
    decided = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]], dtype=bool)
    targets = np.array([[1, 1, 0, NAN], [0, 0, 1, 0], [1, 1, NAN, 0], [1, 0, 1, 0]])
    # Class 0: 2 hits of 3 predicted, 3 present. Class 1: never predicted, 2 present. Class 2: 1 of 2 (the unknown image
    # counts nowhere), 2 present. Class 3: no known positive, so in no class mean, but its 2 false alarms are in OP.
    ours = f_measures(decided, targets)
    cp, cr = (2 / 3 + 0 + 1 / 2) / 3, (2 / 3 + 0 + 1 / 2) / 3
    op, overall_recall = 3 / 7, 3 / 7
    expected = (cp, cr, 2 * cp * cr / (cp + cr), (2 / 3 + 0 + 1 / 2) / 3, op, overall_recall, 3 / 7, 1)
    np.testing.assert_allclose(ours, expected, rtol=1e-14)
    precision, recall, f1 = class_measures(decided, targets)
    np.testing.assert_allclose(precision, [2 / 3, 0, 1 / 2, NAN], rtol=1e-14)
    np.testing.assert_allclose(recall, [2 / 3, 0, 1 / 2, NAN], rtol=1e-14)
    np.testing.assert_allclose(f1, [2 / 3, 0, 1 / 2, NAN], rtol=1e-14)


def test_the_two_cf1_flavours_differ_by_hand():
    # Class 0: precision 1, recall 1/2, F1 2/3. Class 1: precision 1/2, recall 1, F1 2/3.
    decided = np.array([[1, 1], [0, 1]], dtype=bool)
    targets = np.array([[1.0, 1.0], [1.0, 0.0]])
    ours = f_measures(decided, targets)
    assert (ours.CP, ours.CR, ours.CF1) == (0.75, 0.75, 0.75)
    assert ours.CF1_mean == pytest.approx(2 / 3, rel=1e-14)


@pytest.mark.parametrize(("threshold", "top_k"), RULES)
def test_matches_sklearn_and_torchmetrics(threshold, top_k):
    scores, targets = simulated()
    decided = decide(scores, threshold=threshold, top_k=top_k)
    ours = f_measures(decided, targets)
    macro = precision_recall_fscore_support(targets, decided, average="macro", zero_division=0)
    micro = precision_recall_fscore_support(targets, decided, average="micro", zero_division=0)
    np.testing.assert_allclose((ours.CP, ours.CR, ours.CF1_mean), macro[:3], rtol=1e-12)
    np.testing.assert_allclose((ours.OP, ours.OR, ours.OF1), micro[:3], rtol=1e-12)
    per_class = precision_recall_fscore_support(targets, decided, average=None, zero_division=0)
    np.testing.assert_allclose(class_measures(decided, targets), per_class[:3], rtol=1e-12)
    peer = multilabel_f1_score(torch.from_numpy(decided).float(), torch.from_numpy(targets).long(), 7, average="micro")
    np.testing.assert_allclose(ours.OF1, peer.item(), rtol=1e-6)


def test_the_threshold_itself_is_a_yes_in_the_dtype_of_the_scores():
    scores = np.array([[0.7, 0.69999, 0.70001]], dtype=np.float32)  # float32 0.7 is below the double 0.7
    assert decide(scores, threshold=0.7).tolist() == [[True, False, True]]
    assert decide(np.zeros((1, 2)), threshold=0.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.9, 0.05])
def test_a_threshold_is_reached_by_itself_in_every_precision(dtype, threshold):
    """As `torch.tensor(t, dtype)` is what a score of t becomes; the numbers next to it are decided by their order."""
    at = torch.tensor(threshold, dtype=dtype)
    ends = torch.tensor([-1.0, 2.0], dtype=dtype)
    scores = torch.stack([torch.nextafter(at, ends[0]), at, torch.nextafter(at, ends[1])])[None]
    assert decide(scores, threshold=threshold).tolist() == [[False, True, True]]
    assert decide(scores, threshold=threshold, top_k=1).tolist() == [[False, False, True]]
    each = torch.tensor([threshold, threshold, 1.0], dtype=torch.float64)
    assert reaches(scores, each).tolist() == [[False, True, False]]
    if dtype != torch.bfloat16:  # NumPy has none
        assert reaches(scores.numpy(), each.numpy()).tolist() == [[False, True, False]]


def test_whole_numbers_are_compared_as_they_are():
    assert reaches(np.array([[0, 1]]), 0.5).tolist() == [[False, True]]
    assert reaches(torch.tensor([[0, 1]]), 0.5).tolist() == [[False, True]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_summary_of_logits_counts_what_lies_at_the_threshold(dtype):
    logits = torch.tensor([[math.log(0.7 / 0.3), -1.0]], dtype=dtype)
    assert multilabel_summary(logits, torch.tensor([[1.0, 0.0]]), threshold=0.7)["OR"] == 1


def test_top_k_breaks_ties_by_class_index_and_counts_exactly():
    scores = np.array([[0.2, 0.9, 0.2, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]])
    exact = decide(scores, threshold=None, top_k=3)
    assert exact.astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]
    both = decide(scores, threshold=0.4, top_k=3)
    assert both.astype(int).tolist() == [[0, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]


def test_top_k_of_more_classes_than_there_are_takes_all():
    scores = np.array([[0.2, 0.9], [0.6, 0.7]])
    assert decide(scores, threshold=None, top_k=3).all()
    assert decide(scores, threshold=0.5, top_k=3).tolist() == decide(scores, threshold=0.5).tolist()


@given(seed=st.integers(0, 2**32 - 1))
def test_permuting_images_and_flipping_unknown_entries_change_nothing(seed):
    rng = np.random.default_rng(seed)
    scores, targets = simulated(num_images=40, seed=seed)
    targets[rng.random(targets.shape) < 0.2] = NAN
    decided = decide(scores, threshold=0.5)
    expected = f_measures(decided, targets)
    order = rng.permutation(40)
    np.testing.assert_allclose(f_measures(decided[order], targets[order]), expected, rtol=1e-14)
    np.testing.assert_array_equal(f_measures(decided ^ np.isnan(targets), targets), expected)


def test_nothing_predicted_scores_zero():
    targets = np.array([[1.0, 0.0], [1.0, 1.0]])
    assert f_measures(np.zeros((2, 2), dtype=bool), targets) == (0, 0, 0, 0, 0, 0, 0, 0)


def test_gives_back_the_kind_that_it_was_given():
    scores, targets = simulated()
    tensor = decide(torch.from_numpy(scores), threshold=0.5, top_k=2)
    assert tensor.dtype == torch.bool
    np.testing.assert_array_equal(tensor.numpy(), decide(scores, threshold=0.5, top_k=2))
    assert f_measures(tensor, torch.from_numpy(targets)) == f_measures(tensor.numpy(), targets)


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"threshold": None}, "threshold and top_k are both None"),
        ({"threshold": 0.5, "top_k": 0}, "top_k 0: expected at least 1"),
    ],
)
def test_bad_rules_are_named(rule, match):
    with pytest.raises(InputError, match=match):
        decide(np.zeros((2, 3)), **rule)


def test_scores_and_targets_that_are_no_decision_are_refused():
    with pytest.raises(InputError, match="scores of class 2: 1 of 2 are NaN"):
        decide(np.array([[0.0, 0.0, NAN], [0.0, 0.0, 0.0]]), threshold=0.5)
    with pytest.raises(InputError, match="targets of class 1: -1.0 in row 0"):
        f_measures(np.zeros((1, 2), dtype=bool), np.array([[0.0, -1.0]]))
