import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import calibration_reference as reference

from mlvision.errors import InputError
from mlvision.metrics import expected_calibration_error, reliability_table

NAN = math.nan


def random_table(seed, num_images=9, num_classes=4, dtype=np.float64):
    """Probabilities among which borders of bins, 0 and 1 are common; a fifth of the targets unknown."""
    rng = np.random.default_rng(seed)
    shape = (num_images, num_classes)
    probabilities = np.where(rng.random(shape) < 0.5, rng.random(shape), rng.integers(0, 16, shape) / 15)
    targets = rng.choice([0.0, 1.0, NAN], size=shape, p=[0.5, 0.3, 0.2])
    return probabilities.astype(dtype), targets


@pytest.mark.parametrize("num_bins", [1, 2, 10, 15])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=st.integers(0, 2**32 - 1))
def test_matches_the_definition(num_bins, dtype, seed):
    probabilities, targets = random_table(seed, dtype=dtype)
    table = reliability_table(probabilities, targets, num_bins)
    np.testing.assert_allclose(np.stack(table, 1), reference.reliability(probabilities, targets, num_bins), rtol=1e-12)
    expected = reference.expected_calibration_error(probabilities, targets, num_bins)
    assert expected_calibration_error(probabilities, targets, num_bins) == pytest.approx(
        expected, rel=1e-12, nan_ok=True
    )


def test_by_hand():
    # Two bins. Low: 0.1 absent, 0.3 present; the unknown 0.2 counts nowhere. High: 0.5 (a border belongs above), 0.9, 1.
    probabilities = np.array([[0.1, 0.3, 0.2], [0.5, 0.9, 1.0]])
    targets = np.array([[0.0, 1.0, NAN], [0.0, 1.0, 1.0]])
    table = reliability_table(probabilities, targets, num_bins=2)
    np.testing.assert_allclose(table.confidence, [0.2, 0.8], rtol=1e-14)
    np.testing.assert_allclose(table.frequency, [0.5, 2 / 3], rtol=1e-14)
    assert table.count.tolist() == [2, 3]
    assert expected_calibration_error(probabilities, targets, num_bins=2) == pytest.approx(
        (2 * 0.3 + 3 * (0.8 - 2 / 3)) / 5
    )


def test_honest_probabilities_are_calibrated_and_sharpened_ones_are_not():
    rng = np.random.default_rng(0)
    probabilities = rng.random((20_000, 10))
    targets = (rng.random(probabilities.shape) < probabilities).astype(np.float32)
    assert expected_calibration_error(probabilities, targets) < 0.01
    # With p kept to 0 and 1 the error is the mean distance to them: 1/4.
    assert expected_calibration_error(probabilities.round(), targets) == pytest.approx(0.25, abs=0.01)


def test_saying_the_frequency_of_everything_is_calibrated():
    targets = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, NAN, NAN]])
    assert expected_calibration_error(np.full(targets.shape, 1 / 3), targets) == pytest.approx(0, abs=1e-15)


@given(seed=st.integers(0, 2**32 - 1))
def test_order_and_unknown_entries_change_nothing(seed):
    probabilities, targets = random_table(seed)
    expected = reliability_table(probabilities, targets)
    order = np.random.default_rng(seed).permutation(len(targets))
    changed = np.where(np.isnan(targets), 1 - probabilities, probabilities)
    for found in (reliability_table(probabilities[order], targets[order]), reliability_table(changed, targets)):
        np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=1e-12)


def test_nothing_known_is_nan():
    assert math.isnan(expected_calibration_error(np.full((2, 3), 0.5), np.full((2, 3), NAN)))
    assert math.isnan(expected_calibration_error(np.zeros((0, 3)), np.zeros((0, 3))))


def test_takes_tensors():
    probabilities, targets = random_table(0, dtype=np.float32)
    given_tensors = torch.from_numpy(probabilities), torch.from_numpy(targets)
    assert expected_calibration_error(*given_tensors) == expected_calibration_error(probabilities, targets)


def test_bad_input_is_named():
    table = np.full((2, 2), 0.5)
    with pytest.raises(InputError, match="num_bins 0: expected at least 1"):
        expected_calibration_error(table, table.round(), num_bins=0)
    with pytest.raises(InputError, match="probabilities from -3 to 0.5: expected 0 to 1; logits are none"):
        expected_calibration_error(np.array([[-3.0, 0.5]]), np.zeros((1, 2)))
    with pytest.raises(InputError, match="scores of class 1: 1 of 1 are NaN"):
        expected_calibration_error(np.array([[0.0, NAN]]), np.zeros((1, 2)))
    with pytest.raises(InputError, match="targets of class 0: 0.5 in row 0"):
        reliability_table(table, table)
