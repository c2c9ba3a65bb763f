"""Whether a map lies on the objects of its label: the pointing game, the map's mass there, and where its highest cells are.

One row is one label of one image: its map, and its objects, as boxes or as a mask. Boxes are x1, y1, x2, y2 in [0, 1] of
what the map covers, x first; parts beyond it do not count. A mask is given by its cover: the share that the objects cover of
each cell of a grid over the same area, which label_maps/oracle.py computes from boxes, polygons and masks. The grids of map
and cover may differ; both are constant within a cell. Rows come first: cell (i, j) of h x w covers rows i / h to (i + 1) / h
and columns j / w to (j + 1) / w.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from mlvision.errors import InputError
from mlvision.label_maps.geometry import shares_of_cells
from mlvision.metrics.inputs import ArrayT, check_maps, to_array

# Covers are sums in float32: so much beyond 0 to 1, or short of the whole area, is rounding.
_SLACK = 1e-6


class MassInBox(NamedTuple):
    """Where the maps' positive mass lies; both NaN where that is undefined.

    Attributes:
        share: of the positive mass, in the union of the boxes, or in the mask: 0 to 1.
        chance: the share of the map's area in there: what a constant map scores. share / chance is the lift.
    """

    share: Float64[np.ndarray, " N"]
    chance: Float64[np.ndarray, " N"]


class RankAccuracy(NamedTuple):
    """How much of a map's highest cells lies in the mask; both NaN where that is undefined.

    Attributes:
        accuracy: the share that the mask covers of the map's highest cells, of which as much is taken as the mask is large:
            0 to 1.
        chance: the mask's share of the area: what a constant map scores.
    """

    accuracy: Float64[np.ndarray, " N"]
    chance: Float64[np.ndarray, " N"]


def pointing_game(maps: Float[ArrayT, "N h w"], boxes: Sequence[Float[np.ndarray, "_ 4"]]) -> Float64[np.ndarray, " N"]:
    """Give 1 where the centre of the map's highest cell lies in a box (its border included), else 0.

    Several cells may be equally high: the value is then their mean, the share of them that lie in a box. So a constant map
    scores the share of all cells, which is the chance level; where that is 0, the boxes lie between the cells' centres and
    no map of this grid can hit them.

    Args:
        maps: Any sign; only their order counts.
        boxes: Of each row. Boxes without area are left out.

    Returns:
        NaN for a row without a box.

    Raises:
        InputError: Not one entry of boxes for each map, a map that is not finite, or a box that is none.

    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop", IJCV 2018, section 4.1.

    DEVIATION: the point is a cell's centre, without the 15 pixels of tolerance that they allow; a cell is coarser.
    """
    values = to_array(maps)
    kept = _check(values, boxes)
    height, width = values.shape[1:]
    y, x = ((np.arange(n) + 0.5) / n for n in (height, width))
    hits = np.full(len(values), np.nan)
    for row, found in enumerate(kept):
        if len(found):
            hits[row] = _inside(found, y, x)[values[row] == values[row].max()].mean()
    return hits


def mass_in_box(maps: Float[ArrayT, "N h w"], boxes: Sequence[Float[np.ndarray, "_ 4"]]) -> MassInBox:
    """Give the share of each map's positive mass in the union of its boxes, and the share that chance would put there.

    A cell's mass counts as spread evenly over it, so a cell that is partly in a box counts by the exact area of that part;
    overlapping boxes count once. Negative values count as none.

    Args:
        maps: Such as probabilities, transport plans or attributions.
        boxes: Of each row. Boxes without area are left out.

    Returns:
        Both NaN for a row without a box or without positive mass.

    Raises:
        InputError: As `pointing_game`.
    """
    values = to_array(maps)
    kept = _check(values, boxes)
    share, chance = np.full((2, len(values)), np.nan)
    for row, found in enumerate(kept):
        positive = values[row].astype(np.float64).clip(min=0)
        total = positive.sum()
        if len(found) and total > 0:
            cover = _union_cover(found, values.shape[1:])
            share[row], chance[row] = (positive * cover).sum() / total, cover.mean()
    return MassInBox(share, chance)


def pointing_in_mask(
    maps: Float[np.ndarray | Tensor, "N h w"], cover: Float[np.ndarray | Tensor, "N H W"], tolerance: float = 0.0
) -> Float64[np.ndarray, " N"]:
    """Give 1 where the centre of the map's highest cell lies in the mask, else 0.

    The mask is the cells of the cover's grid that are covered by a half or more. A centre on the line between two of these
    cells belongs to the lower or the right one. Of several highest cells the value is the mean, as in `pointing_game`; so a
    constant map scores chance, and a mask that no centre of the map's grid lies in cannot be hit.

    Args:
        maps: Any sign; only their order counts.
        cover: In [0, 1].
        tolerance: How far from the mask a centre may lie: Euclidean, in [0, 1] of the area's height down and of its width
            across, so 15 / 224 allows the source's 15 pixels on a view of 224.

    Returns:
        NaN for a row of which nothing is covered. A row whose objects cover no cell by a half counts as a miss.

    Raises:
        InputError: Not one cover for each map, maps or covers that are not finite, a cover outside [0, 1], or a negative
            tolerance.

    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop", IJCV 2018, section 4.1.
    """
    if not tolerance >= 0:
        raise InputError(f"tolerance {tolerance}: expected 0 or more")
    values, covers = _check_covers(maps, cover)
    hits = np.full(len(values), np.nan)
    for row, plane in enumerate(covers):
        if (plane > 0).any():
            highest = np.argwhere(values[row] == values[row].max())
            hits[row] = _hits(highest, values.shape[1:], plane >= 0.5, tolerance).mean()
    return hits


def _hits(
    cells: Shaped[np.ndarray, "k 2"], grid: tuple[int, ...], mask: Shaped[np.ndarray, "H W"], tolerance: float
) -> Shaped[np.ndarray, " k"]:
    """Whether the centre of each cell (i, j) of a grid lies in the mask or near it."""
    if tolerance == 0:
        # In whole numbers: a centre on a line must not fall to either side of it by rounding.
        down, across = ((2 * cells + 1) * mask.shape // (2 * np.array(grid))).T
        return mask[down, across]
    rows, columns = cells.T
    down, across = (_gaps(n, m) ** 2 for n, m in zip(grid, mask.shape, strict=True))
    columns, which = np.unique(columns, return_inverse=True)
    # The distance across to what is nearest in each of the mask's rows, then the nearest of the rows.
    nearest = np.stack([np.where(mask, across[j], np.inf).min(axis=1) for j in columns])
    distance = np.sqrt((down[rows] + nearest[which]).min(axis=1))
    return distance <= tolerance * (1 + 1e-12)  # a rounding further is no further


def _gaps(num_cells: int, num_fine: int) -> Float64[np.ndarray, "n m"]:
    """How far the centre of each of n equal parts of a length of 1 is from each of m equal parts of it; 0 inside."""
    centre, start = (2 * np.arange(num_cells)[:, None] + 1) * num_fine, 2 * num_cells * np.arange(num_fine)
    return np.maximum(start - centre, centre - start - 2 * num_cells).clip(min=0) / (2 * num_cells * num_fine)


def mass_in_mask(maps: Float[np.ndarray | Tensor, "N h w"], cover: Float[np.ndarray | Tensor, "N H W"]) -> MassInBox:
    """Give the share of each map's positive mass in its mask, and the share that chance would put there.

    As `mass_in_box`: a cell's mass, and what is covered of a cell of the cover's grid, count as spread evenly over it, and
    the two grids are overlaid by exact areas.

    Args:
        maps: Such as probabilities, transport plans or attributions; negative values count as no mass.
        cover: In [0, 1].

    Returns:
        Both NaN for a row of which nothing is covered, or without positive mass.

    Raises:
        InputError: Not one cover for each map, maps or covers that are not finite, or a cover outside [0, 1].
    """
    values, covers = _check_covers(maps, cover)
    share, chance = np.full((2, len(values)), np.nan)
    for row, cells in enumerate(_resampled(covers, values.shape[1:])):
        positive = values[row].astype(np.float64).clip(min=0)
        total = positive.sum()
        if cells.any() and total > 0:
            share[row], chance[row] = (positive * cells).sum() / total, cells.mean()
    return MassInBox(share, chance)


def rank_accuracy(
    maps: Float[np.ndarray | Tensor, "N h w"], cover: Float[np.ndarray | Tensor, "N H W"]
) -> RankAccuracy:
    """Give how much of the map's highest cells lies in the mask, taking as much area of them as the mask has.

    Cells are taken in descending order; the last counts by the part that fits. Equal cells are taken together, each by the
    same part: so their order in memory does not matter, and a constant map scores chance. A map whose cells are larger than
    the objects cannot reach 1.

    Args:
        maps: Any sign; only their order counts.
        cover: In [0, 1].

    Returns:
        Both NaN for a row of which nothing is covered, or everything: every map would score 1.

    Raises:
        InputError: As `mass_in_mask`.

    Source: Arras et al., "CLEVR-XAI: A benchmark dataset for the ground truth evaluation of neural network explanations",
        Information Fusion 2022 (relevance rank accuracy).

    DEVIATION: theirs counts whole pixels of maps as large as the mask; coarse cells are covered in part.
    """
    values, covers = _check_covers(maps, cover)
    accuracy, chance = np.full((2, len(values)), np.nan)
    for row, cells in enumerate(_resampled(covers, values.shape[1:])):
        area = cells.sum()  # in cells of the map
        if 0 < area < cells.size * (1 - _SLACK):
            _, level = np.unique(values[row], return_inverse=True)
            level = level.max() - level.ravel()  # 0: the highest
            size, covered = np.bincount(level), np.bincount(level, weights=cells.ravel())
            taken = ((area - (size.cumsum() - size)) / size).clip(0, 1)  # the part of each level that is taken
            accuracy[row], chance[row] = (taken * covered).sum() / area, area / cells.size
    return RankAccuracy(accuracy, chance)


def _check_covers(
    maps: Float[np.ndarray | Tensor, "..."], cover: Float[np.ndarray | Tensor, "..."]
) -> tuple[Shaped[np.ndarray, "N h w"], Shaped[np.ndarray, "N H W"]]:
    """Both as arrays that fit together."""
    values, covers = to_array(maps), to_array(cover)
    check_maps(values)
    check_maps(covers, "cover")
    if len(values) != len(covers):
        raise InputError(f"{len(values)} maps and {len(covers)} covers: expected one cover for each map")
    if len(covers) and not -_SLACK <= covers.min() <= covers.max() <= 1 + _SLACK:
        raise InputError(f"cover from {covers.min():g} to {covers.max():g}: expected shares of a cell, 0 to 1")
    return values, covers


def _resampled(covers: Shaped[np.ndarray, "N H W"], grid: tuple[int, ...]) -> Iterator[Float64[np.ndarray, "h w"]]:
    """The share of each cell of another grid that is covered, row for row: the mean of the cover over the cell."""
    down, across = (shares_of_cells(n, m).numpy() for n, m in zip(grid, covers.shape[1:], strict=True))
    for plane in covers:
        yield down @ plane.astype(np.float64).clip(0, 1) @ across.T


def _check(
    maps: Shaped[np.ndarray, "N h w"], boxes: Sequence[Float[np.ndarray, "_ 4"]]
) -> list[Float64[np.ndarray, "_ 4"]]:
    """The boxes of each row, cut to the map, without those that have no area there."""
    if len(maps) != len(boxes):
        raise InputError(f"{len(maps)} maps and boxes of {len(boxes)}: expected one entry for each map")
    check_maps(maps)
    kept = []
    for row, found in enumerate(boxes):
        found = np.asarray(found, dtype=np.float64)
        if not (found[:, :2] <= found[:, 2:]).all():  # NaN fails too
            raise InputError(f"boxes of row {row}: expected x1 <= x2 and y1 <= y2, got {found.tolist()}")
        found = found.clip(0, 1)
        kept.append(found[(found[:, :2] < found[:, 2:]).all(axis=1)])
    return kept


def _inside(
    boxes: Float64[np.ndarray, "n 4"], y: Float64[np.ndarray, " a"], x: Float64[np.ndarray, " b"]
) -> Shaped[np.ndarray, "a b"]:
    """Whether each point (y, x) of a lattice lies in at least one box."""
    x1, y1, x2, y2 = boxes.T[:, :, None]
    rows, columns = (y1 <= y) & (y <= y2), (x1 <= x) & (x <= x2)
    return (rows[:, :, None] & columns[:, None]).any(axis=0)


def _union_cover(boxes: Float64[np.ndarray, "n 4"], grid: tuple[int, ...]) -> Float64[np.ndarray, "h w"]:
    """The share of each cell that lies in at least one box.

    The lines of all boxes and cells cut the image into rectangles, each wholly in or out of every box and in one cell.
    """
    height, width = grid
    y, x = (np.unique([*np.arange(n + 1) / n, *boxes[:, k::2].ravel()]) for n, k in ((height, 1), (width, 0)))
    middle_y, middle_x = (y[1:] + y[:-1]) / 2, (x[1:] + x[:-1]) / 2
    area = np.outer(np.diff(y) * height, np.diff(x) * width) * _inside(boxes, middle_y, middle_x)
    # A rectangle a rounding thin may have its middle on the border, in no cell.
    rows, columns = (
        np.minimum((middle * n).astype(np.int64), n - 1) for middle, n in ((middle_y, height), (middle_x, width))
    )
    cover = np.zeros((height, width))
    np.add.at(cover, (rows[:, None], columns), area)
    return cover
