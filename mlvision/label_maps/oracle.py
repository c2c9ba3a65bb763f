"""Label maps from ground truth: how much of each grid cell the objects of each class cover.

Boxes, polygons and run-length masks all become shapes: sets of edges, inside by the even-odd rule. The area of a union of
shapes is then exact in every cell, overlaps counted once: between two neighbouring heights at which an edge ends, a cell
row ends or two edges cross, the edges keep their order, and what lies between them are trapezoids.

The maps know no more than their cells: what an object covers of a cell counts as spread evenly over it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from contourpy import LineType, contour_generator
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Integer, Shaped
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from mlvision.errors import InputError
from mlvision.label_maps.geometry import boxes_in_grid, overlaps, whole_images
from mlvision.types import CropBox, LabelMap

_OUTLINED = 256  # pixels of the longest side that an outline is drawn from
_PAIRS = 1 << 18  # pairs of edges that one step of the search for crossings compares
# Boxes are float32 and do not meet cell borders exactly: so much of a label's own area is none of it.
_SLACK = 1e-6


@dataclass(frozen=True)
class OracleMap:
    """One image's maps of the L classes that it has objects of.

    Attributes:
        ids: `[L]` class indices, ascending.
        cover: `[L, h, w]` in [0, 1], the share of each cell that the class's objects cover.
        unknown: `[L, h, w]` in [0, 1], the same of its crowd regions.
    """

    ids: Int64[np.ndarray, " L"]
    cover: Float32[np.ndarray, "L h w"]
    unknown: Float32[np.ndarray, "L h w"]


def object_cover(box: Float[np.ndarray, "4"], segmentation: Any, grid: tuple[int, int]) -> Float64[np.ndarray, "h w"]:
    """The share of each cell of the full image that one object covers.

    Args:
        box: x1, y1, x2, y2 in [0, 1] of the image; the object's shape where it has no segmentation.
        segmentation: None, a list of polygons (their union; each `[m, 2]` x, y in [0, 1], inside by the even-odd rule, so
            either direction will do and a cut to a hole cancels), or a COCO RLE dict.
        grid: (h, w).

    Raises:
        InputError: an entry that is none of these, or not finite.
    """
    return _union_cover(_shapes(np.asarray(box), segmentation, grid, "object"), grid)


def object_outlines(box: Float[np.ndarray, "4"], segmentation: Any) -> list[Float64[np.ndarray, "_ 2"]]:
    """An object's shape to draw: closed outlines of x, y in [0, 1] of the image.

    Args:
        box, segmentation: as in `object_cover`. The outlines of a run-length mask go between the centres of its pixels, of
            a large one those of the mask made smaller.

    Raises:
        InputError: as `object_cover`.
    """
    if not isinstance(segmentation, dict):
        _shapes(np.asarray(box), segmentation, (1, 1), "object")
        x1, y1, x2, y2 = np.asarray(box, dtype=np.float64)
        corners = [[(x1, y1), (x2, y1), (x2, y2), (x1, y2)]]
        return [np.asarray(points, dtype=np.float64) for points in (corners if segmentation is None else segmentation)]
    mask = Image.fromarray(255 * (_decode(segmentation, "object") != 0).astype(np.uint8))
    mask.thumbnail((_OUTLINED, _OUTLINED), Image.Resampling.BOX)
    padded = np.pad(np.asarray(mask, dtype=np.float64) / 255, 1)
    lines = cast(list[np.ndarray], contour_generator(z=padded, line_type=LineType.Separate).lines(0.5))
    # Pixel (i, j) is at i + 1, j + 1 of the padded one, and its centre at i + 0.5, j + 0.5.
    return [((points - 0.5) / mask.size).clip(0, 1) for points in lines]


def oracle_map(
    boxes: Float[np.ndarray, "n 4"],
    labels: Integer[np.ndarray, " n"],
    crowd: Bool[np.ndarray, " n"],
    segmentations: Sequence[Any],
    num_classes: int,
    grid: tuple[int, int],
) -> OracleMap:
    """One image's maps: the union of the objects of each class, and of its crowd regions.

    Args:
        boxes, segmentations: of each object, as in `object_cover`.
        labels: class indices.
        crowd: True for a region that stands for many objects.
        grid: (h, w).

    Raises:
        InputError: columns of different lengths, a label outside the classes, or an entry that has no shape.
    """
    if min(grid) < 1:
        raise InputError(f"grid: expected at least one row and one column, got {grid[0]} x {grid[1]}")
    lengths = {"boxes": len(boxes), "labels": len(labels), "crowd": len(crowd), "segmentations": len(segmentations)}
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"expected one entry an object in each, got {', '.join(f'{n} {k}' for k, n in lengths.items())}"
        )
    for i in np.flatnonzero((labels < 0) | (labels >= num_classes)).tolist():
        raise InputError(f"object {i} has label {labels[i]}, expected 0 to {num_classes - 1}")
    shapes = [_shapes(boxes[i], segmentation, grid, f"object {i}") for i, segmentation in enumerate(segmentations)]
    ids = np.unique(labels).astype(np.int64)
    maps = np.zeros((2, len(ids), *grid), dtype=np.float32)
    for row, label in enumerate(ids):
        for which, members in enumerate((~crowd, crowd)):
            chosen = np.flatnonzero((labels == label) & members)
            maps[which, row] = _union_cover([shape for i in chosen for shape in shapes[i]], grid)
    return OracleMap(ids, maps[0], maps[1])


def batch_oracle_maps(maps: Sequence[OracleMap]) -> tuple[LabelMap, LabelMap]:
    """(cover, unknown) of several images: per-image labels, the shorter lists filled with empty places (id -1).

    A class that is not listed covers nothing: fill 0.

    Raises:
        InputError: maps of different grids, or none.
    """
    grids = {one.cover.shape[1:] for one in maps}
    if len(grids) != 1:
        raise InputError(f"oracle maps: expected one grid for all images, got {sorted(grids) or 'no image'}")
    longest = max(len(one.ids) for one in maps)
    ids = np.full((len(maps), longest), -1, dtype=np.int64)
    values = np.zeros((2, len(maps), longest, *grids.pop()), dtype=np.float32)
    for row, one in enumerate(maps):
        ids[row, : len(one.ids)] = one.ids
        values[0, row, : len(one.ids)] = one.cover
        values[1, row, : len(one.ids)] = one.unknown
    places = torch.from_numpy(ids)
    cover, unknown = (LabelMap(torch.from_numpy(v), places, kind="probability", fill=0.0) for v in values)
    return cover, unknown


def visible_area(
    maps: LabelMap, boxes: Float[Tensor, "B 4"], hole: Float[Tensor, "B 4"] | None = None
) -> Float64[Tensor, "B n"]:
    """The area of each of a map's labels inside a box of each image, as a share of the full image.

    The sum over the cells of their value times their overlap with the box: exact for fractional cells, unlike RoIAlign,
    which samples points.

    Args:
        maps: probability, with all classes or per-image labels.
        boxes: x1, y1, x2, y2 in [0, 1] of the full image.
        hole: in the same units, a part of each box that something covers, as in CutMix.

    Raises:
        InputError: a map of another kind, or of the best classes of each cell: it has no whole labels to measure.
    """
    if maps.kind != "probability" or (maps.ids is not None and maps.ids.ndim != 2):
        layout = "with all classes" if maps.ids is None else f"with ids {list(maps.ids.shape)}"
        raise InputError(f"visible area: expected whole maps of probability, got a map of {maps.kind} {layout}")
    if len(boxes) != len(maps.values):
        raise InputError(f"{len(boxes)} boxes and {len(maps.values)} label maps: expected one for each")
    if hole is not None:
        hole = torch.cat([hole[:, :2].maximum(boxes[:, :2]), hole[:, 2:].minimum(boxes[:, 2:])], dim=1)
        return visible_area(maps, boxes) - visible_area(maps, hole)
    height, width = maps.values.shape[2:]
    extent = None if maps.extent is None else maps.extent.double()
    cells = boxes_in_grid(boxes.double(), (height, width), extent)
    rows = overlaps(cells[:, 1], cells[:, 3], height) / height
    columns = overlaps(cells[:, 0], cells[:, 2], width) / width
    area = torch.einsum("bnhw,bh,bw->bn", maps.values.double(), rows, columns)
    if extent is None:
        return area
    return area * ((extent[:, 2] - extent[:, 0]) * (extent[:, 3] - extent[:, 1]))[:, None]


def oracle_targets(
    cover: LabelMap,
    unknown: LabelMap,
    view: CropBox,
    num_classes: int,
    *,
    tau: float = 0.25,
    hole: Float[Tensor, "B 4"] | None = None,
) -> Float32[Tensor, "B C"]:
    """What the ground truth says that each view shows: 1 present, 0 absent, NaN unknown.

    v is a class's visible area over its area in the image. Present where v reaches `tau`; absent where nothing of the class
    is visible; unknown in between, where no object reaches it but crowd area is visible, and for a class whose objects have
    no area at all. Classes without an object are absent: whoever knows of labels that were not annotated adds them.

    Args:
        cover, unknown: of the full images, from `batch_oracle_maps`.
        view: one crop of each image; flips and turns do not matter.
        tau: in (0, 1].
        hole: a part of each crop that something covers, as in `visible_area`.

    Raises:
        InputError: maps that do not belong together or to the views, an id outside the classes, `tau` out of range.
    """
    if not 0 < tau <= 1:
        raise InputError(f"tau: expected more than 0 and at most 1, got {tau}")
    ids = cover.ids
    if ids is None or unknown.ids is None or not torch.equal(ids, unknown.ids):
        raise InputError("oracle targets: expected cover and unknown with the same labels of each image")
    if ids.numel() and int(ids.max()) >= num_classes:
        raise InputError(f"oracle targets: the maps have class {int(ids.max())}, expected 0 to {num_classes - 1}")
    whole = whole_images(view.boxes)
    seen, total = visible_area(cover, view.boxes, hole), visible_area(cover, whole)
    crowd, total_crowd = visible_area(unknown, view.boxes, hole), visible_area(unknown, whole)
    present = (total > 0) & (seen >= (tau - _SLACK) * total)
    hidden = (seen <= _SLACK * total) & (crowd <= _SLACK * total_crowd) & (total + total_crowd > 0)
    known = torch.full_like(seen, torch.nan, dtype=torch.float32).masked_fill(hidden, 0).masked_fill(present, 1)
    # One column more takes the empty places.
    targets = known.new_zeros(len(ids), num_classes + 1)
    return targets.scatter(1, ids.long().where(ids >= 0, num_classes), known)[:, :num_classes]


def _shapes(
    box: Shaped[np.ndarray, "4"], segmentation: Any, grid: tuple[int, int], name: str
) -> list[Float64[np.ndarray, "_ 4"]]:
    """An object's shapes, each the edges of one even-odd outline: x, y of the upper end, x, y of the lower, in cells."""
    if isinstance(segmentation, dict):
        return [_mask_edges(_decode(segmentation, name), grid)]
    if segmentation is None:
        x1, y1, x2, y2 = box.tolist()
        if not (x1 <= x2 and y1 <= y2):
            raise InputError(f"{name} has box {box.tolist()}, expected x1 <= x2 and y1 <= y2")
        segmentation = [[(x1, y1), (x2, y1), (x2, y2), (x1, y2)]]
    if not isinstance(segmentation, list | tuple):
        raise InputError(f"{name} has a segmentation of {type(segmentation).__name__}, expected polygons or an RLE")
    outlines = [np.asarray(points, dtype=np.float64) for points in segmentation]
    for points in outlines:
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
            raise InputError(f"{name} has a polygon of shape {points.shape}, expected [3 or more, 2]")
        # A little over the border is common and harmless; far over it they are pixels, which would cover everything.
        if not (np.abs(points - 0.5) <= 1.5).all():
            raise InputError(f"{name} has a point that is not finite or far outside [0, 1] of the image")
    return [_outline_edges(points * (grid[1], grid[0])) for points in outlines]


