"""LabelPooling: what a label map says of the part of the image that a view shows.

Source: Yun et al., "Re-labeling ImageNet: from Single to Multi-Labels, from Global to Localized Labels", CVPR 2021, section
3.3: RoIAlign of the map on the crop's box.

DEVIATION: the published loader makes a dense map of all classes and pools that; here only what is stored is touched, which
is the same sum: a pooled value is the fill's mean over the box plus the weighted difference of each stored value to it. The
published fill of 0 is not built in: what a class that is not stored is worth belongs to the map.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mlvision.errors import InputError, check_fields
from mlvision.label_maps.geometry import boxes_in_grid, orient, overlaps, roi_weights
from mlvision.types import CALIBRATIONS, CropBox, LabelMap

OPERATORS = ("mean_logit", "mean_probability", "max", "log_sum_exp", "top_q")
# Values that one step of a pooling may hold: few where that saves memory, many where each step costs its launches.
_CHUNK = {"cpu": 3 << 13, "cuda": 1 << 24}


@dataclass(frozen=True)
class Pooling:
    """How the cells that a view shows become one value per class.

    Attributes:
        operator: how the cells of a box (or bin) become one value. mean_logit and mean_probability: their mean, by the
            weights of RoIAlign; each takes a map of that kind. The others weigh a cell by the area of it that is shown,
            because RoIAlign's points also reach cells up to half a cell beyond the box, which would count in full. max: the
            highest of the cells that are shown. log_sum_exp: `log(sum w exp(r v)) / r`, between the mean (small r) and the
            maximum (large r). top_q: the mean of the highest share of the cells that are shown.
        sharpness: r of log_sum_exp.
        top_share: the share of top_q, above 0 to 1; at least one cell.
        temperature: divides logits before they become probabilities.
        calibration: what makes probabilities of mass and attribution, which are refused without it; see
            `LabelMap.as_kind`.

    Raises:
        InputError: no such operator or calibration, or a number out of range.
    """

    operator: str = "mean_logit"
    sharpness: float = 10.0
    top_share: float = 0.25
    temperature: float = 1.0
    calibration: str = ""

    def __post_init__(self) -> None:
        rules = (
            ("operator", self.operator in OPERATORS, f"one of {', '.join(OPERATORS)}"),
            ("sharpness", self.sharpness > 0, "more than 0"),
            ("top_share", 0 < self.top_share <= 1, "a number above 0, at most 1"),
            ("temperature", self.temperature > 0, "more than 0"),
            ("calibration", self.calibration in ("", *CALIBRATIONS), f"one of {', '.join(CALIBRATIONS)}, or nothing"),
        )
        check_fields(self, "", rules)

    @property
    def is_mean(self) -> bool:
        """Whether cells are averaged, which takes a map of the kind that the operator names."""
        return self.operator.startswith("mean_")


def pool_label_map(
    label_map: LabelMap,
    view: CropBox,
    num_classes: int,
    pooling: Pooling | None = None,
    *,
    operator: str = "mean_logit",
    output_size: int = 1,
    hole: Float[Tensor, "B 4"] | None = None,
    deterministic: bool = False,
) -> Float[Tensor, "B C"] | Float[Tensor, "B C S S"]:
    """Every class's value in each view, in the kind of the map.

    >>> label_map = LabelMap(torch.tensor([[[[0.25, 0.75]]]]))
    >>> right_half = CropBox(torch.tensor([[0.5, 0.0, 1.0, 1.0]]))
    >>> pool_label_map(label_map, right_half, 1, operator="max")
    tensor([[0.7500]])

    Args:
        label_map: of the full images, in the order of the views.
        pooling: how cells become one value; its temperature and calibration are for `pool_probabilities` only.
        operator: short for `Pooling(operator)`, if no pooling is given.
        output_size: S: 1 for one value a view, more for a grid over it (with the view's flip and turns).
        hole: `[B, 4]` x1, y1, x2, y2 in [0, 1] of the full image: a part of each box that something covers, as in CutMix.
            Cells then count by the area of them that is left, in place of RoIAlign's points. For output_size=1.
        deterministic: the same sum to the last bit on every call, on a GPU too.

    Raises:
        InputError: as `Pooling`; a mean of another kind than the map's, maps of other classes, or an argument out of range.
    """
    pooling = Pooling(operator) if pooling is None else pooling
    _check(label_map, view, num_classes, pooling, output_size)
    values, precision = label_map.values, torch.promote_types(label_map.values.dtype, torch.float32)
    fill = label_map.fills(precision)
    grid, extent = (values.shape[2], values.shape[3]), label_map.extent
    if hole is not None and output_size != 1:
        raise InputError(f"hole: expected output_size=1 with it, got {output_size}")
    boxes = boxes_in_grid(view.boxes, grid, extent)
    if hole is None and pooling.is_mean:
        weights = _roi_align(boxes, grid, output_size)
    else:
        weights = _areas(boxes, grid, output_size, None if hole is None else boxes_in_grid(hole, grid, extent))
    weights = weights.to(precision)

    def pool(images: slice) -> Tensor:
        part = weights[images]
        v, f = values[images].to(precision).flatten(2), fill[images].flatten(1)
        ids = None if label_map.ids is None else label_map.ids[images].long()
        if ids is not None and ids.ndim == 4:
            ids = ids.flatten(2)
        if pooling.operator == "max":
            return _maximum(v, ids, f, part, num_classes)
        if pooling.operator == "top_q":
            return _top_share(v, ids, f, part, num_classes, pooling.top_share)
        if pooling.operator == "log_sum_exp":
            return _log_sum_exp(v, ids, f, part, num_classes, pooling.sharpness, deterministic)
        return _mean(v, ids, f, part, num_classes, deterministic)

    bins = output_size * output_size
    size = bins * max(values[0].numel() if len(values) else 1, num_classes)
    with torch.autocast(values.device.type, enabled=False):  # targets, in the precision that they are stored in
        pooled = _in_parts(pool, len(values), size, _CHUNK[values.device.type])
    if output_size == 1:
        return pooled.squeeze(2)
    return orient(pooled.unflatten(2, (output_size, output_size)), view)


def pool_probabilities(
    label_map: LabelMap,
    view: CropBox,
    num_classes: int,
    pooling: Pooling,
    *,
    output_size: int = 1,
    hole: Float[Tensor, "B 4"] | None = None,
) -> Float[Tensor, "B C"] | Float[Tensor, "B C S S"]:
    """The probability of every class in each view: that of the pooled logits (mean_logit), or the pooled probabilities of
    the cells (every other operator).

    Args:
        output_size, hole: as `pool_label_map`.

    Raises:
        InputError: see `pool_label_map` and `LabelMap.as_kind`.
    """
    if pooling.operator == "mean_logit":
        pooled = pool_label_map(label_map, view, num_classes, pooling, output_size=output_size, hole=hole)
        cells = pooled if pooled.ndim == 4 else pooled[..., None, None]
        logits = LabelMap(cells, None, "logit", groups=label_map.groups)
        return logits.as_kind("probability", temperature=pooling.temperature).values.view_as(pooled)
    probable = label_map.as_kind("probability", temperature=pooling.temperature, calibration=pooling.calibration)
    pooled = pool_label_map(probable, view, num_classes, pooling, output_size=output_size, hole=hole)
    return pooled.clamp(0, 1)  # sums of weights are rounded; a box without any cell has no maximum


def _check(label_map: LabelMap, view: CropBox, num_classes: int, pooling: Pooling, output_size: int) -> None:
    operator = pooling.operator
    if pooling.is_mean and operator != f"mean_{label_map.kind}":
        raise InputError(f"operator: {operator} of a map of {label_map.kind}; convert it with LabelMap.as_kind first")
    if label_map.ids is None and label_map.values.shape[1] != num_classes:
        found = label_map.values.shape[1]
        hint = (
            "; maps of annotated areas, two a class, are for method.target=oracle" if found == 2 * num_classes else ""
        )
        raise InputError(f"label maps of {found} classes, expected {num_classes}{hint}")
    # On a GPU the question would wait for it.
    ids = label_map.ids
    if ids is not None and ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= num_classes:
        raise InputError(f"label maps with class {int(ids.max())}, expected ids below {num_classes}")
    if len(view.boxes) != len(label_map.values):
        raise InputError(f"{len(view.boxes)} views and {len(label_map.values)} label maps: expected one for each")
    if output_size < 1:
        raise InputError(f"output_size: expected 1 or more, got {output_size}")


def _roi_align(boxes: Float[Tensor, "B 4"], grid: tuple[int, int], output_size: int) -> Float64[Tensor, "B Q P"]:
    """Weights of the P = h * w cells in each of the Q = S * S bins."""
    x1, y1, x2, y2 = boxes.unbind(1)
    rows, columns = roi_weights(y1, y2, grid[0], output_size), roi_weights(x1, x2, grid[1], output_size)
    return torch.einsum("bph,bqw->bpqhw", rows, columns).flatten(3).flatten(1, 2)


def _areas(
    boxes: Float[Tensor, "B 4"], grid: tuple[int, int], output_size: int, holes: Float[Tensor, "B 4"] | None
) -> Float64[Tensor, "B Q P"]:
    """Each cell's share of the area of each bin that no hole covers; all 0 where nothing is left.

    A cell of which less than 1e-4 is shown counts 0: what rounding leaves of one that a box ends at, or that a hole covers.
    """

    def inside(boxes: Float64[Tensor, "B 4"]) -> Float64[Tensor, "B Q P"]:
        x1, y1, x2, y2 = boxes.unbind(1)
        rows, columns = _bin_overlaps(y1, y2, grid[0], output_size), _bin_overlaps(x1, x2, grid[1], output_size)
        return torch.einsum("bph,bqw->bpqhw", rows, columns).flatten(3).flatten(1, 2)

    left = inside(boxes.double())
    if holes is not None:
        holes = torch.cat([holes[:, :2].maximum(boxes[:, :2]), holes[:, 2:].minimum(boxes[:, 2:])], dim=1)
        left = left - inside(holes.double())
    left = left.where(left > 1e-4 * left.sum(2, keepdim=True).clamp(max=1), 0)
    return left / left.sum(2, keepdim=True).clamp(min=1e-9)


def _bin_overlaps(
    low: Float64[Tensor, " B"], high: Float64[Tensor, " B"], num_cells: int, num_bins: int
) -> Float64[Tensor, "B S n"]:
    """How much of each cell lies in each of the equal bins between `low` and `high`, along one axis."""
    edges = low[:, None] + (high - low)[:, None] * torch.arange(num_bins + 1, device=low.device) / num_bins
    return overlaps(edges[:, :-1].flatten(), edges[:, 1:].flatten(), num_cells).unflatten(0, (-1, num_bins))


def _in_parts(pool: Callable[[slice], Tensor], num_images: int, size: int, most: int) -> Tensor:
    """Few images at a time where one step would hold more than `most`; `size`: values of one image."""
    step = max(1, most // max(size, 1))
    if num_images <= step:
        return pool(slice(None))
    first = pool(slice(step))
    pooled = first.new_empty(num_images, *first.shape[1:])
    pooled[:step] = first
    for start in range(step, num_images, step):
        pooled[start : start + step] = pool(slice(start, start + step))
    return pooled


def _mean(
    values: Float[Tensor, "B n P"],
    ids: Tensor | None,
    fill: Float[Tensor, "B P"],
    weights: Float[Tensor, "B Q P"],
    num_classes: int,
    deterministic: bool,
) -> Float[Tensor, "B C Q"]:
    """sum(w * fill) + sum over stored of w * (value - fill); n values at P cells, Q bins."""
    if ids is None:
        return torch.einsum("bcp,bqp->bcq", values, weights)
    background = torch.einsum("bp,bqp->bq", fill, weights)[:, None].expand(-1, num_classes, -1)
    return _add(background, ids, (values - fill[:, None])[:, :, None] * weights[:, None], deterministic)


def _add(
    onto: Float[Tensor, "B C Q"], ids: Tensor, parts: Float[Tensor, "B n Q P"], deterministic: bool
) -> Float[Tensor, "B C Q"]:
    """`onto` plus what each cell adds to its bins, at the classes `ids`: one a cell, or one a map. Empty places (negative
    ids) add nothing."""
    num_images, num_classes, num_bins = onto.shape
    if ids.ndim == 2:
        parts = parts.sum(3)
    else:
        ids, parts = ids.flatten(1), parts.transpose(2, 3).flatten(1, 2)
    parts = parts.masked_fill_(ids.unsqueeze(2) < 0, 0).flatten(0, 1)  # every caller's own
    rows = torch.arange(num_images, device=ids.device)[:, None] * num_classes
    places = ids.clamp(min=0).add_(rows).flatten()
    onto = onto.reshape(num_images * num_classes, num_bins)
    if deterministic:
        onto = onto.index_put((places,), parts, accumulate=True)  # sorts by place on a GPU
    elif num_bins == 1:
        onto = onto.squeeze(1).scatter_add(0, places, parts.squeeze(1)).unsqueeze(1)
    else:
        onto = onto.index_add(0, places, parts)
    return onto.view(num_images, num_classes, num_bins)


def _maximum(
    values: Float[Tensor, "B n P"],
    ids: Tensor | None,
    fill: Float[Tensor, "B P"],
    weights: Float[Tensor, "B Q P"],
    num_classes: int,
) -> Float[Tensor, "B C Q"]:
    """Highest value of the cells of each bin.

    The fill takes part by its highest value. That is exact, though a class may be stored just there: where it is, its
    stored value is at least the fill (see LabelMap).
    """
    outside = weights == 0
    lowest = -torch.inf
    if ids is None:
        return torch.stack(
            [values.masked_fill(outside[:, q, None], lowest).amax(2) for q in range(weights.shape[1])], dim=2
        )
    best = fill[:, None].masked_fill(outside, lowest).amax(2)[:, None].expand(-1, num_classes, -1)
    stored = values[:, :, None].masked_fill(outside[:, None], lowest)  # [B, n, Q, P]
    if ids.ndim == 2:
        stored, places = stored.amax(3), ids
    else:
        stored, places = stored.transpose(2, 3).flatten(1, 2), ids.flatten(1)
    stored = stored.masked_fill(places.unsqueeze(2) < 0, lowest)
    places = places.clamp(min=0).unsqueeze(2).expand_as(stored)
    return best.scatter_reduce(1, places, stored, reduce="amax")


def _log_sum_exp(
    values: Float[Tensor, "B n P"],
    ids: Tensor | None,
    fill: Float[Tensor, "B P"],
    weights: Float[Tensor, "B Q P"],
    num_classes: int,
    sharpness: float,
    deterministic: bool,
) -> Float[Tensor, "B C Q"]:
    """The weighted mean of exp(r v), each class relative to its own highest value: nothing overflows or vanishes."""
    best = _maximum(values, ids, fill, weights, num_classes)
    base = best.where(best.isfinite(), 0)  # a bin without cells stays at -inf
    if ids is None:
        total = torch.einsum("bqcp,bqp->bcq", (sharpness * (values[:, None] - base.mT[..., None])).exp(), weights)
        return base + total.log() / sharpness
    highest = fill[:, None].masked_fill(weights == 0, -torch.inf).amax(2).nan_to_num(neginf=0)  # [B, Q]
    background = (weights * (sharpness * (fill[:, None] - highest[..., None])).exp()).sum(2)
    background = background[:, None] * (sharpness * (highest[:, None] - base)).exp()
    per_cell = ids if ids.ndim == 3 else ids[..., None].expand_as(values)
    # What a stored value replaces is the fill of its cell: [B, n, Q, P]
    own = base.transpose(1, 2)[:, None].expand(-1, values.shape[1], -1, -1)
    own = own.gather(3, per_cell.clamp(min=0)[:, :, None].expand(-1, -1, weights.shape[1], -1))
    excess = (sharpness * (values[:, :, None] - own)).exp() - (sharpness * (fill[:, None, None] - own)).exp()
    parts = (excess * weights[:, None]).where(weights[:, None] > 0, 0)
    total = _add(background, ids, parts, deterministic)
    return base + total.log() / sharpness


def _top_share(
    values: Float[Tensor, "B n P"],
    ids: Tensor | None,
    fill: Float[Tensor, "B P"],
    weights: Float[Tensor, "B Q P"],
    num_classes: int,
    share: float,
) -> Float[Tensor, "B C Q"]:
    """The mean of the highest `share` of each bin's cells, a part of the classes at a time."""
    outside = weights == 0
    num_best = ((~outside).sum(2) * share).ceil().clamp(min=1)  # [B, Q]
    ranks = torch.arange(values.shape[2], device=values.device)
    chosen = ranks < num_best[..., None]
    step = max(1, _CHUNK[values.device.type] // max(1, weights.numel()))
    pooled = []
    for start in range(0, num_classes, step):
        classes = range(start, min(start + step, num_classes))
        dense = _densify(values, ids, fill, classes)
        ordered = dense[:, :, None].masked_fill(outside[:, None], -torch.inf).sort(dim=3, descending=True).values
        pooled.append(ordered.where(chosen[:, None], 0).sum(3) / num_best[:, None])
    return torch.cat(pooled, dim=1)


def _densify(
    values: Float[Tensor, "B n P"], ids: Tensor | None, fill: Float[Tensor, "B P"], classes: range
) -> Float[Tensor, "B c P"]:
    """The maps of some classes, whole."""
    if ids is None:
        return values[:, classes.start : classes.stop]
    per_cell = ids if ids.ndim == 3 else ids[..., None].expand_as(values)
    inside = (per_cell >= classes.start) & (per_cell < classes.stop)
    places = (per_cell - classes.start).where(inside, len(classes))  # one row more, for the others
    dense = fill[:, None].repeat(1, len(classes) + 1, 1)
    return dense.scatter(1, places, values)[:, :-1]
