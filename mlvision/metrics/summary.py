"""Everything that the field reports of one evaluation, as one flat dict and one row a class."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mlvision.errors import InputError
from mlvision.metrics.average_precision import FLAVOURS, average_precision, average_precisions, mean_average_precision
from mlvision.metrics.f_measures import class_measures, decide, f_measures
from mlvision.metrics.inputs import ArrayT, check_scores, to_array
from mlvision.space import LabelSpace

Threshold = float | Float[np.ndarray | Tensor, "..."]


def multilabel_summary(
    logits: Float[ArrayT, "N C"],
    targets: Shaped[ArrayT, "N C"],
    *,
    threshold: Threshold = 0.5,
    top_k: int = 3,
    space: LabelSpace | None = None,
) -> dict[str, float | int]:
    """Sum up an evaluation in numbers between 0 and 1, named as papers print them.

    Keys: `mAP` (plain), `mAP_envelope`, `mAP_voc11`; `CP CR CF1 CF1_mean OP OR OF1` for the labels that the space decides
    to be present (with probability `>= threshold`; of classes that exclude each other the best), the same with `_top3` (at
    most the 3 best of them) and with `_exact3` (the 3 best, no threshold; the number is `top_k`); `threshold` (NaN: each
    class has its own), `num_images`, `num_classes`, `num_skipped_classes` (no known positive: not in any class mean) and
    `num_unknown` (labels left out).

    What is undefined is a float NaN, never None, so that values can be compared and logged as they are. Whoever writes
    strict JSON turns NaN into null.

    Args:
        logits: Raw outputs. The threshold is applied to them, at `log(threshold / (1 - threshold))`, so that no
            sigmoid is rounded.
        targets: 1 present, 0 absent, NaN unknown.
        threshold: Probability in (0, 1), one or one per class.
        top_k: Labels an image in the top-k rules.
        space: What makes probabilities of the logits and how these decide; None: a sigmoid of each class. The average
            precisions rank the logits themselves.

    Raises:
        InputError: As `average_precision` and `decide`; a threshold outside (0, 1), thresholds of another number than the
            classes, or a space of other classes.
    """
    odds, decided = _decisions(logits, threshold, space)
    summary: dict[str, float | int] = {}
    num_skipped = 0
    for flavour, ap in zip(FLAVOURS, average_precisions(logits, targets), strict=True):
        name = "mAP" if flavour == "plain" else f"mAP_{flavour}"
        summary[name], num_skipped = mean_average_precision(ap)
    best = decide(odds, threshold=None, top_k=top_k)
    for suffix, decisions in {"": decided, f"_top{top_k}": decided & best, f"_exact{top_k}": best}.items():
        measures = f_measures(decisions, targets)._asdict()
        del measures["num_skipped"]  # the same classes as for mAP
        summary |= {name + suffix: value for name, value in measures.items()}
    num_images, num_classes = logits.shape
    return summary | {
        "threshold": float(threshold) if np.ndim(threshold) == 0 else math.nan,
        "num_images": num_images,
        "num_classes": num_classes,
        "num_skipped_classes": num_skipped,
        "num_unknown": int(np.isnan(to_array(targets)).sum()),
    }


def per_class_table(
    logits: Float[ArrayT, "N C"],
    targets: Shaped[ArrayT, "N C"],
    classes: Sequence[str],
    *,
    threshold: Threshold = 0.5,
    space: LabelSpace | None = None,
) -> list[dict[str, str | float | int]]:
    """Give one row a class, in the order of `classes`; NaN where the class has no known positive.

    Keys: `class`, `num_positive`, `num_negative`, `num_unknown`, `ap` (plain), and of what the space decides
    `precision`, `recall`, `f1`.

    Raises:
        InputError: As `multilabel_summary`; not one name for each class.
    """
    check_names(classes, logits.shape[1])
    ap = to_array(average_precision(logits, targets))
    measures = class_measures(_decisions(logits, threshold, space)[1], targets)
    t = to_array(targets)
    supports = [(t == 1).sum(axis=0), (t == 0).sum(axis=0), (t != t).sum(axis=0)]
    keys = ("class", "num_positive", "num_negative", "num_unknown", "ap", "precision", "recall", "f1")
    columns = [np.asarray(column).tolist() for column in (*supports, ap, *measures)]
    return [dict(zip(keys, row, strict=True)) for row in zip(classes, *columns, strict=True)]


def _decisions(
    logits: Float[ArrayT, "N C"], threshold: Threshold, space: LabelSpace | None
) -> tuple[Float[ArrayT, "N C"], Bool[ArrayT, "N C"]]:
    """Log-odds, and the labels that they decide at the threshold's."""
    num_classes = logits.shape[1]
    if np.ndim(threshold) and np.shape(threshold) != (num_classes,):
        raise InputError(
            f"threshold: expected one, or one for each of {num_classes} classes, got {np.shape(threshold)}"
        )
    cut = np.array(list(map(_logit, np.ravel(threshold).tolist()))) if np.ndim(threshold) else _logit(float(threshold))
    check_scores(to_array(logits))
    space = LabelSpace.of(space, logits.shape[1])
    odds = space.log_odds(logits)
    return odds, space.decide(odds, cut)


def check_names(classes: Sequence[str], num_classes: int) -> None:
    """Refuse a list of names that does not fit the logits."""
    if len(classes) != num_classes:
        raise InputError(f"classes: {len(classes)} names for logits of {num_classes} classes")


def _logit(probability: float) -> float:
    if not 0 < probability < 1:
        raise InputError(f"threshold {probability}: expected a probability between 0 and 1, neither of them included")
    return math.log(probability) - math.log1p(-probability)
