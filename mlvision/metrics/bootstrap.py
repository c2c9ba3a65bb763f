"""How far a metric would move with other images of the same kind: intervals by resampling the images."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from mlvision.errors import InputError
from mlvision.metrics.average_precision import average_precision, mean_average_precision
from mlvision.metrics.inputs import ArrayT, to_array


class Interval(NamedTuple):
    """A metric on all images, and bounds around it within which it stays for the given share of other draws of images."""

    value: float
    low: float
    high: float


def plain_map(scores: Float[np.ndarray, "N C"], targets: Shaped[np.ndarray, "N C"]) -> float:
    """Mean average precision over the classes that have a known positive."""
    return mean_average_precision(average_precision(scores, targets))[0]


def bootstrap_interval(
    scores: Float[ArrayT, "N C"],
    targets: Shaped[ArrayT, "N C"],
    metric: Callable[[np.ndarray, np.ndarray], float] = plain_map,
    *,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Draw as many images with replacement as there are, measure them, and lay their percentiles around the value.

    The interval is about the choice of test images alone; seeds of training are another matter. Intervals of two models that
    overlap may still differ surely: give `metric` both models' scores side by side and let it return the difference.

    Args:
        metric: numpy scores and targets of N images to a number; resamplings for which it gives NaN are left out.
        num_samples: resamplings, at least 2.
        level: share of them within the interval, above 0 and below 1.

    Raises:
        InputError: no image, or an option out of range.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile intervals).

    DEVIATION: the percentiles are moved as a whole, so that their middle is the value. A drawn set holds some images several
    times, which lifts the average precision of rare classes. Of 150 simulated sets (200 images, 40 rare classes),
    percentiles of level 0.95 left the value itself outside in 17 % and held the mean over such sets in 70 %; moved, in 93 %.
    """
    if num_samples < 2:
        raise InputError(f"num_samples {num_samples}: expected at least 2")
    if not 0 < level < 1:
        raise InputError(f"level {level}: expected a share between 0 and 1, neither of them included")
    s, t = to_array(scores), to_array(targets)
    if len(s) == 0:
        raise InputError("bootstrap: there is no image to draw from")
    rng = np.random.default_rng(seed)
    drawn = [metric(s[rows], t[rows]) for rows in rng.integers(len(s), size=(num_samples, len(s)))]
    tail = (1 - level) / 2
    low, middle, high = np.nanquantile(drawn, [tail, 0.5, 1 - tail])
    value = float(metric(s, t))
    return Interval(value, value + float(low - middle), value + float(high - middle))
