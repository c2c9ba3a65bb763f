"""Explanations by what changes when parts of the image are hidden: one engine for Occlusion, LIME, KernelSHAP and RISE.

Masks say what each copy of an image keeps; the runner asks the model about all copies of all images in batches; a little
linear algebra turns the answers into maps. A copy's answer holds all labels, so the cost does not depend on how many are
explained; maps are made once, on cells that the masks can tell apart.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from mlvision.errors import InputError, check_fields
from mlvision.explain.impute import BASELINES, fill_in
from mlvision.explain.selection import Selection
from mlvision.explain.subject import Subject
from mlvision.models.backbone import embed_patches, is_plain_vit

PRECISIONS = ("", "fp32", "bf16", "fp16")


@runtime_checkable
class Masks(Protocol):
    """`num` masks of each image, made when they are needed: all of them would not fit into memory."""

    num: int

    def keep(self, images: Int64[Tensor, " n"], numbers: Int64[Tensor, " n"]) -> Float[Tensor, "n H W"]:
        """Of some (image, mask): 1 where the pixel is kept, 0 where it is hidden."""
        ...


MOST_SAMPLES = 100_000  # copies of an image


@dataclass(frozen=True)
class Perturbation:
    """What the explainers that hide parts of the image share."""

    baseline: Annotated[
        str,
        "what hidden pixels become: black, mean (the image's), blur, impute (noisy linear, from the rest), drop (a ViT's "
        "tokens are left out)",
    ] = "mean"
    batch_size: Annotated[int, "images a forward pass; 0: by their size and the device"] = 0
    precision: Annotated[str, "fp32, bf16 or fp16 autocast; empty: as the caller has it"] = ""
    label_specific = True
    signed = True

    def __post_init__(self) -> None:
        rules = [
            ("baseline", self.baseline in BASELINES, f"one of {', '.join(BASELINES)}"),
            ("batch_size", self.batch_size >= 0, "0 or more"),
            ("precision", self.precision in PRECISIONS, "fp32, bf16, fp16 or nothing"),
            *self._rules(),
        ]
        check_fields(self, "", rules)

    def _rules(self) -> list[tuple[str, bool, str]]:
        return []

    def _answers(self, subject: Subject, pixels: Tensor, masks: Masks) -> Float[Tensor, "B M C"]:
        return perturbed_logits(
            subject, pixels, masks, baseline=self.baseline, batch_size=self.batch_size, precision=self.precision
        )

    def _whole(self, subject: Subject, pixels: Tensor, selection: Selection) -> Float[Tensor, "B L"]:
        """The scores of the images as they are, in the precision of the copies."""
        with torch.no_grad(), _autocast(self.precision, pixels.device):
            return selection.scores(subject.logits(pixels).float())


@dataclass(frozen=True)
class Occlusion(Perturbation):
    """The drop of the score when a window is hidden, averaged over the windows that cover a place.

    Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 4.2; windows as in
    captum: every `stride_px`, the last ones cut at the border.
    """

    window_px: Annotated[int, "side of the square window; 0: a quarter of the image's shorter side"] = 0
    stride_px: Annotated[int, "from one window to the next; 0: half a window"] = 0

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("window_px", self.window_px >= 0, "0 or more"),
            ("stride_px", 0 <= self.stride_px <= (self.window_px or math.inf), "0 to window_px: no place left out"),
        ]

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        size = (pixels.shape[2], pixels.shape[3])
        window = min(self.window_px or max(1, round(min(size) / 4)), *size)
        stride = self.stride_px or max(1, window // 2)
        if stride > window:
            raise InputError(
                f"stride_px: expected at most the window of {window}, got {stride}; places would be left out"
            )
        masks = Windows(size, window, stride, pixels.device)
        whole = self._whole(subject, pixels, selection)
        scores = selection.scores(self._answers(subject, pixels, masks))
        with torch.autocast(pixels.device.type, enabled=False):
            return masks.fold(_without_rounding(whole[:, None] - scores, whole[:, None]))


@dataclass(frozen=True)
class Lime(Perturbation):
    """The weights of a ridge regression of the score on which segments of the image are kept.

    Segments are SLIC's. Copies that hide more weigh less: exp(-d^2 / (2 kernel_width^2)), d the cosine distance of a copy's
    segments from all of them. The normal matrix is the same for every label, so all labels cost one factorisation.

    Source: Ribeiro et al., "Why Should I Trust You?", KDD 2016, eq. 1-2 and section 3.4.
    """

    num_segments: Annotated[int, "about how many SLIC segments an image has"] = 40
    num_samples: Annotated[int, "copies of each image"] = 200
    ridge: Annotated[float, "weight of the squared coefficients"] = 1.0
    kernel_width: Annotated[float, "cosine distance at which a copy weighs exp(-1/2)"] = 0.25
    compactness: Annotated[float, "of SLIC: how much more place counts than colour"] = 10.0
    cell_px: Annotated[int, "side of a cell of the map; a cell is the mean of its pixels"] = 4

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("num_segments", 2 <= self.num_segments <= 10_000, "2 to 10000"),
            ("num_samples", 2 <= self.num_samples <= MOST_SAMPLES, f"2 to {MOST_SAMPLES}"),
            ("ridge", self.ridge >= 0, "0 or more"),
            ("kernel_width", self.kernel_width > 0, "more than 0"),
            ("compactness", self.compactness > 0, "more than 0"),
            ("cell_px", self.cell_px >= 1, "1 or more"),
        ]

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        segments = slic_segments(pixels, self.num_segments, self.compactness)
        counts = _count(segments)
        masks = Segments(segments, coin_flips(counts, self.num_samples), self.cell_px)
        scores = selection.scores(self._answers(subject, pixels, masks))
        scores = _without_rounding(scores - scores[:, :1], scores)  # the first copy is the image itself
        shares = masks.design.sum(2) / counts[:, None]
        distance = 1 - shares.clamp(min=0).sqrt()  # of a 0-1 vector from all ones, by the cosine
        weights = (-distance.square() / (2 * self.kernel_width**2)).exp()
        return masks.paint(weighted_ridge(masks.design, weights, scores, self.ridge))


@dataclass(frozen=True)
class KernelShap(Perturbation):
    """The Shapley value of each segment of the image, by the regression whose weights make its coefficients those values.

    The values of an image's segments sum to the score of the image less that of one whose segments are all hidden. Where
    `num_samples` suffices for every sub-set of the segments, the values are exact.

    Source: Lundberg & Lee, "A Unified Approach to Interpreting Model Predictions", NeurIPS 2017, theorem 2; a sub-set is
    drawn together with its complement as in Covert & Lee, AISTATS 2021, section 4.2.
    """

    num_segments: Annotated[int, "about how many SLIC segments an image has"] = 40
    num_samples: Annotated[int, "copies of each image"] = 400
    compactness: Annotated[float, "of SLIC: how much more place counts than colour"] = 10.0
    cell_px: Annotated[int, "side of a cell of the map; a cell is the mean of its pixels"] = 4

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("num_segments", 2 <= self.num_segments <= 10_000, "2 to 10000"),
            ("num_samples", 4 <= self.num_samples <= MOST_SAMPLES, f"4 to {MOST_SAMPLES}"),
            ("compactness", self.compactness > 0, "more than 0"),
            ("cell_px", self.cell_px >= 1, "1 or more"),
        ]

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        segments = slic_segments(pixels, self.num_segments, self.compactness)
        design, weights = coalitions(_count(segments), self.num_samples)
        masks = Segments(segments, design, self.cell_px)
        scores = selection.scores(self._answers(subject, pixels, masks))
        gains = _without_rounding(
            scores - scores[:, 1:2], scores
        )  # the first copy is the image, the second shows nothing
        return masks.paint(shapley_values(masks.design, weights.to(gains), gains))


@dataclass(frozen=True)
class Rise(Perturbation):
    """The mean of random smooth masks, each weighted by the score of what it keeps.

    Source: Petsiuk et al., "RISE", BMVC 2018, eq. 6 and section 3.2.

    DEVIATION: the scores' mean is taken off first. Logits have any offset, and an offset times the mean mask is no evidence.
    """

    num_samples: Annotated[int, "masks; the same for every image"] = 400
    grid: Annotated[int, "cells of a mask along each side, before it is enlarged and shifted"] = 7
    share: Annotated[float, "probability that a cell is kept"] = 0.5
    cell_px: Annotated[int, "side of a cell of the map"] = 4

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("num_samples", 2 <= self.num_samples <= MOST_SAMPLES, f"2 to {MOST_SAMPLES}"),
            ("grid", 1 <= self.grid <= 256, "1 to 256"),
            ("share", 0 < self.share < 1, "between 0 and 1"),
            ("cell_px", self.cell_px >= 1, "1 or more"),
        ]

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        size = (pixels.shape[2], pixels.shape[3])
        masks = SmoothGrids(size, self.num_samples, self.grid, self.share, self.cell_px, pixels.device)
        scores = selection.scores(self._answers(subject, pixels, masks))
        centred = _without_rounding(scores - scores.mean(1, keepdim=True), scores)
        with torch.autocast(pixels.device.type, enabled=False):
            return torch.einsum("bml,mhw->blhw", centred, masks.cells) / (masks.num * self.share)


@dataclass(frozen=True)
class CoarseToFine(Perturbation):
    """Occlusion that spends its copies where a label's evidence is: large windows first, then halves of the strongest ones.

    Every round splits the `num_splits` windows of an image whose drop, relative to the largest of any explained label, is
    largest. A place's value is the drop of its large window, and what the drops of the smaller windows that hold it differ
    from the mean of their neighbours in the same larger one; each per pixel, times the pixels of a large window. Of a linear
    model that is each smallest window's own sum, however many levels there are.
    """

    window_px: Annotated[int, "side of the largest windows; 0: a quarter of the image's shorter side"] = 0
    finest_px: Annotated[int, "windows of this side or less are not split; 0: a quarter of the largest"] = 0
    num_samples: Annotated[int, "copies of each image at the most; the large windows are always asked about"] = 80
    num_splits: Annotated[int, "windows of an image that are split at once, into four each"] = 4

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("window_px", self.window_px >= 0, "0 or more"),
            ("finest_px", self.finest_px >= 0, "0 or more"),
            ("num_samples", 1 <= self.num_samples <= MOST_SAMPLES, f"1 to {MOST_SAMPLES}"),
            ("num_splits", 1 <= self.num_splits <= 10_000, "1 to 10000"),
        ]

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        size, device = (pixels.shape[2], pixels.shape[3]), pixels.device
        largest = self.window_px or max(1, round(min(size) / 4))
        finest = self.finest_px or max(1, largest // 4)
        window = finest * 2 ** max(0, round(math.log2(largest / finest)))  # so that halves of halves end on the finest
        whole = self._whole(subject, pixels, selection)

        def drops_of(corners: Int64[Tensor, "B M 4"]) -> Float[Tensor, "B M L"]:
            return whole[:, None] - selection.scores(self._answers(subject, pixels, Boxes(size, corners)))

        starts = torch.cartesian_prod(*(torch.arange(0, side, window, device=device) for side in size)).flip(1)
        corners = torch.cat([starts, starts + window], 1).expand(len(pixels), -1, -1)
        drops = _without_rounding(drops_of(corners), whole[:, None])
        boxes, details = [corners], [drops / _area(corners, size)]
        scale = drops.abs().amax(1, keepdim=True).clamp(min=torch.finfo(drops.dtype).tiny)
        strength = (drops / scale).abs().amax(2)
        copies, splits = len(starts), min(self.num_splits, len(starts))
        while copies + 4 * splits <= self.num_samples:
            splittable = corners[..., 2] - corners[..., 0] > finest
            strength = strength.masked_fill(~splittable, 0)
            if not bool(strength.any()):
                break
            chosen = strength.topk(splits).indices
            rank = strength.gather(1, chosen)
            parents = corners.gather(1, chosen[..., None].expand(-1, -1, 4))
            quarters = _quarters(parents)
            parts = drops_of(quarters.flatten(1, 2)).unflatten(1, (splits, 4))
            # An image with nothing left to split waits for the others.
            area = torch.where(rank[:, :, None, None] > 0, _area(quarters, size), 0)
            details.append(_details(parts, area).flatten(1, 2))
            boxes.append(quarters.flatten(1, 2))
            strength = strength.scatter(1, chosen, 0)
            found = torch.where(area[..., 0] > 0, (parts / scale[:, None]).abs().amax(3), 0)
            strength = torch.cat([strength, found.flatten(1)], 1)
            corners = torch.cat([corners, quarters.flatten(1, 2)], 1)
            copies += 4 * splits
        every = torch.cat(boxes, 1)
        cell = [math.gcd(finest, side) for side in size]  # their lines hold all borders of windows and of the image
        ends = [every[..., [1, 3]] // cell[0], every[..., [0, 2]] // cell[1]]
        with torch.autocast(device.type, enabled=False):
            down, across = (inside(ends[axis], size[axis] // cell[axis]) for axis in (0, 1))
            return torch.einsum("bml,bmh,bmw->blhw", torch.cat(details, 1), down, across) * window**2


def _area(corners: Int64[Tensor, "... 4"], size: tuple[int, int]) -> Float[Tensor, "... 1"]:
    """The pixels of boxes, of what of them is in the image."""
    across, down = (
        corners[..., axis + 2].clamp(max=side) - corners[..., axis].clamp(max=side)
        for axis, side in ((0, size[1]), (1, size[0]))
    )
    return (across * down)[..., None].float()


def _details(parts: Float[Tensor, "B m 4 L"], area: Float[Tensor, "B m 4 1"]) -> Float[Tensor, "B m 4 L"]:
    """How each quarter's drop per pixel differs from the mean of its window's quarters; 0 for those of no area."""
    density = torch.where(area > 0, parts / area.clamp(min=1), 0)
    mean = (density * area).sum(2, keepdim=True) / area.sum(2, keepdim=True).clamp(min=1)
    return torch.where(area > 0, density - mean, 0)


def _quarters(corners: Int64[Tensor, "B m 4"]) -> Int64[Tensor, "B m 4 4"]:
    left, top, right, bottom = corners.unbind(-1)
    x, y = (left + right) // 2, (top + bottom) // 2
    rows = [(left, top, x, y), (x, top, right, y), (left, y, x, bottom), (x, y, right, bottom)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


class Windows:
    """Masks that hide one square window each; the same for every image."""

    def __init__(self, size: tuple[int, int], window: int, stride: int, device: torch.device):
        self._size, self._window = size, window
        self._starts = [torch.arange(math.ceil((side - window) / stride) + 1, device=device) * stride for side in size]
        # The side of the largest cells whose lines hold all borders of windows and of the image.
        self._cells = [math.gcd(stride, window, side) for side in size]
        self._pixels = [self._inside(axis, 1) for axis in (0, 1)]
        self.num = len(self._starts[0]) * len(self._starts[1])

    def keep(self, images: Int64[Tensor, " n"], numbers: Int64[Tensor, " n"]) -> Float[Tensor, "n H W"]:
        row, column = numbers // len(self._starts[1]), numbers % len(self._starts[1])
        down, across = self._pixels[0][row], self._pixels[1][column]
        return 1 - down[:, :, None] * across[:, None]

    def fold(self, drops: Float[Tensor, "B M L"]) -> Float[Tensor, "B L h w"]:
        """The mean of the windows that cover each cell; rows and columns one after the other."""
        drops = drops.unflatten(1, (len(self._starts[0]), len(self._starts[1])))
        down, across = (self._inside(axis, self._cells[axis]) for axis in (0, 1))
        return torch.einsum("brcl,rh,cw->blhw", drops, down / down.sum(0), across / across.sum(0))

    def _inside(self, axis: int, cell: int) -> Float[Tensor, "windows cells"]:
        """Which cells of `cell` pixels each window holds, along one axis."""
        start = self._starts[axis]
        return inside(torch.stack([start, start + self._window], 1) // cell, self._size[axis] // cell)


class Boxes:
    """Masks that hide one rectangle each, an image's own ones.

    Args:
        corners: `[B, M, 4]`: left, top, right and bottom in pixels, right and bottom not included; a box may reach beyond
            the image.
    """

    def __init__(self, size: tuple[int, int], corners: Int64[Tensor, "B M 4"]):
        self._size, self._corners, self.num = size, corners, corners.shape[1]

    def keep(self, images: Int64[Tensor, " n"], numbers: Int64[Tensor, " n"]) -> Float[Tensor, "n H W"]:
        corners = self._corners[images, numbers]
        down, across = (inside(corners[:, [axis, axis + 2]], self._size[1 - axis]) for axis in (1, 0))
        return 1 - down[:, :, None] * across[:, None]


def inside(ends: Int64[Tensor, "... 2"], num: int) -> Float[Tensor, "... num"]:
    """Which of `num` places in a row are from the first end on and before the second."""
    place = torch.arange(num, device=ends.device)
    return ((place >= ends[..., :1]) & (place < ends[..., 1:])).float()


class Segments:
    """Masks that keep some segments of an image.

    Attributes:
        design: `[B, M, S]`: 1 where a mask keeps a segment; S is the most that an image has, the rest is never kept.
        members: `[B, S, h, w]`: the share of each segment in each cell.
    """

    def __init__(self, segments: Int64[Tensor, "B H W"], design: Float[Tensor, "B M S"], cell_px: int):
        self._segments, self.design, self.num = segments, design.to(segments.device), design.shape[1]
        # An image at a time: of all at once the pixels' membership would be large.
        members = (F.one_hot(one, design.shape[2]).permute(2, 0, 1).float() for one in segments)
        self.members = torch.stack([_cells(one, cell_px) for one in members])

    def keep(self, images: Int64[Tensor, " n"], numbers: Int64[Tensor, " n"]) -> Float[Tensor, "n H W"]:
        kept = self.design[images, numbers]
        return kept.gather(1, self._segments[images].flatten(1)).view(-1, *self._segments.shape[1:])

    def paint(self, values: Float[Tensor, "B S L"]) -> Float[Tensor, "B L h w"]:
        """The segments' values, each where its segment is."""
        with torch.autocast(values.device.type, enabled=False):
            return torch.einsum("bsl,bshw->blhw", values.float(), self.members)


