"""Whether the evidence that a map shows is what the model uses: how scores fall as an image's patches are removed.

The scores come from elsewhere (study/measure.py runs the model). A deletion curve c_0, ..., c_K is one label's score on
the whole image, c_0, and after each of K equal steps; at c_K nothing of the image is left. MoRF removes the most relevant
patches first, LeRF the least relevant. Everything is computed in float64 and given as NumPy arrays.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer, Shaped
from torch import Tensor

from mlvision.errors import InputError
from mlvision.metrics.inputs import (
    ArrayT,
    check_maps,
    check_targets,
    flattened,
    negated,
    same_kind,
    to_array,
)


class DeletionMeasures(NamedTuple):
    """What deletion curves come to, one row a label of an image. Areas are the curve's mean over the steps, in its units.

    Attributes:
        morf: area under the MoRF curve; lower is better.
        lerf: area under the LeRF curve; higher is better.
        srg: lerf - morf, the symmetric relevance gain; the removal's own effect on the score cancels in it.
        insertion: area under the curve that puts the most relevant patches back first, into an image of which nothing is
            left. That is the LeRF curve from its end to its start: after k steps the K - k steps of the least relevant
            patches are still missing. So its area is lerf, and needs no forward of its own.
        aopc: mean over k = 1, ..., K of c_0 - c_k of the MoRF curve; higher is better.
        normalised_morf, normalised_lerf, normalised_srg: the same of (c_k - c_K) / (c_0 - c_K), each curve from 1 to 0 by
            its own ends. NaN where an end is not further than eps from the other. Where the score rises on the way
            (c_0 < c_K) the division turns the sign: there a positive srg becomes a negative normalised_srg.
    """

    morf: Float64[np.ndarray, " N"]
    lerf: Float64[np.ndarray, " N"]
    srg: Float64[np.ndarray, " N"]
    insertion: Float64[np.ndarray, " N"]
    aopc: Float64[np.ndarray, " N"]
    normalised_morf: Float64[np.ndarray, " N"]
    normalised_lerf: Float64[np.ndarray, " N"]
    normalised_srg: Float64[np.ndarray, " N"]


class CrossLabelMatrix(NamedTuple):
    """What removing one label's evidence does to every label.

    Attributes:
        drops: in row a and column b, the mean fall of b's score; NaN in the rows of labels that were never measured.
        counts: how many maps of label a the mean of row a is over.
    """

    drops: Float64[np.ndarray, "C C"]
    counts: Int64[np.ndarray, " C"]


def deletion_measures(
    most_relevant_first: Float[np.ndarray | Tensor, "N points"],
    least_relevant_first: Float[np.ndarray | Tensor, "N points"],
    eps: float = 1e-3,
) -> DeletionMeasures:
    """Sum up the deletion curves of each row.

    Args:
        most_relevant_first, least_relevant_first: c_0 to c_K, logits or probabilities, the second in exactly the reverse
            order of patches of the first, with as many removed at its step k as the first keeps at its step K - k.
        eps: A range |c_0 - c_K| up to this is too small to normalise by.

    Raises:
        InputError: Curves of different shapes, without a step, or not finite, or a negative eps.

    Source: Samek et al., "Evaluating the Visualization of What a Deep Neural Network Has Learned", TNNLS 2017 (AOPC);
        Petsiuk et al., "RISE", BMVC 2018 (deletion, insertion); Blücher et al., "Decoupling Pixel Flipping and Occlusion
        Strategy for Consistent XAI Benchmarks", 2024 (SRG).

    DEVIATION: AOPC divides by K rather than K + 1; the term k = 0 is always 0 and no step.
    """
    if not 0 <= eps < np.inf:
        raise InputError(f"eps {eps}: expected 0 or more, finite")
    curves = [to_array(curve).astype(np.float64) for curve in (most_relevant_first, least_relevant_first)]
    if curves[0].shape != curves[1].shape:
        raise InputError(f"curves of shapes {curves[0].shape} and {curves[1].shape}: expected one shape")
    if curves[0].ndim != 2 or curves[0].shape[1] < 2:
        raise InputError(f"curves {curves[0].shape}: expected [rows, K + 1] with at least one step")
    for name, curve in zip(("most_relevant_first", "least_relevant_first"), curves, strict=True):
        bad = np.flatnonzero(~np.isfinite(curve).all(axis=1))
        if bad.size:
            raise InputError(
                f"{name}: {bad.size} of {len(curve)} curves hold NaN or infinity, the first in row {bad[0]}"
            )
    morf, lerf = (_area(curve) for curve in curves)
    normalised_morf, normalised_lerf = (_area(_normalised(curve, eps)) for curve in curves)
    first = curves[0]
    return DeletionMeasures(
        morf=morf,
        lerf=lerf,
        srg=lerf - morf,
        insertion=lerf.copy(),
        aopc=(first[:, :1] - first[:, 1:]).mean(axis=1),
        normalised_morf=normalised_morf,
        normalised_lerf=normalised_lerf,
        normalised_srg=normalised_lerf - normalised_morf,
    )


def _area(curve: Float64[np.ndarray, "N points"]) -> Float64[np.ndarray, " N"]:
    """By trapezoids, the curve's length counting as 1."""
    return ((curve[:, 1:] + curve[:, :-1]) / 2).mean(axis=1)


def _normalised(curve: Float64[np.ndarray, "N points"], eps: float) -> Float64[np.ndarray, "N points"]:
    span = curve[:, 0] - curve[:, -1]
    span = np.where(np.abs(span) > eps, span, np.nan)
    return (curve - curve[:, -1:]) / span[:, None]