def _outline_edges(points: Float64[np.ndarray, "m 2"]) -> Float64[np.ndarray, "_ 4"]:
    edges = np.concatenate([points, np.roll(points, -1, axis=0)], axis=1)
    edges = edges[edges[:, 1] != edges[:, 3]]  # horizontal ones bound no area
    return np.where(edges[:, 1:2] < edges[:, 3:4], edges, edges[:, [2, 3, 0, 1]])


def _mask_edges(mask: Shaped[np.ndarray, "H W"], grid: tuple[int, int]) -> Float64[np.ndarray, "_ 4"]:
    """The vertical borders between the mask's pixels, in runs: its outline without a polygon for every pixel."""
    height, width = mask.shape
    borders = np.diff(np.pad(mask != 0, ((0, 0), (1, 1))), axis=1)
    ends = np.diff(np.pad(borders, ((1, 1), (0, 0))).astype(np.int8), axis=0)
    x, start = np.nonzero(ends.T == 1)
    _, stop = np.nonzero(ends.T == -1)
    # Multiplied first: integers over integers meet the cell borders that they should.
    return np.stack([x, start, x, stop], axis=1) * np.tile([grid[1], grid[0]], 2) / np.tile([width, height], 2)


def _decode(rle: Any, name: str) -> Shaped[np.ndarray, "H W"]:
    try:
        height, width = rle["size"]
        counts = rle["counts"]
        coded = coco_mask.frPyObjects(rle, height, width) if isinstance(counts, list) else rle
        mask, area = coco_mask.decode(coded), int(coco_mask.area(coded))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name} has a mask that is no RLE of size [height, width] and counts: {error}") from error
    # pycocotools leaves what the runs do not reach uninitialised.
    if (isinstance(counts, list) and sum(counts) != mask.size) or area != mask.sum():
        raise InputError(f"{name} has a mask whose runs do not add up to its {height} x {width} pixels")
    return mask


