"""What a label looks like to a model: the patches of a data set that are nearest to it."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from mlvision.data.manifest import Manifest
from mlvision.errors import InputError
from mlvision.explain.producers import DenseHead
from mlvision.explain.subject import Subject
from mlvision.files import spreadsheet_text, whole_file
from mlvision.models import JointHead
from mlvision.study.render import GAP, OUTCOME_COLOURS, draw_text, draw_tile, number, side_by_side, stack
from mlvision.types import Batch


@dataclass(frozen=True)
class Prototypes:
    """The nearest patch of each of the `num` images that come nearest to a label, the nearest image first.

    Attributes:
        nearness: `[C, num]`: the cosine of patch and label's name, or what the head's scores say of the cell alone.
        indices: `[C, num]`: the images' rows in the manifest.
        cells: `[C, num, 2]`: row and column of the patch.
        grid: (h, w) of the patches.
    """

    nearness: Float[Tensor, "C num"]
    indices: Int64[Tensor, "C num"]
    cells: Int64[Tensor, "C num 2"]
    grid: tuple[int, int]


def nearness(subject: Subject, images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C h w"]:
    """How near each cell is to each label, on one scale for all images.

    With a text head the cosine of the patch and the label's name. (Its maps, the way from a label to the patches, are shares
    of one image: they say where in it, not whether.) Else the logits of the head, read cell by cell.

    Raises:
        InputError: a head whose maps are shares of an image and that compares cells with nothing.
    """
    head = None if subject.classifier is None else subject.classifier.head
    if isinstance(head, JointHead):
        assert subject.classifier is not None
        with torch.no_grad():
            joint = head.join(subject.classifier.backbone(subject.normalise(subject.pixels(images))))
            return head.cosines(joint).mT.unflatten(2, joint.grid)
    found = DenseHead().maps(subject.module, images)
    if found.kind != "logit":
        raise InputError(
            f"prototypes: the maps of {type(head).__name__} are shares of an image ({found.kind}), which say where in it "
            "and cannot be compared between images; take a linear, csra or text head"
        )
    return found.values


def find_prototypes(subject: Subject, batches: Iterable[Batch], num: int) -> Prototypes:
    """Go once through the images; memory grows with `num`, not with their number.

    One patch an image, so that no single image fills a label's row.

    Source: the prototype view of Li et al., "PatchCT", ICCV 2023, ranks patches by the plan back from the label.

    DEVIATION: ranked by what that plan is made of, the cosine: the plan sums to 1 in each image, whatever it shows.

    Raises:
        InputError: as `nearness`; no image.
    """
    best: list[Tensor] = []
    height = width = 0
    for batch in batches:
        near = nearness(subject, batch.images).float().cpu()
        height, width = near.shape[2:]
        values, cells = near.flatten(2).max(2)
        columns = [values.T, batch.index[:, None].expand_as(cells).T, cells.T]
        if best:
            columns = [torch.cat(pair, 1) for pair in zip(best, columns, strict=True)]
        order = columns[0].argsort(dim=1, descending=True, stable=True)[:, :num]
        best = [column.gather(1, order) for column in columns]
    if not best:
        raise InputError("prototypes: there is no image to look for them in")
    values, indices, cells = best
    return Prototypes(values, indices, torch.stack([cells // width, cells % width], 2), (height, width))


def write_prototypes(path: Path, found: Prototypes, labels: Sequence[int], manifest: Manifest, split: str) -> None:
    """A CSV with a row for each patch of each label of a split, the nearest first."""
    with whole_file(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("split", "class", "rank", "image", "row", "column", "rows", "columns", "nearness", "target"))
        for label in labels:
            columns = (found.indices[label].tolist(), found.cells[label].tolist(), found.nearness[label].tolist())
            for rank, (index, cell, near) in enumerate(zip(*columns, strict=True)):
                target, key = manifest.target(index)[label], manifest.records[index].key
                names = spreadsheet_text(manifest.classes[label]), rank, spreadsheet_text(key)
                writer.writerow((split, *names, *cell, *found.grid, f"{near:.5f}", target))


def draw_prototypes(
    found: Prototypes,
    labels: Sequence[int],
    classes: Sequence[str],
    target_of: Callable[[int], Float[np.ndarray, " C"]],
    photo_of: Callable[[int], UInt8[np.ndarray, "H W 3"]],
    *,
    title: str = "",
    tile_px: int = 112,
) -> UInt8[np.ndarray, "H W 3"]:
    """A page: a line for each label, its nearest patches framed in what surrounds them.

    The border of a tile says whether the label is annotated in that image.

    Args:
        target_of, photo_of: the targets and the whole photo of a row of the manifest.
        tile_px: side of a tile.
    """
    num = found.indices.shape[1]
    width = num * (tile_px + GAP) + GAP
    colours = {1.0: OUTCOME_COLOURS["TP"], 0.0: OUTCOME_COLOURS["FP"]}
    notes = "the nearest patch of each of the nearest images; green: annotated with the label, red: not, grey: unknown"
    blocks = [draw_text(title, width, bold=True, size=16), draw_text(notes, width)]
    for label in labels:
        tiles = []
        for near, index, cell in zip(
            found.nearness[label].tolist(), found.indices[label].tolist(), found.cells[label].tolist(), strict=True
        ):
            border = colours.get(float(target_of(index)[label]), OUTCOME_COLOURS["unknown"])
            picture = _surroundings(photo_of(index), (cell[0], cell[1]), found.grid, tile_px)
            tiles.append(draw_tile(picture, border, [number(near)], tile_px, 1))
        blocks += [draw_text(classes[label], width, bold=True), side_by_side(tiles, width)]
    return stack(blocks)


def _surroundings(
    photo: UInt8[np.ndarray, "H W 3"], cell: tuple[int, int], grid: tuple[int, int], side: int
) -> UInt8[np.ndarray, "side side 3"]:
    """The patch in its frame, with its neighbours: three cells a side where the photo has them."""
    inner = side - 8  # draw_tile's border
    (rows, columns), (height, width) = grid, (photo.shape[0] / grid[0], photo.shape[1] / grid[1])
    top, left = (min(max(c - 1, 0), max(n - 3, 0)) for c, n in zip(cell, grid, strict=True))
    down, right = min(top + 3, rows), min(left + 3, columns)
    box = (left * width, top * height, right * width, down * height)
    picture = Image.fromarray(photo).resize((inner, inner), Image.Resampling.BILINEAR, box)
    high, wide, y, x = inner / (down - top), inner / (right - left), cell[0] - top, cell[1] - left
    frame = (x * wide, y * high, (x + 1) * wide - 1, (y + 1) * high - 1)
    ImageDraw.Draw(picture).rectangle(frame, outline="#ffffff", width=2)
    return np.asarray(picture)
