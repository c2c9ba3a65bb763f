"""real_accuracy by hand and against the rule of the publisher's README, written out."""

import math

import numpy as np
import pytest
import torch

from mlvision.errors import InputError
from mlvision.metrics import real_accuracy

SCORES = np.array([[0.1, 0.7, 0.2], [3.0, 1.0, 2.0], [0.0, -1.0, 5.0], [9.0, 1.0, 1.0]])


def test_by_hand():
    # Right: 1 is in the list; wrong: 0 is not; left out; right.
    assert real_accuracy(SCORES, [[0, 1], [1, 2], [], [0]]) == pytest.approx(2 / 3)
    assert real_accuracy(torch.tensor(SCORES), [[0], [1], [0], [1]]) == 0
    assert real_accuracy(SCORES.astype(np.float16), [(1,), (0,), (2,), (0,)]) == 1
    assert math.isnan(real_accuracy(SCORES, [[], [], [], []]))


def test_equals_the_published_code_without_ties():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(500, 7))
    lists = [rng.choice(7, size=rng.integers(0, 4), replace=False).tolist() for _ in range(500)]
    predictions = scores.argmax(axis=1)
    is_correct = [predictions[i] in lists[i] for i in range(500) if lists[i]]
    assert real_accuracy(scores, lists) == pytest.approx(np.mean(is_correct), abs=1e-12)


def test_ties_do_not_depend_on_the_order_of_the_classes():
    tied = np.array([[2.0, 5.0, 5.0, 5.0]])
    assert real_accuracy(tied, [[1]]) == real_accuracy(tied, [[3]]) == pytest.approx(1 / 3)
    assert real_accuracy(tied, [[0, 2, 3, 2]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[0]], "expected one list for each of the 4 rows of scores, got 1"),
        ([[0], [1, 3], [], []], "row 1: .1, 3., expected classes 0 to 2"),
        ([[0], [-1], [], []], "row 1: .-1., expected"),
    ],
)
def test_lists_that_do_not_fit_are_refused(lists, message):
    with pytest.raises(InputError, match=message):
        real_accuracy(SCORES, lists)


def test_scores_must_be_finite():
    with pytest.raises(InputError, match="finite"):
        real_accuracy(np.array([[np.nan, 1.0]]), [[0]])