def _union_cover(shapes: Sequence[Float64[np.ndarray, "_ 4"]], grid: tuple[int, int]) -> Float64[np.ndarray, "h w"]:
    """The share of each cell that is inside at least one shape."""
    height, width = grid
    cover = np.zeros(grid)
    edges = np.concatenate([np.zeros((0, 4)), *shapes])
    shape = np.repeat(np.arange(len(shapes)), [len(one) for one in shapes])
    ends = edges[:, [1, 3]].clip(0, height)
    levels = np.unique(np.concatenate([np.arange(height + 1), ends.ravel(), _crossings(edges).clip(0, height)]))
    # One piece for each edge and each slab between two levels that it spans; no two pieces of a slab cross.
    first, stop = np.searchsorted(levels, ends).T
    edge = np.repeat(np.arange(len(edges)), stop - first)
    slab = np.arange(len(edge)) - np.repeat(np.cumsum(stop - first) - stop, stop - first)
    x, y, x_end, y_end = edges[edge].T
    top, bottom = levels[slab], levels[slab + 1]
    x_top = x + (x_end - x) * ((top - y) / (y_end - y))
    x_bottom = x + (x_end - x) * ((bottom - y) / (y_end - y))

    order = np.lexsort((x_top + x_bottom, slab))
    side = _sides(slab[order], shape[edge[order]])
    order, side = order[side != 0], side[side != 0]
    area = (side * (bottom - top)[order])[:, None] * _left_of(x_top[order], x_bottom[order], width)
    # A slab lies in one row of cells; a middle that rounds up to the image's border would lie in none.
    row = np.minimum(((top + bottom)[order] / 2).astype(np.int64), height - 1)
    np.add.at(cover, row, area)
    return cover.clip(0, 1)  # beyond by rounding only


