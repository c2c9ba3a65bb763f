"""Precision, recall and F1 of yes/no decisions, per class (C...) and overall (O...)."""

import math
from math import nan
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Shaped

from mlvision.errors import InputError
from mlvision.metrics.inputs import ArrayT, check_scores, check_targets, same_kind, to_array
from mlvision.space import reaches


class FMeasures(NamedTuple):
    """The field's seven numbers in [0, 1]; NaN where no class has a known positive.

    Attributes:
        CP: precision, mean over classes. A class that is never predicted counts 0.
        CR: recall, mean over classes.
        CF1: harmonic mean of CP and CR (ML-GCN, CSRA).
        CF1_mean: mean over classes of their F1 (ASL, DualCoOp). The literature prints it as CF1 too.
        OP: precision of all decisions taken together.
        OR: recall of all decisions taken together.
        OF1: harmonic mean of OP and OR.
        num_skipped: classes without a known positive. The class means leave them out, as mAP does; their false
            positives count in OP.
    """

    CP: float
    CR: float
    CF1: float
    CF1_mean: float
    OP: float
    OR: float
    OF1: float
    num_skipped: int


class ClassMeasures(NamedTuple):
    """Precision, recall and F1 of each class, all three NaN for a class without a known positive."""

    precision: Float64[np.ndarray, " C"]
    recall: Float64[np.ndarray, " C"]
    f1: Float64[np.ndarray, " C"]


def decide(scores: Float[ArrayT, "N C"], *, threshold: float | None, top_k: int | None = None) -> Bool[ArrayT, "N C"]:
    """Say which labels are predicted: those at or above a threshold, the k best of each image, or both.

    Args:
        scores: Probabilities, or logits with a threshold on logits.
        threshold: `score >= threshold` in the dtype of the scores (see `reaches`), or None.
        top_k: At most this many labels an image, the best ones; exactly this many without a threshold. Of equal scores
            the lower class index wins. All classes are eligible, also where an image's label is unknown; a k above
            the number of classes takes all.

    Raises:
        InputError: Neither rule given, a threshold of NaN, k below 1, or a score is not finite.
    """
    if threshold is None and top_k is None:
        raise InputError("threshold and top_k are both None: expected at least one rule of decision")
    if threshold is not None and math.isnan(threshold):
        raise InputError("threshold nan: expected a number to compare the scores with")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k {top_k}: expected at least 1")
    s = to_array(scores)
    check_scores(s)
    decisions = np.ones(s.shape, dtype=bool) if threshold is None else to_array(reaches(scores, threshold))
    if top_k is not None and top_k < s.shape[1]:
        kth_best = np.partition(s, -top_k, axis=1)[:, -top_k, None]
        better, tied = s > kth_best, s == kth_best
        room = top_k - better.sum(axis=1, keepdims=True)
        decisions &= better | (tied & (tied.cumsum(axis=1) <= room))
    return same_kind(decisions, like=scores)


def f_measures(decisions: Bool[ArrayT, "N C"], targets: Shaped[ArrayT, "N C"]) -> FMeasures:
    """Score decisions (see `decide`); unknown labels (NaN) count neither as predicted nor as missed.

    Raises:
        InputError: Shapes do not fit, decisions that are no booleans, or a target is not 1, 0 or NaN.
    """
    hits, predicted, positives = count(decisions, targets)
    scored = positives > 0
    num_skipped = int((~scored).sum())
    if not scored.any():
        return FMeasures(nan, nan, nan, nan, nan, nan, nan, num_skipped)
    precision, recall, f1 = (values[scored].mean() for values in _per_class(hits, predicted, positives))
    overall_precision, overall_recall = hits.sum() / max(predicted.sum(), 1), hits.sum() / positives.sum()
    return FMeasures(
        CP=float(precision),
        CR=float(recall),
        CF1=_harmonic(precision, recall),
        CF1_mean=float(f1),
        OP=float(overall_precision),
        OR=float(overall_recall),
        OF1=_harmonic(overall_precision, overall_recall),
        num_skipped=num_skipped,
    )


def class_measures(decisions: Bool[ArrayT, "N C"], targets: Shaped[ArrayT, "N C"]) -> ClassMeasures:
    """Score the decisions of each class; the means of what is not NaN are CP, CR and CF1_mean.

    Raises:
        InputError: Shapes do not fit, decisions that are no booleans, or a target is not 1, 0 or NaN.
    """
    return _per_class(*count(decisions, targets))


def count(
    decisions: Bool[ArrayT, "N C"], targets: Shaped[ArrayT, "N C"]
) -> tuple[Int64[np.ndarray, " C"], Int64[np.ndarray, " C"], Int64[np.ndarray, " C"]]:
    """Count hits, predictions and positives of each class among the known labels."""
    d, t = to_array(decisions), to_array(targets)
    if d.dtype != bool:
        raise InputError(f"decisions of {d.dtype}: expected booleans, as decide() gives them")
    check_targets(t, d.shape)
    positive = t == 1
    return (d & positive).sum(axis=0), (d & (t == t)).sum(axis=0), positive.sum(axis=0)


def _per_class(
    hits: Int64[np.ndarray, " C"], predicted: Int64[np.ndarray, " C"], positives: Int64[np.ndarray, " C"]
) -> ClassMeasures:
    support = np.where(positives > 0, positives, np.nan)
    return ClassMeasures(
        precision=np.where(positives > 0, hits / np.maximum(predicted, 1), np.nan),
        recall=hits / support,
        f1=2 * hits / (predicted + support),
    )


def _harmonic(a: float, b: float) -> float:
    return float(2 * a * b / (a + b)) if a + b > 0 else 0.0
