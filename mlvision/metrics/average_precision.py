"""Average precision in the three flavours that the literature calls mAP."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

from mlvision.errors import InputError
from mlvision.metrics.inputs import ArrayT, check_scores, check_targets, same_kind, to_array


def _plain(found: Int64[np.ndarray, " P"], shown: Int64[np.ndarray, " P"]) -> float:
    return float((found / shown).mean())


def _envelope(found: Int64[np.ndarray, " P"], shown: Int64[np.ndarray, " P"]) -> float:
    return float(precision_envelope(found, shown).mean())


def _voc11(found: Int64[np.ndarray, " P"], shown: Int64[np.ndarray, " P"]) -> float:
    # recall >= k / 10 in integers: in floats 3 / 10 of the positives may or may not reach 0.3.
    first = np.searchsorted(10 * found, np.arange(11) * len(found))
    return float(precision_envelope(found, shown)[first].mean())


FLAVOURS = {"plain": _plain, "envelope": _envelope, "voc11": _voc11}


def average_precision(
    scores: Float[ArrayT, "N C"], targets: Shaped[ArrayT, "N C"], flavour: str = "plain"
) -> Float64[ArrayT, " C"]:
    """Average precision of each class, NaN for a class without a known positive.

    Equal scores share one rank, so the order of the images never matters. Give logits rather than probabilities:
    a sigmoid in low precision saturates, and the ties that it makes cost accuracy.

    Args:
        scores: Any float dtype, any monotone scale; ranked in that dtype, computed in float64 on the CPU.
        targets: 1 present, 0 absent, NaN unknown; unknown images are left out class by class.
        flavour: plain: mean over the positives of the precision at their rank (scikit-learn, ASL, ML-Decoder, CSRA);
            envelope: area under the precision made monotone in recall (VOC 2010 and later, Query2Label);
            voc11: its mean at recalls 0, 0.1, ..., 1 (VOC 2007).

    Returns:
        float64, of the kind and on the device of `scores`.

    Raises:
        InputError: No such flavour, shapes do not fit, a score is not finite, a target is not 1, 0 or NaN.

    Source: Everingham et al., "The PASCAL VOC Challenge", IJCV 2010, section 4.2, for envelope and voc11.
    """
    (values,) = average_precisions(scores, targets, (flavour,))
    return values


def average_precisions(
    scores: Float[ArrayT, "N C"], targets: Shaped[ArrayT, "N C"], flavours: Sequence[str] = tuple(FLAVOURS)
) -> tuple[Float64[ArrayT, " C"], ...]:
    """Several flavours of `average_precision` for the price of one ranking, in the order of `flavours`."""
    for flavour in flavours:
        if flavour not in FLAVOURS:
            raise InputError(f"flavour '{flavour}': expected one of {', '.join(FLAVOURS)}")
    s, t = to_array(scores), to_array(targets)
    check_scores(s)
    check_targets(t, s.shape)
    values = np.full((len(flavours), s.shape[1]), np.nan)
    for c in range(s.shape[1]):
        found, shown = ranks_of_positives(s[:, c], t[:, c])
        if len(found):
            values[:, c] = [FLAVOURS[flavour](found, shown) for flavour in flavours]
    return tuple(same_kind(row, like=scores) for row in values)


def mean_average_precision(ap: Float[ArrayT, " C"]) -> tuple[float, int]:
    """Mean over the classes that have a value, and how many had none (NaN where none has)."""
    values = to_array(ap)
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan"), len(values) - len(defined)


def ranks_of_positives(
    scores: Float[np.ndarray, " N"], targets: Shaped[np.ndarray, " N"]
) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]]:
    """Count, for each positive of one class from the best score down, the positives and the images at or above it.

    Precision is `found / shown` and recall `found / P`. Tied images all stand at or above each other, so ties need no
    further care. Sorting values alone and looking up the few positives is several times faster than an argsort of all.
    """
    positives = np.sort(scores[targets == 1])
    known = np.sort(scores[targets == targets])  # NaN differs from itself
    found = len(positives) - np.searchsorted(positives, positives)
    shown = len(known) - np.searchsorted(known, positives)
    return found[::-1], shown[::-1]


def precision_envelope(found: Int64[np.ndarray, " P"], shown: Int64[np.ndarray, " P"]) -> Float64[np.ndarray, " P"]:
    """Give, at each positive from the best score down, the highest precision at its recall or a higher one."""
    return np.maximum.accumulate((found / shown)[::-1])[::-1]