def _count(segments: Int64[Tensor, "B H W"]) -> Int64[Tensor, " B"]:
    return segments.flatten(1).amax(1) + 1


def coin_flips(counts: Int64[Tensor, " B"], num_samples: int) -> Float[Tensor, "B M S"]:
    """Each segment kept with probability one half; the first sample keeps all. LIME's design."""
    design = torch.zeros(len(counts), num_samples, int(counts.max()))
    for one, count in zip(design, counts.tolist(), strict=True):
        random = torch.Generator().manual_seed(torch.initial_seed())  # whatever images are beside it
        one[:, :count] = torch.randint(2, (num_samples, count), generator=random)
        one[0, :count] = 1
    return design


def coalitions(counts: Int64[Tensor, " B"], num_samples: int) -> tuple[Float[Tensor, "B M S"], Float[Tensor, "B M"]]:
    """KernelSHAP's design: all segments, none, then sub-sets and their complements; and what each sample weighs.

    Every sub-set once, by its kernel weight, where that takes no more samples; else a sub-set's size is drawn by the weight
    of all sub-sets of that size, and samples weigh the same.
    """
    design = torch.zeros(len(counts), num_samples, int(counts.max()))
    weights = torch.zeros(len(counts), num_samples)
    for one, weight, count in zip(design, weights, counts.tolist(), strict=True):
        one[0, :count] = 1
        if 2**count <= num_samples:
            codes = torch.arange(1, 2**count - 1)[:, None]
            rows = ((codes >> torch.arange(count)) & 1).float()
            sizes = rows.sum(1).long().tolist()
            kernel = [(count - 1) / (math.comb(count, size) * size * (count - size)) for size in sizes]
            one[2 : 2 + len(rows), :count], weight[2 : 2 + len(rows)] = rows, torch.tensor(kernel)
            continue
        random = torch.Generator().manual_seed(torch.initial_seed())  # whatever images are beside it
        size = torch.arange(1, count)
        pairs = (num_samples - 2) // 2
        sizes = 1 + torch.multinomial(1 / (size * (count - size)), pairs, replacement=True, generator=random)
        order = torch.rand(pairs, count, generator=random).argsort(1).argsort(1)
        rows = (order < sizes[:, None]).float()
        one[2 : 2 + 2 * pairs : 2, :count], one[3 : 3 + 2 * pairs : 2, :count] = rows, 1 - rows
        weight[2 : 2 + 2 * pairs] = 1
    return design, weights


