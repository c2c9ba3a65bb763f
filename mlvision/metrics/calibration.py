"""Calibration: whether what is given a probability p is there in a share p of the cases."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from mlvision.errors import InputError
from mlvision.metrics.inputs import ArrayT, check_scores, check_targets, to_array


class Reliability(NamedTuple):
    """The entries of a table of probabilities, in bins of equal width from 0 to 1.

    Attributes:
        confidence: mean probability of each bin's entries; NaN in an empty bin.
        frequency: share of them that are present; NaN in an empty bin.
        count: how many they are.
    """

    confidence: Float64[np.ndarray, " bins"]
    frequency: Float64[np.ndarray, " bins"]
    count: Int64[np.ndarray, " bins"]


def reliability_table(
    probabilities: Float[ArrayT, "N C"], targets: Shaped[ArrayT, "N C"], num_bins: int = 15
) -> Reliability:
    """Compare probabilities with how often the labels are there; every entry (image, class) is one case.

    Args:
        probabilities: In [0, 1]. Bin b holds b / num_bins <= p < (b + 1) / num_bins; the last bin also p = 1.
        targets: 1 present, 0 absent, NaN unknown; unknown entries are left out.
        num_bins: At least 1.

    Raises:
        InputError: A number out of range, shapes do not fit, or a target is not 1, 0 or NaN.
    """
    if num_bins < 1:
        raise InputError(f"num_bins {num_bins}: expected at least 1")
    p, t = to_array(probabilities), to_array(targets)
    check_scores(p)
    check_targets(t, p.shape)
    if p.size and not 0 <= p.min() <= p.max() <= 1:
        raise InputError(f"probabilities from {p.min():g} to {p.max():g}: expected 0 to 1; logits are none")
    known = t == t
    p, t = p[known].astype(np.float64), t[known].astype(np.float64)
    which = np.searchsorted(np.arange(1, num_bins) / num_bins, p, side="right")
    count = np.bincount(which, minlength=num_bins)
    cases = np.where(count > 0, count, np.nan)
    confidence, frequency = (np.bincount(which, weights=column, minlength=num_bins) / cases for column in (p, t))
    return Reliability(confidence, frequency, count)


def expected_calibration_error(
    probabilities: Float[ArrayT, "N C"], targets: Shaped[ArrayT, "N C"], num_bins: int = 15
) -> float:
    """Give the mean over the known entries of |confidence - frequency| of their bin; NaN where nothing is known.

    DEVIATION: the source measures single-label classifiers, the highest probability of each image alone. Here each entry
    (image, class) is a case of its own. Most are absent with a probability near 0, where bins are well calibrated with
    ease; so values are lower than single-label ones and only compare at equal classes.

    Args, Raises: As `reliability_table`.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    confidence, frequency, count = reliability_table(probabilities, targets, num_bins)
    filled = count > 0
    if not filled.any():
        return float("nan")
    return float(np.average(np.abs(confidence - frequency)[filled], weights=count[filled]))