def _crossings(edges: Float64[np.ndarray, "m 4"]) -> Float64[np.ndarray, " k"]:
    """The heights at which two edges cross, apart from their ends. One height too many would do no harm."""
    vertical = edges[:, 0] == edges[:, 2]
    edges = edges[np.argsort(vertical, kind="stable")]  # vertical ones last: they do not cross each other
    low, high = edges[:, [0, 2]].min(axis=1), edges[:, [0, 2]].max(axis=1)
    found = [np.zeros(0)]
    step = max(1, _PAIRS // max(1, len(edges)))
    for start in range(0, int((~vertical).sum()), step):
        rows = slice(start, start + step)
        near = (low[rows, None] < high[start:]) & (low[start:] < high[rows, None])
        near &= (edges[rows, None, 1] < edges[start:, 3]) & (edges[start:, 1] < edges[rows, None, 3])
        a, b = np.nonzero(near)
        a, b = edges[start + a[a < b]], edges[start + b[a < b]]
        along_a, along_b, apart = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2], b[:, :2] - a[:, :2]
        turn = _cross(along_a, along_b)
        a, along_a, along_b, apart = (column[turn != 0] for column in (a, along_a, along_b, apart))
        turn = turn[turn != 0]
        on_a, on_b = _cross(apart, along_b) / turn, _cross(apart, along_a) / turn
        inside = (on_a > 0) & (on_a < 1) & (on_b > 0) & (on_b < 1)
        found.append((a[:, 1] + on_a * along_a[:, 1])[inside])
    return np.concatenate(found)


