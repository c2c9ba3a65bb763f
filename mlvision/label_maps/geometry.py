"""Coordinates of label maps, in one place: boxes, cells, flips and turns.

Boxes are x1, y1, x2, y2 in [0, 1] of the full image, x first; maps are `[..., h, w]`, rows first. Cell (i, j) of an h x w
grid covers rows i / h to (i + 1) / h and columns j / w to (j + 1) / w of the grid's extent; its centre is at (i + 0.5) / h.
"""

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from mlvision.types import CropBox


def one_box(x1: float, y1: float, x2: float, y2: float, like: Float[Tensor, "B ..."]) -> Float[Tensor, "1 4"]:
    """A box of numbers that the host knows, with the dtype and device of another column.

    Each is written on the device: for a copy from the host's own memory the host would wait until a GPU has done all that
    it was given before.
    """
    return torch.cat([like.new_full((1, 1), side) for side in (x1, y1, x2, y2)], dim=1)


def whole_images(like: Float[Tensor, "B ..."]) -> Float[Tensor, "B 4"]:
    """The box of each image as a whole, with the dtype and device of another column."""
    return one_box(0.0, 0.0, 1.0, 1.0, like).expand(len(like), -1)


def boxes_in_grid(
    boxes: Float[Tensor, "B 4"], grid: tuple[int, int], extent: Float[Tensor, "B 4"] | None = None
) -> Float[Tensor, "B 4"]:
    """Boxes of the full image in units of cells: 0 to w across, 0 to h down, from the corner of the grid's extent."""
    if extent is not None:
        boxes = (boxes - extent[:, :2].repeat(1, 2)) / (extent[:, 2:] - extent[:, :2]).repeat(1, 2)
    height, width = map(float, grid)
    return boxes * one_box(width, height, width, height, boxes)


def roi_weights(
    low: Float[Tensor, " B"], high: Float[Tensor, " B"], num_cells: int, output_size: int
) -> Float64[Tensor, "B S n"]:
    """RoIAlign along one axis: the weight of each cell in each of S equal bins of the interval from `low` to `high`.

    A bin is the mean of ceil(length / S) points, each linear between the two nearest cell centres; points beyond the outer
    centres take the outermost cell, points more than half a cell outside the grid count 0. An interval of no length gives 0.

    `low` and `high` are in cells. RoIAlign is the outer product of the weights of its rows and columns. Equal to
    torchvision's `roi_align(..., sampling_ratio=-1, aligned=True)`; each cell's sum over the points is taken in closed
    form, so the cost does not depend on the number of points, nor does the host wait for it.
    """
    # Start, length and number of points in the boxes' own precision, as torchvision has them: a rounding to the next
    # number of points moves the result.
    start, stop = low - 0.5, high - 0.5
    size = (stop - start) / output_size
    points = size.ceil().clamp(min=0).double()
    start, size = start.double(), size.double()
    step = size / points.clamp(min=1)
    bins = torch.arange(output_size, device=low.device)
    first = start[:, None] + size[:, None] * bins + step[:, None] / 2
    # knots: the cell centres at 0..n-1, and the ends of the border at -1 and n.
    knots = torch.arange(-1, num_cells + 1, dtype=torch.float64, device=low.device)
    spacing = step.where(step > 0, 1)[:, None, None]
    # Points below each knot, and the sum of their positions.
    below = ((knots - first[..., None]) / spacing).ceil().clamp(min=0).minimum(points[:, None, None])
    total = below * first[..., None] + spacing * below * (below - 1) / 2
    count, position = below.diff(dim=-1), total.diff(dim=-1)  # between neighbouring knots
    weights = torch.zeros(*first.shape, num_cells, dtype=torch.float64, device=low.device)
    weights[..., 0] += count[..., 0]
    weights[..., -1] += count[..., -1]
    between, where, left = count[..., 1:-1], position[..., 1:-1], knots[1:-2]
    weights[..., :-1] += between * (left + 1) - where
    weights[..., 1:] += where - between * left
    return weights / points.clamp(min=1)[:, None, None]


def overlaps(low: Float[Tensor, " B"], high: Float[Tensor, " B"], num_cells: int) -> Float[Tensor, "B n"]:
    """How much of each cell along one axis lies between `low` and `high`, which are in cells: 0 to 1."""
    cells = torch.arange(num_cells, dtype=low.dtype, device=low.device)
    return (torch.minimum(high[:, None], cells + 1) - torch.maximum(low[:, None], cells)).clamp(min=0)


def resample(maps: Float[Tensor, "... h w"], grid: tuple[int, int]) -> Float[Tensor, "... h2 w2"]:
    """Maps of the same extent on another grid: each cell the mean of what it covers, weighted by the exact overlap."""
    if tuple(maps.shape[-2:]) == grid:
        return maps
    rows, columns = (shares_of_cells(m, n).to(maps) for n, m in zip(maps.shape[-2:], grid, strict=True))
    with torch.autocast(maps.device.type, enabled=False):
        return torch.einsum("ih,...hw,jw->...ij", rows, maps, columns)


def shares_of_cells(num_new: int, num_old: int) -> Float64[Tensor, "n m"]:
    """The share of each of n equal parts of a length that each of m equal parts of the same length covers."""
    # In units of 1 / (n m) of the length every end is a whole number.
    new, old = torch.arange(num_new)[:, None], torch.arange(num_old)
    ends = torch.minimum((new + 1) * num_old, (old + 1) * num_new)
    return (ends - torch.maximum(new * num_old, old * num_new)).clamp(min=0).double() / num_old


def boxes_in_image(patch: Float[Tensor, "#B 4"], view: CropBox) -> Float[Tensor, "B 4"]:
    """Boxes in [0, 1] of views, as boxes of the full images: turns, flips and crops undone."""
    x1, y1, x2, y2 = patch.expand(len(view.boxes), -1).unbind(1)
    if view.quarter_turns is not None:
        for number in (1, 2, 3):
            turned = view.quarter_turns % 4 >= number  # undone one clockwise turn at a time
            x1, y1, x2, y2 = (
                torch.where(turned, new, old) for new, old in ((1 - y2, x1), (x1, y1), (1 - y1, x2), (x2, y2))
            )
    if view.flipped is not None:
        x1, x2 = torch.where(view.flipped, 1 - x2, x1), torch.where(view.flipped, 1 - x1, x2)
    corner, size = view.boxes[:, :2].repeat(1, 2), (view.boxes[:, 2:] - view.boxes[:, :2]).repeat(1, 2)
    return corner + size * torch.stack([x1, y1, x2, y2], dim=1)


def orient(maps: Shaped[Tensor, "B ... S S2"], view: CropBox) -> Shaped[Tensor, "B ... S S2"]:
    """Maps of the crops as the views show them: mirrored left to right, then turned, where the views were."""
    if view.flipped is not None:
        maps = torch.where(_per_image(view.flipped, maps), maps.flip(-1), maps)
    if view.quarter_turns is not None:
        turns = view.quarter_turns % 4
        for number in (1, 2, 3):
            maps = torch.where(_per_image(turns == number, maps), maps.rot90(number, (-2, -1)), maps)
    return maps


def _per_image(column: Shaped[Tensor, " B"], maps: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "B ..."]:
    return column.view(-1, *[1] * (maps.ndim - 1))
