import math

import numpy as np
import pytest
import torch
from reference import space_reference

from mlvision.errors import InputError
from mlvision.space import LabelSpace, join_groups, split_groups

GROUPS = [(1,) * 7, (7,), (2, 1, 1, 3), (1, 6), (3, 3, 1), (1,), (2,)]


def space(groups=(), exclusive=()):
    num_classes = sum(groups or exclusive)
    return LabelSpace(tuple(f"class {c}" for c in range(num_classes)), groups, exclusive)


def table(num_classes, scale=4.0, dtype=np.float64):
    return (np.random.default_rng(num_classes).normal(0, scale, (6, num_classes))).astype(dtype)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("groups", GROUPS)
def test_scores_log_odds_and_decisions_are_those_of_the_definitions(groups, kind):
    logits = table(sum(groups))
    given, ours = kind(logits), space(groups, groups)
    np.testing.assert_allclose(ours.scores(given), [space_reference.scores(row, groups) for row in logits.tolist()])
    expected = [space_reference.log_odds(row, groups) for row in logits.tolist()]
    np.testing.assert_allclose(ours.log_odds(given), expected, rtol=1e-12, atol=1e-12)
    for threshold in (-1.0, 0.0, 2.5):
        expected = [space_reference.decide(row, groups, threshold) for row in logits.tolist()]
        np.testing.assert_array_equal(ours.decide(given, threshold), expected)
    for found in (ours.scores(given), ours.log_odds(given), ours.decide(given, 0.5)):
        assert type(found) is type(given)


def test_by_hand():
    """A die of three sides of weights 1, 2 and 5, and a coin that falls on its head three times in four."""
    ours = LabelSpace(("one", "two", "three", "head"), groups=(3, 1), exclusive=(3, 1))
    logits = torch.tensor([[1.0, 2.0, 5.0, 3.0]]).log()
    torch.testing.assert_close(ours.scores(logits), torch.tensor([[1 / 8, 2 / 8, 5 / 8, 3 / 4]]))
    odds = torch.tensor([[1 / 7, 2 / 6, 5 / 3, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(ours.log_odds(logits).exp(), odds, rtol=1e-6, atol=0)
    assert ours.decide(ours.scores(logits), 0.76).tolist() == [[False, False, True, False]]
    assert ours.decide(ours.scores(logits), 0.74).tolist() == [[False, False, True, True]]


def test_losses_decide_what_shares_a_softmax_and_data_sets_what_is_exclusive():
    multilabel, board = space(exclusive=(1,) * 6), space((2, 1, 3), (2, 1, 3))
    logits = torch.tensor([[0.1, 0.3, -1.0, -3.0, -2.0, -4.0]])
    highest = [[False, True, False, False, True, False]]

    sigmoids, softmax = multilabel.with_sigmoids(), multilabel.with_softmax()
    torch.testing.assert_close(sigmoids.scores(logits), logits.sigmoid())
    torch.testing.assert_close(softmax.scores(logits), logits.softmax(1))
    assert sigmoids.decide(sigmoids.scores(logits), 0.5).tolist() == [[True, True, False, False, False, False]]
    assert not softmax.decide(softmax.scores(logits), 0.5).any()  # the highest has 0.43

    sigmoids, softmax = board.with_sigmoids(), board.with_softmax()
    torch.testing.assert_close(sigmoids.scores(logits), logits.sigmoid())
    torch.testing.assert_close(softmax.scores(logits)[:, 3:], logits[:, 3:].softmax(1))
    for ours in (sigmoids, softmax):
        assert ours.decide(ours.scores(logits), 0.5).tolist() == highest
        assert ours.decide(ours.log_odds(logits), 0.0).tolist() == highest
    assert (softmax, softmax.with_sigmoids().with_softmax()) == (board, board)


def test_log_odds_of_extreme_logits_are_not_rounded():
    """Probabilities of 1 - 1e-434 and of 1e-434, which float64 has none of; and a class that is sure next to a tie."""
    ours = space((3, 2))
    found = ours.log_odds(torch.tensor([[1000.0, 0.0, 0.0, -5000.0, -2000.0], [1e-9, 0.0, -800.0, 7.0, 7.0]]))
    expected = [[1000 - math.log(2), -1000, -1000, -3000, 3000], [1e-9, -1e-9, -800 - math.log(2), 0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-15)
    logits = np.array([[40.0, 0.0, -3.0, 0.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(ours.log_odds(logits)[0, 0], 40 - np.log1p(np.exp(-3.0)), rtol=1e-15)
    assert ours.scores(logits)[0, 0] == 1


def test_log_odds_of_sigmoids_are_the_logits_in_their_own_dtype():
    logits = torch.randn(2, 3, dtype=torch.bfloat16)
    assert space((1, 1, 1), (3,)).log_odds(logits) is logits


def test_the_first_of_equal_classes_counts():
    ours = space(exclusive=(3, 3))
    for scores in (np.array([[0.2, 0.2, 0.1, 0.0, 0.0, 0.0]]), np.array([[0.1, 0.4, 0.4, 0.3, 0.2, 0.3]])):
        expected = [[c == scores[0, :3].argmax() for c in range(3)] + [c == 0 for c in range(3)]]
        assert ours.decide(scores, 0.9).tolist() == expected
        assert ours.decide(torch.from_numpy(scores), 0.9).tolist() == expected


def test_thresholds_act_in_the_dtype_of_the_scores_and_may_differ_by_class():
    ours = space(exclusive=(2, 1, 1))
    scores = np.array([[0.6, 0.4, 0.7, 0.7]], dtype=np.float32)  # float32(0.7) is below the double 0.7
    assert ours.decide(scores, 0.7).tolist() == [[True, False, True, True]]
    thresholds = torch.tensor([0.9, 0.1, 0.8, 0.6])
    assert ours.decide(torch.from_numpy(scores), thresholds).tolist() == [[True, False, False, True]]


def test_further_classes_come_last():
    more = ("x", "y")
    assert space((3,), (1, 2)).extended(more) == LabelSpace(
        ("class 0", "class 1", "class 2", "x", "y"), groups=(5,), exclusive=(1, 2, 1, 1)
    )
    assert space((1, 2), (1, 2)).extended(more).groups == (1, 2, 1, 1)
    assert space((1,), (1,)).extended(more).groups == (1, 1, 1)


@pytest.mark.parametrize("groups", GROUPS)
def test_parts_of_a_table_join_to_the_table(groups):
    values = torch.arange(2 * sum(groups) * 3).view(2, sum(groups), 3)
    parts = split_groups(values, groups)
    assert len(parts) <= len(groups)
    assert all(part.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() for part in parts)
    assert torch.equal(join_groups(parts), values)
    assert len(split_groups(torch.zeros(3, 64 * 13), (13,) * 64)) == 1


@pytest.mark.parametrize("groups", [(2, 2), (4, 0, 1), (6, -1), (5, 1)])
def test_groups_that_are_not_those_of_the_classes_are_refused(groups):
    for name in ("groups", "exclusive"):
        with pytest.raises(InputError, match=r"groups of classes: .* add up to the 5 classes, got \["):
            LabelSpace(tuple("abcde"), **{name: groups})


def test_the_space_of_logits():
    assert LabelSpace.of(None, 2) == LabelSpace(("0", "1"), (1, 1), (1, 1))
    given = space((2, 3))
    assert LabelSpace.of(given, 5) is given
    with pytest.raises(InputError, match="space: has 5 classes, the logits have 4"):
        LabelSpace.of(given, 4)
