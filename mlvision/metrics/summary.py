"""Everything that the field reports of one evaluation, as one flat dict and one row a class."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped

from mlvision.errors import InputError
from mlvision.metrics.average_precision import FLAVOURS, average_precision, average_precisions, mean_average_precision
from mlvision.metrics.f_measures import class_measures, decide, f_measures
from mlvision.metrics.inputs import ArrayT, check_scores, same_kind, to_array


def multilabel_summary(
    logits: Float[ArrayT, "N C"],
    targets: Shaped[ArrayT, "N C"],
    *,
    threshold: float = 0.5,
    top_k: int = 3,
    activation: str = "sigmoid",
) -> dict[str, float | int]:
    """Sum up an evaluation in numbers between 0 and 1, named as papers print them.

    Keys: `mAP` (plain), `mAP_envelope`, `mAP_voc11`; `CP CR CF1 CF1_mean OP OR OF1` for labels with probability
    `>= threshold`, the same with `_top3` (at most the 3 best of them) and with `_exact3` (the 3 best, no threshold; the
    number is `top_k`); `threshold`, `num_images`, `num_classes`, `num_skipped_classes` (no known positive: not in any
    class mean) and `num_unknown` (labels left out).

    What is undefined is a float NaN, never None, so that values can be compared and logged as they are. Whoever writes
    strict JSON turns NaN into null.

    Args:
        logits: Raw outputs. The threshold is applied to them, at `log(threshold / (1 - threshold))`, so that no
            sigmoid is rounded.
        targets: 1 present, 0 absent, NaN unknown.
        threshold: Probability in (0, 1).
        top_k: Labels an image in the top-k rules.
        activation: What makes probabilities of the logits: sigmoid or softmax. It decides what reaches the threshold; the
            average precisions rank the logits themselves.

    Raises:
        InputError: As `average_precision` and `decide`; a threshold outside (0, 1).
    """
    cut = _logit(threshold)
    odds = log_odds(logits, activation)
    summary: dict[str, float | int] = {}
    num_skipped = 0
    for flavour, ap in zip(FLAVOURS, average_precisions(logits, targets), strict=True):
        name = "mAP" if flavour == "plain" else f"mAP_{flavour}"
        summary[name], num_skipped = mean_average_precision(ap)
    rules = {"": (cut, None), f"_top{top_k}": (cut, top_k), f"_exact{top_k}": (None, top_k)}
    for suffix, (at, k) in rules.items():
        measures = f_measures(decide(odds, threshold=at, top_k=k), targets)._asdict()
        del measures["num_skipped"]  # the same classes as for mAP
        summary |= {name + suffix: value for name, value in measures.items()}
    num_images, num_classes = logits.shape
    return summary | {
        "threshold": threshold,
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
    threshold: float = 0.5,
    activation: str = "sigmoid",
) -> list[dict[str, str | float | int]]:
    """Give one row a class, in the order of `classes`; NaN where the class has no known positive.

    Keys: `class`, `num_positive`, `num_negative`, `num_unknown`, `ap` (plain), and at probability `>= threshold`
    `precision`, `recall`, `f1`.

    Raises:
        InputError: As `multilabel_summary`; not one name for each class.
    """
    check_names(classes, logits.shape[1])
    ap = to_array(average_precision(logits, targets))
    measures = class_measures(decide(log_odds(logits, activation), threshold=_logit(threshold)), targets)
    t = to_array(targets)
    supports = [(t == 1).sum(axis=0), (t == 0).sum(axis=0), (t != t).sum(axis=0)]
    keys = ("class", "num_positive", "num_negative", "num_unknown", "ap", "precision", "recall", "f1")
    columns = [np.asarray(column).tolist() for column in (*supports, ap, *measures)]
    return [dict(zip(keys, row, strict=True)) for row in zip(classes, *columns, strict=True)]


def log_odds(logits: Float[ArrayT, "N C"], activation: str) -> Float[ArrayT, "N C"]:
    """log(p / (1 - p)) of each class's probability p: what a threshold is compared with, without rounding p near 1.

    Raises:
        InputError: An activation that is neither sigmoid nor softmax; of a softmax, logits that are no finite table.
    """
    if activation == "sigmoid":
        return logits
    if activation != "softmax":
        raise InputError(f"activation: expected sigmoid or softmax, got '{activation}'")
    z = to_array(logits).astype(np.float64)
    check_scores(z)
    if z.size == 0:
        return same_kind(z, logits)
    z = z - z.max(axis=1, keepdims=True)
    best, powers = z == 0, np.exp(z)
    num_best, rest = best.sum(axis=1, keepdims=True), np.where(best, 0, powers).sum(axis=1, keepdims=True)
    # Of all classes but one. Taken from the sum of all, a small rest would be rounded away beside the best class.
    others = rest + np.where(best, num_best - 1, num_best - powers)
    least = np.finfo(others.dtype).tiny  # finite where a class is alone
    return same_kind(z - np.log(np.maximum(others, least)), logits)


def check_names(classes: Sequence[str], num_classes: int) -> None:
    """Refuse a list of names that does not fit the logits."""
    if len(classes) != num_classes:
        raise InputError(f"classes: {len(classes)} names for logits of {num_classes} classes")


def _logit(probability: float) -> float:
    if not 0 < probability < 1:
        raise InputError(f"threshold {probability}: expected a probability between 0 and 1, neither of them included")
    return math.log(probability) - math.log1p(-probability)
