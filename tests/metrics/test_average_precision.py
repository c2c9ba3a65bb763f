import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.metrics_reference import average_precision_of_class
from sklearn.metrics import average_precision_score
from torchmetrics.functional.classification import multilabel_average_precision

from mlvision.errors import InputError
from mlvision.metrics import average_precision, average_precisions, mean_average_precision

NAN = math.nan
FLAVOURS = ("plain", "envelope", "voc11")


def simulated(num_images=400, num_classes=11, seed=0):
    rng = np.random.default_rng(seed)
    targets = (rng.random((num_images, num_classes)) < np.geomspace(0.02, 0.4, num_classes)).astype(np.float32)
    targets[0] = 1
    return (rng.standard_normal(targets.shape) + 2 * targets).astype(np.float32), targets


# A few scores only, so that ties are the rule; targets of all three kinds.
tables = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0]), min_size=n, max_size=n),
        st.lists(st.sampled_from([0.0, 1.0, 1.0, NAN]), min_size=n, max_size=n),
    )
)


@pytest.mark.parametrize("flavour", FLAVOURS)
@given(table=tables)
def test_matches_the_definition_in_exact_fractions(flavour, table):
    scores, targets = (np.array(column)[:, None] for column in table)
    expected = average_precision_of_class(*table, flavour)
    np.testing.assert_allclose(average_precision(scores, targets, flavour), [expected], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("flavour", "expected"),
    [
        # Ranks of the positives: 1, 3, 6, so precisions 1, 2/3, 1/2 at recalls 1/3, 2/3, 1.
        ("plain", (1 + 2 / 3 + 1 / 2) / 3),
        ("envelope", (1 + 2 / 3 + 1 / 2) / 3),
        # Recalls 0 to 0.3, 0.4 to 0.6, 0.7 to 1.
        ("voc11", (4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11),
    ],
)
def test_by_hand(flavour, expected):
    scores = np.array([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]).T
    targets = np.array([[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]]).T
    assert average_precision(scores, targets, flavour)[0] == pytest.approx(expected, rel=1e-14)


def test_by_hand_where_the_flavours_part():
    # Ranks of the positives: 2, 3, 4. Precisions 1/2, 2/3, 3/4 rise, so the envelope is 3/4 everywhere.
    scores = np.array([[4.0, 3.0, 2.0, 1.0]]).T
    targets = np.array([[0.0, 1.0, 1.0, 1.0]]).T
    assert average_precision(scores, targets)[0] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)
    assert average_precision(scores, targets, "envelope")[0] == 0.75
    assert average_precision(scores, targets, "voc11")[0] == 0.75


def test_voc11_reaches_a_recall_that_floats_miss():
    # Positives at ranks 1..3 and 5..11: recall 3/10 has precision 1, but in floats 3 / 10 >= 3 * 0.1 is false.
    targets = np.array([[1.0] * 3 + [0.0] + [1.0] * 7]).T
    scores = np.arange(11.0, 0.0, -1)[:, None]
    assert average_precision(scores, targets, "voc11")[0] == pytest.approx((4 * 1 + 7 * 10 / 11) / 11, rel=1e-14)


@pytest.mark.parametrize(
    "quantise",
    [
        lambda s: s,
        lambda s: torch.from_numpy(s).bfloat16().float().numpy(),
        lambda s: torch.from_numpy(s).sigmoid().bfloat16().float().numpy(),
        lambda s: torch.from_numpy(s).half().float().numpy(),
        lambda s: s.round(1),
        lambda s: np.zeros_like(s),
    ],
    ids=["fp32", "bf16 logits", "bf16 probabilities", "fp16", "one decimal", "constant"],
)
def test_ties_match_sklearn_and_torchmetrics(quantise):
    scores, targets = simulated(num_images=3000)
    scores = quantise(scores)
    ours = average_precision(scores, targets)
    np.testing.assert_allclose(ours, average_precision_score(targets, scores, average=None), rtol=0, atol=1e-12)
    probabilities = torch.from_numpy(scores).double().sigmoid()
    peer = multilabel_average_precision(probabilities, torch.from_numpy(targets).long(), 11, average=None)
    np.testing.assert_allclose(ours, peer.numpy(), rtol=0, atol=2e-6)


def test_a_constant_score_gives_the_prevalence_among_known_images():
    targets = np.array([[1.0, 0.0, 0.0, NAN, 0.0]]).T
    for flavour in FLAVOURS:
        assert average_precision(np.ones((5, 1)), targets, flavour)[0] == 0.25