class SmoothGrids:
    """RISE's masks: small random grids, enlarged bilinearly to more than the image and cut at a random place.

    Attributes:
        cells: `[M, h, w]`: the mean of each mask over each cell of the map that is to be made.
    """

    def __init__(
        self,
        size: tuple[int, int],
        num_samples: int,
        grid: int,
        share: float,
        cell_px: int,
        device: torch.device,
    ):
        self.num, self._size, self._cell = num_samples, size, tuple(math.ceil(side / grid) for side in size)
        self._grids = (torch.rand(num_samples, 1, grid + 1, grid + 1) < share).float().to(device)
        self._shifts = torch.stack([torch.randint(cell, (num_samples,)) for cell in self._cell], 1).to(device)
        every = torch.arange(num_samples, device=device)
        parts = [_cells(self.keep(part, part), cell_px) for part in every.split(64)]
        self.cells = torch.cat(parts)

    def keep(self, images: Int64[Tensor, " n"], numbers: Int64[Tensor, " n"]) -> Float[Tensor, "n H W"]:
        grids, shifts = self._grids[numbers], self._shifts[numbers]
        side = self._grids.shape[-1]
        large = F.interpolate(grids, (side * self._cell[0], side * self._cell[1]), mode="bilinear")[:, 0]
        rows = shifts[:, :1] + torch.arange(self._size[0], device=grids.device)
        columns = shifts[:, 1:] + torch.arange(self._size[1], device=grids.device)
        return large.gather(1, rows[:, :, None].expand(-1, -1, large.shape[2])).gather(
            2, columns[:, None].expand(-1, self._size[0], -1)
        )


