import numpy as np
import pytest

from mlvision.study.comparison import own_and_others


def test_a_cross_label_matrix_has_two_means():
    """Of three labels the second was never found: its row is not known, its column is."""
    drops = np.array([[4.0, 1.0, -2.0], [np.nan, np.nan, np.nan], [0.5, -0.5, 8.0]])
    assert own_and_others(drops) == {"own": 6.0, "others": pytest.approx((1 - 2 + 0.5 - 0.5) / 4)}


def test_a_matrix_of_which_nothing_is_known_has_none():
    means = own_and_others(np.full((2, 2), np.nan))
    assert all(np.isnan(mean) for mean in means.values())
    alone = own_and_others(np.array([[3.0]]))
    assert alone["own"] == 3
    assert np.isnan(alone["others"])