@pytest.mark.parametrize("flavour", FLAVOURS)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_images_and_the_scale_of_scores_never_matter(flavour, seed):
    rng = np.random.default_rng(seed)
    scores, targets = simulated(num_images=60, num_classes=4, seed=seed)
    scores = scores.round(1)
    targets[rng.random(targets.shape) < 0.1] = NAN
    expected = average_precision(scores, targets, flavour)
    order = rng.permutation(60)
    np.testing.assert_array_equal(average_precision(scores[order], targets[order], flavour), expected)
    for rescaled in (scores.astype(np.float64) ** 3, 5 * scores - 100, np.arctan(scores.astype(np.float64))):
        np.testing.assert_array_equal(average_precision(rescaled, targets, flavour), expected)


def test_unknown_images_are_left_out_class_by_class():
    scores, targets = simulated()
    targets[np.random.default_rng(1).random(targets.shape) < 0.3] = NAN
    for flavour in FLAVOURS:
        ours = average_precision(scores, targets, flavour)
        for c in range(targets.shape[1]):
            known = ~np.isnan(targets[:, c])
            alone = average_precision(scores[known, c : c + 1], targets[known, c : c + 1], flavour)
            assert ours[c] == alone[0]


def test_a_perfect_and_a_worst_ranking():
    targets = np.array([[1.0, 1.0, 0.0, 0.0, 0.0]]).T
    best = np.array([[5.0, 4.0, 3.0, 2.0, 1.0]]).T
    for flavour in FLAVOURS:
        assert average_precision(best, targets, flavour)[0] == 1
    assert average_precision(-best, targets)[0] == pytest.approx((1 / 4 + 2 / 5) / 2)


def test_classes_without_positives_are_nan_and_counted():
    scores, targets = simulated(num_classes=5)
    targets[:, 1] = 0
    targets[:, 3] = NAN
    ap = average_precision(scores, targets)
    assert np.isnan(ap).tolist() == [False, True, False, True, False]
    value, num_skipped = mean_average_precision(ap)
    assert num_skipped == 2
    assert value == pytest.approx(average_precision_score(targets[:, [0, 2, 4]], scores[:, [0, 2, 4]]), abs=1e-12)
    value, num_skipped = mean_average_precision(np.full(3, NAN))
    assert math.isnan(value)
    assert num_skipped == 3


def test_a_class_without_negatives_is_perfect():
    assert average_precision(np.array([[0.3], [-2.0]]), np.ones((2, 1)))[0] == 1


def test_gives_back_the_kind_that_it_was_given():
    scores, targets = simulated()
    ours = average_precision(scores, targets)
    assert isinstance(ours, np.ndarray)
    assert ours.dtype == np.float64
    tensor = average_precision(torch.from_numpy(scores).requires_grad_(), torch.from_numpy(targets))
    assert tensor.dtype == torch.float64
    np.testing.assert_array_equal(tensor.numpy(), ours)
    assert mean_average_precision(tensor) == mean_average_precision(ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_ranked_as_it_is(dtype):
    scores, targets = simulated()
    half = torch.from_numpy(scores).to(dtype)
    expected = average_precision_score(targets, half.float().numpy(), average=None)
    np.testing.assert_allclose(average_precision(half, torch.from_numpy(targets)).numpy(), expected, atol=1e-12)


def test_float64_scores_are_not_rounded_into_ties():
    scores = np.array([[1.0 + 1e-12], [1.0]])
    assert average_precision(scores, np.array([[1.0], [0.0]]))[0] == 1
    assert average_precision(scores, np.array([[0.0], [1.0]]))[0] == 0.5


def test_inputs_are_left_alone():
    scores, targets = simulated()
    scores_before, targets_before = scores.copy(), targets.copy()
    average_precisions(scores, targets)
    assert (scores == scores_before).all()
    assert (targets == targets_before).all()


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_scores_that_cannot_be_ranked_name_their_class(bad):
    scores, targets = simulated(num_images=9, num_classes=3)
    scores[[2, 5], 1] = bad
    with pytest.raises(InputError, match="scores of class 1: 2 of 9 are NaN or infinite"):
        average_precision(scores, targets)


def test_targets_of_another_convention_are_refused():
    scores, targets = simulated(num_images=9, num_classes=3)
    targets[4, 2] = -1
    with pytest.raises(InputError, match=r"targets of class 2: -1\.0 in row 4, expected 1, 0 or NaN"):
        average_precision(scores, targets)


def test_an_unknown_flavour_lists_the_known_ones():
    with pytest.raises(InputError, match="flavour 'voc12': expected one of plain, envelope, voc11"):
        average_precision(*simulated(num_images=4, num_classes=2), "voc12")