def _cells(maps: Float[Tensor, "... H W"], cell_px: int) -> Float[Tensor, "... h w"]:
    """The means of square cells; smaller ones where the side does not divide the image."""
    cell = tuple(math.gcd(cell_px, side) for side in maps.shape[-2:])
    return F.avg_pool2d(maps.flatten(0, -3)[:, None], cell)[:, 0].unflatten(0, maps.shape[:-2])


def slic_segments(
    pixels: Float[Tensor, "B in_chans H W"], num_segments: int, compactness: float
) -> Int64[Tensor, "B H W"]:
    """SLIC superpixels of each image, numbered from 0 without gaps."""
    from skimage.segmentation import slic  # a second to import

    found = [
        slic(image, n_segments=num_segments, compactness=compactness, sigma=1, start_label=0, channel_axis=-1)
        for image in pixels.float().permute(0, 2, 3, 1).cpu().numpy().astype(np.float64)
    ]
    numbered = [np.unique(segments, return_inverse=True)[1].reshape(segments.shape) for segments in found]
    return torch.from_numpy(np.stack(numbered)).to(pixels.device)


def weighted_ridge(
    design: Float[Tensor, "B M S"], weights: Float[Tensor, "B M"], values: Float[Tensor, "B M L"], penalty: float
) -> Float[Tensor, "B S L"]:
    """Coefficients of weighted ridge regressions with a free intercept, of all labels from one factorisation, in float64.

    argmin over beta, b of sum_i weights_i (values_il - design_i beta_l - b_l)^2 + penalty |beta_l|^2. Without a penalty
    columns that the design does not tell apart share their effect equally (least norm).
    """
    design, weights, values = design.double(), weights.double(), values.double()
    total = weights.sum(1)[:, None, None]
    weights = weights[:, :, None]
    x = design - (weights * design).sum(1, keepdim=True) / total
    y = values - (weights * values).sum(1, keepdim=True) / total
    normal, right = (weights * x).mT @ x, (weights * x).mT @ y
    if penalty == 0:
        return torch.linalg.pinv(normal, hermitian=True) @ right
    identity = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(normal + penalty * identity))


