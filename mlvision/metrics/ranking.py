"""How good an image's own ranking of the classes is, at its head."""

import numpy as np
from jaxtyping import Float, Float64, Shaped

from mlvision.errors import InputError
from mlvision.metrics.inputs import ArrayT, check_scores, check_targets, negated, same_kind, to_array


def precision_at_k(scores: Float[ArrayT, "N C"], targets: Shaped[ArrayT, "N C"], k: int) -> Float64[ArrayT, " N"]:
    """Share of labels among the k classes that each image ranks highest, NaN for an image without a known target.

    Divided by k as published, also where the image has fewer than k labels or known classes: 1 may be out of reach. Its mean
    over images is the overall precision of "the k best" (`OP_exact3` of the summary) where all is known and nothing ties.

    Args:
        scores: Any float dtype, any monotone scale; only their order within an image counts. Equal scores are taken in all
            orders, each as likely: what is given is the expectation.
        targets: 1 present, 0 absent, NaN unknown; unknown classes are left out of the ranking.
        k: At least 1.

    Returns:
        float64 in [0, 1], of the kind and on the device of `scores`.

    Raises:
        InputError: k below 1, shapes do not fit, a score is not finite, a target is not 1, 0 or NaN.
    """
    s, t = _checked(scores, targets, k)
    hits = _chances(s, t)[:, :k].sum(axis=1)
    return same_kind(np.where((t == t).any(axis=1), hits / k, np.nan), like=scores)


def ndcg_at_k(scores: Float[ArrayT, "N C"], targets: Shaped[ArrayT, "N C"], k: int) -> Float64[ArrayT, " N"]:
    """Normalised discounted cumulative gain of each image's first k ranks, NaN for an image without a known positive.

    A label at rank r gains `1 / log2(r + 1)`; divided by what the image's labels gain on the first ranks (at most k).
    scikit-learn's `ndcg_score` gives 0, not NaN, to an image without positives.

    Args, Returns, Raises: As `precision_at_k`.

    Source: Järvelin & Kekäläinen, "Cumulated Gain-Based Evaluation of IR Techniques", TOIS 2002; equal scores as in
    McSherry & Najork, "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores",
    ECIR 2008.
    """
    s, t = _checked(scores, targets, k)
    discounts = 1 / np.log2(np.arange(min(k, s.shape[1])) + 2)
    ideal = np.concatenate([[np.nan], discounts.cumsum()])
    num_placed = np.minimum((t == 1).sum(axis=1), len(discounts))
    return same_kind(_chances(s, t)[:, :k] @ discounts / ideal[num_placed], like=scores)


def _checked(
    scores: Float[ArrayT, "N C"], targets: Shaped[ArrayT, "N C"], k: int
) -> tuple[Float[np.ndarray, "N C"], Shaped[np.ndarray, "N C"]]:
    if k < 1:
        raise InputError(f"k {k}: expected at least 1")
    s, t = to_array(scores), to_array(targets)
    check_scores(s)
    check_targets(t, s.shape)
    return s, t


def _chances(scores: Float[np.ndarray, "N C"], targets: Shaped[np.ndarray, "N C"]) -> Float64[np.ndarray, "N C"]:
    """How probable it is that a label stands at each rank, from the best: the share of labels among the classes that tie.

    The ranks behind the known classes hold none.
    """
    num_classes = scores.shape[1]
    ranked = np.where(targets == targets, negated(scores), np.inf)
    order = ranked.argsort(axis=1)
    ranked = np.take_along_axis(ranked, order, axis=1)
    # How many labels stand before each place, and where the ties of each place begin and end.
    found = np.pad(np.take_along_axis(targets == 1, order, axis=1).cumsum(axis=1), ((0, 0), (1, 0)))
    border = np.pad(ranked[:, 1:] != ranked[:, :-1], ((0, 0), (1, 1)), constant_values=True)
    places = np.arange(num_classes)
    begin = np.maximum.accumulate(np.where(border[:, :-1], places, 0), axis=1)
    end = np.minimum.accumulate(np.where(border[:, 1:], places + 1, num_classes)[:, ::-1], axis=1)[:, ::-1]
    labels = np.take_along_axis(found, end, axis=1) - np.take_along_axis(found, begin, axis=1)
    return labels / (end - begin)