def _cross(a: Float64[np.ndarray, "k 2"], b: Float64[np.ndarray, "k 2"]) -> Float64[np.ndarray, " k"]:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def _sides(slab: Int[np.ndarray, " p"], shape: Int[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
    """Of pieces from left to right within each slab: -1 where the union begins, 1 where it ends, 0 inside it."""
    place = np.arange(len(slab))
    by_shape = np.lexsort((shape, slab))  # stable: still from left to right within each shape
    first = np.ones(len(slab), dtype=bool)
    first[1:] = (np.diff(slab[by_shape]) != 0) | (np.diff(shape[by_shape]) != 0)
    rank = place - np.maximum.accumulate(np.where(first, place, 0))
    enters = np.zeros(len(slab), dtype=bool)
    enters[by_shape] = rank % 2 == 0
    # An outline is closed: each slab has an even number of its pieces, so the depth is 0 again where a slab ends.
    depth = np.cumsum(np.where(enters, 1, -1))
    return (~enters & (depth == 0)).astype(np.int64) - (enters & (depth == 1))


def _left_of(
    x_top: Float64[np.ndarray, " p"], x_bottom: Float64[np.ndarray, " p"], width: int
) -> Float64[np.ndarray, "p w"]:
    """The share of each column of cells that is left of each straight piece: the mean of clip(x - j, 0, 1) along it."""
    ends = np.sort(np.stack([x_top, x_bottom]), axis=0)[..., None] - np.arange(width)
    low, high = ends
    (low_in, high_in), (low_over, high_over) = ends.clip(0, 1), ends.clip(min=1)
    total = (high_in - low_in) * (high_in + low_in) / 2 + high_over - low_over
    # As a quotient of what the piece spans it stays accurate for steep pieces, as a difference of squares it would not.
    return np.divide(total, high - low, out=low_in.copy(), where=high > low)


def split_oracle(maps: LabelMap, num_classes: int) -> tuple[LabelMap, LabelMap]:
    """(cover, unknown) of maps as the store has them: first what each class's objects cover, then its crowd regions.

    Raises:
        InputError: maps of another layout.
    """
    if maps.ids is not None or maps.kind != "probability" or maps.values.shape[1] != 2 * num_classes:
        raise InputError(
            f"oracle targets: expected {2 * num_classes} whole maps of probability, as teacher=[oracle] makes them, got "
            f"{maps.values.shape[1]} of {maps.kind}"
        )
    cover, unknown = maps.values.split(num_classes, dim=1)
    has_objects = cover.flatten(2).any(2) | unknown.flatten(2).any(2)
    ids = torch.arange(num_classes, device=cover.device).where(has_objects, -1)  # a class without objects is not listed
    return LabelMap(cover, ids, extent=maps.extent), LabelMap(unknown, ids, extent=maps.extent)