def patch_order(maps: Float[ArrayT, "N h w"]) -> Int64[ArrayT, "N cells"]:
    """Give the cells of each map from the highest to the lowest, as indices into the flattened map (row by row).

    Equal cells keep their order, so a constant map removes its cells row by row; every method is treated alike. The least
    relevant first is the reverse of the result. The first k of a row are the patches to remove at k; the rank of each cell
    is the result's own argsort.

    Args:
        maps: Any sign; one value a patch, negative ones last.

    Returns:
        int64, of the kind and on the device of `maps`.

    Raises:
        InputError: Maps that are no [N, h, w] or not finite.
    """
    values = to_array(maps)
    check_maps(values)
    order = np.argsort(negated(flattened(values)), axis=1, kind="stable")
    return same_kind(order.astype(np.int64), like=maps)


def cross_label_drops(
    scores_before: Float[np.ndarray | Tensor, "B C"],
    scores_after: Float[np.ndarray | Tensor, "B L C"],
    labels: Integer[np.ndarray | Tensor, "B L"],
) -> Float64[np.ndarray, "B L C"]:
    """Give how far every score falls when the evidence of each of an image's labels is removed: before - after.

    Args:
        scores_before: Of the whole images.
        scores_after: Of each image without the evidence of its label l.
        labels: Class indices; negative in empty places, whose scores do not matter.

    Returns:
        NaN in empty places.

    Raises:
        InputError: Shapes that do not fit, a label beyond the classes, or a score that is not finite.
    """
    before, after, chosen = (to_array(values) for values in (scores_before, scores_after, labels))
    _check_labels(after, chosen, "scores_after")
    if before.shape != (len(after), after.shape[2]):
        raise InputError(f"scores_before {before.shape}: expected {(len(after), after.shape[2])} as in scores_after")
    valid = chosen >= 0
    for name, scores in (("scores_before", before[valid.any(axis=1)]), ("scores_after", after[valid])):
        if not np.isfinite(scores).all():
            raise InputError(f"{name}: holds NaN or infinity, expected finite scores")
    drops = before.astype(np.float64)[:, None] - after
    return np.where(valid[:, :, None], drops, np.nan)


def specificity(
    drops: Float[np.ndarray | Tensor, "B L C"],
    labels: Integer[np.ndarray | Tensor, "B L"],
    present: Shaped[np.ndarray | Tensor, "B C"],
) -> Float64[np.ndarray, "B L"]:
    """Give how much more a label's own score falls without its evidence than those of the image's other labels do.

    That is D[a, a] minus the mean of D[a, b] over the other labels b that are present. The label itself need not be: a
    false positive is measured against what is there. 0 is what a map scores that does not tell labels apart.

    Args:
        drops: As `cross_label_drops` gives them.
        labels: Class indices; negative in empty places.
        present: 1 or True present, 0 or False absent, NaN unknown, which counts as not present.

    Returns:
        NaN in empty places and where no other label is present.

    Raises:
        InputError: Shapes that do not fit, a label beyond the classes, a drop of a label that is not finite, or an entry of
            present that is not 1, 0 or NaN.
    """
    fall, chosen, there = to_array(drops).astype(np.float64), to_array(labels), to_array(present)
    _check_drops(fall, chosen)
    check_targets(there, (len(fall), fall.shape[2]))
    own = np.take_along_axis(fall, chosen.clip(min=0)[:, :, None], axis=2)[:, :, 0]
    others = (there == 1)[:, None] & (np.arange(fall.shape[2]) != chosen[:, :, None])
    count = others.sum(axis=2)
    mean = np.where(others, fall, 0.0).sum(axis=2) / np.where(count > 0, count, np.nan)
    return np.where(chosen >= 0, own - mean, np.nan)


def cross_label_matrix(
    drops: Float[np.ndarray | Tensor, "B L C"], labels: Integer[np.ndarray | Tensor, "B L"], num_classes: int
) -> CrossLabelMatrix:
    """Give the mean fall of every label's score when each label's evidence is removed, over the images where it was.

    A high value beside the diagonal says that label b is seen in what label a is seen in.

    Args:
        drops: As `cross_label_drops` gives them.
        labels: Class indices; negative in empty places.

    Raises:
        InputError: Shapes that do not fit, a label beyond the classes, or a drop of a label that is not finite.
    """
    fall, chosen = to_array(drops), to_array(labels)
    _check_drops(fall, chosen)
    if fall.shape[2] != num_classes:
        raise InputError(f"drops {fall.shape}: expected those of {num_classes} classes")
    valid = chosen >= 0
    total = np.zeros((num_classes, num_classes))
    np.add.at(total, chosen[valid], fall[valid])
    counts = np.bincount(chosen[valid], minlength=num_classes)
    return CrossLabelMatrix(total / np.where(counts > 0, counts, np.nan)[:, None], counts)


def _check_drops(drops: Shaped[np.ndarray, "..."], labels: Shaped[np.ndarray, "..."]) -> None:
    _check_labels(drops, labels, "drops")
    if not np.isfinite(drops[labels >= 0]).all():
        raise InputError("drops: hold NaN or infinity where there is a label")


def _check_labels(values: Shaped[np.ndarray, "..."], labels: Shaped[np.ndarray, "..."], name: str) -> None:
    """Refuse labels that do not belong to values of [B, L, C]."""
    if values.ndim != 3 or labels.shape != values.shape[:2]:
        raise InputError(f"{name} {values.shape} and labels {labels.shape}: expected [B, L, C] and [B, L]")
    if labels.size and labels.max() >= values.shape[2]:
        raise InputError(f"labels: {labels.max()} is beyond the {values.shape[2]} classes")
