"""Whether a map lies on the objects of its label: the pointing game, and the map's mass in the objects' boxes.

One row is one label of one image: its map, and the boxes of its objects. Boxes are x1, y1, x2, y2 in [0, 1] of what the map
covers, x first; parts beyond it do not count. Maps are rows first: cell (i, j) of h x w covers rows i / h to (i + 1) / h and
columns j / w to (j + 1) / w.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Shaped

from mlvision.errors import InputError
from mlvision.metrics.inputs import ArrayT, to_array


class MassInBox(NamedTuple):
    """Where the maps' positive mass lies; both NaN where that is undefined.

    Attributes:
        share: of the positive mass, in the union of the boxes: 0 to 1.
        chance: the share of the map's area in that union: what a constant map scores. share / chance is the lift.
    """

    share: Float64[np.ndarray, " N"]
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


def _check(
    maps: Shaped[np.ndarray, "N h w"], boxes: Sequence[Float[np.ndarray, "_ 4"]]
) -> list[Float64[np.ndarray, "_ 4"]]:
    """The boxes of each row, cut to the map, without those that have no area there."""
    if len(maps) != len(boxes):
        raise InputError(f"{len(maps)} maps and boxes of {len(boxes)}: expected one entry for each map")
    bad = np.flatnonzero(~np.isfinite(maps).all(axis=(1, 2)))
    if bad.size:
        raise InputError(f"maps: {bad.size} of {len(maps)} hold NaN or infinity, the first in row {bad[0]}")
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