def shapley_values(
    design: Float[Tensor, "B M S"], weights: Float[Tensor, "B M"], gains: Float[Tensor, "B M L"]
) -> Float[Tensor, "B S L"]:
    """argmin over phi of sum_i weights_i (gains_il - design_i phi_l)^2 where sum_s phi_sl = gains_0l, in float64.

    The first sample keeps all segments; gains are over the sample that keeps none.
    """
    design, weights, gains = design.double(), weights.double(), gains.double()
    weighted = (weights[:, :, None] * design).mT
    present = design[:, :1].mT  # of the S segments, those that an image has
    corner = torch.zeros_like(present[:, :1])
    system = torch.cat([torch.cat([weighted @ design, present], 2), torch.cat([present.mT, corner], 2)], 1)
    right = torch.cat([weighted @ gains, gains[:, :1]], 1)
    return (torch.linalg.pinv(system, hermitian=True) @ right)[:, :-1]


def perturbed_logits(
    subject: Subject,
    pixels: Float[Tensor, "B in_chans H W"],
    masks: Masks,
    *,
    baseline: str = "mean",
    batch_size: int = 0,
    precision: str = "",
) -> Float[Tensor, "B M C"]:
    """The model's answers, float32, to every masked copy of every image; half a batch where the device's memory is short.

    Raises:
        InputError: dropped tokens of a model that is no plain ViT.
    """
    drop = baseline == "drop"
    ask = _without_tokens(subject, pixels) if drop else None
    fill = None if drop else fill_in(pixels, baseline)
    total = len(pixels) * masks.num
    answers: list[Tensor] = []
    step = batch_size or _batch_size(pixels)
    start = 0
    with torch.inference_mode(), _autocast(precision, pixels.device):
        while start < total:
            which = torch.arange(start, min(start + step, total), device=pixels.device)
            images, numbers = which // masks.num, which % masks.num
            try:
                keep = masks.keep(images, numbers)
                if ask is not None:
                    logits = ask(images, keep)
                else:
                    assert fill is not None
                    copies = fill(images, keep).contiguous(memory_format=torch.channels_last)
                    logits = subject.logits(copies)
            except torch.OutOfMemoryError:
                if step == 1:
                    raise
                step = max(1, step // 2)
                continue
            answers.append(logits.float())
            start += len(which)
    return torch.cat(answers).clone().unflatten(0, (len(pixels), masks.num))


def _without_rounding(differences: Float[Tensor, "B M L"], scores: Float[Tensor, "B #M L"]) -> Float[Tensor, "B M L"]:
    """0 where no difference of a label is more than the rounding of its scores: nothing that was hidden mattered."""
    least = 1e-5 * scores.abs().amax(1, keepdim=True)
    return torch.where(differences.abs().amax(1, keepdim=True) > least, differences, 0)


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What `precision` names; the caller's own where it names none."""
    if not precision:
        return nullcontext()
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _batch_size(pixels: Float[Tensor, "B in_chans H W"]) -> int:
    """As many pixels as 8 images of 224 have on a CPU, which larger batches make slower; 32 times that on a GPU."""
    most = 8 * 224 * 224 * (1 if pixels.device.type == "cpu" else 32)
    return max(1, min(256, most // (pixels.shape[2] * pixels.shape[3])))


class _WithoutTokens:
    """A plain ViT that is not shown the patches that a mask hides, rather than shown paint."""

    def __init__(self, subject: Subject, pixels: Tensor):
        assert subject.backbone is not None
        self._subject, self._backbone = subject, subject.backbone
        self._grid = self._backbone.grid_at((pixels.shape[2], pixels.shape[3]))
        with torch.no_grad():
            self._tokens = embed_patches(self._backbone.model, subject.normalise(pixels))

    def __call__(self, images: Int64[Tensor, " n"], keep: Float[Tensor, "n H W"]) -> Float[Tensor, "n C"]:
        model, num_prefix = self._backbone.model, self._backbone.num_prefix_tokens
        share = F.adaptive_avg_pool2d(keep[:, None], self._grid).flatten(1)
        shown = (share >= 0.5) | (
            share == share.amax(1, keepdim=True)
        )  # one at least: some models pool the patches alone
        order = (~shown).long().argsort(dim=1, stable=True) + num_prefix
        prefix = torch.arange(num_prefix, device=order.device).expand(len(order), -1)
        counts = shown.sum(1)
        logits: Tensor | None = None
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            kept = torch.cat([prefix[rows], order[rows, :count]], 1)
            tokens = self._tokens[images[rows]]
            tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
            tokens = model.norm(model.blocks(tokens))
            found = self._subject.read(tokens, tokens[:, num_prefix:].mT[..., None])
            logits = found.new_empty(len(order), found.shape[1]) if logits is None else logits
            logits[rows] = found
        assert logits is not None
        return logits


def _without_tokens(subject: Subject, pixels: Tensor) -> _WithoutTokens:
    if subject.backbone is None or not is_plain_vit(subject.backbone.model):
        raise InputError(
            "baseline: drop leaves out the tokens of a ViT; this model is none that can do without (take another)"
        )
    return _WithoutTokens(subject, pixels)
