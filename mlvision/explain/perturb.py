"""Explanations by what changes when parts of the image are hidden: one engine for Occlusion, LIME and RISE.

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
from skimage.segmentation import slic
from torch import Tensor
from torch.nn import functional as F

from mlvision.errors import InputError, check_fields
from mlvision.explain.impute import BASELINES, fill_in
from mlvision.explain.selection import Selection
from mlvision.explain.subject import Subject
from mlvision.models.backbone import embed_patches, is_plain_vit
from mlvision.types import Features

PRECISIONS = ("", "fp32", "bf16", "fp16")


@runtime_checkable
class Masks(Protocol):
    """`num` masks of each image, made when they are needed: all of them would not fit into memory."""

    num: int

    def keep(self, images: Int64[Tensor, " n"], numbers: Int64[Tensor, " n"]) -> Float[Tensor, "n H W"]:
        """Of some (image, mask): 1 where the pixel is kept, 0 where it is hidden."""
        ...


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
        with (
            torch.no_grad(),
            _autocast(self.precision, pixels.device),
        ):  # as of the copies
            whole = selection.scores(subject.logits(pixels).float())
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
            ("num_segments", self.num_segments >= 2, "2 or more"),
            ("num_samples", self.num_samples >= 2, "2 or more"),
            ("ridge", self.ridge >= 0, "0 or more"),
            ("kernel_width", self.kernel_width > 0, "more than 0"),
            ("cell_px", self.cell_px >= 1, "1 or more"),
        ]

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        segments = slic_segments(pixels, self.num_segments, self.compactness)
        masks = Segments(segments, self.num_samples, self.cell_px)
        scores = selection.scores(self._answers(subject, pixels, masks))
        scores = _without_rounding(scores - scores[:, :1], scores)  # the first copy is the image itself
        shares = masks.design.sum(2) / masks.counts[:, None]
        distance = 1 - shares.clamp(min=0).sqrt()  # of a 0-1 vector from all ones, by the cosine
        weights = (-distance.square() / (2 * self.kernel_width**2)).exp()
        coefficients = weighted_ridge(masks.design, weights, scores, self.ridge)
        with torch.autocast(pixels.device.type, enabled=False):
            return torch.einsum("bsl,bshw->blhw", coefficients.float(), masks.members)


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
            ("num_samples", self.num_samples >= 2, "2 or more"),
            ("grid", self.grid >= 1, "1 or more"),
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
        start = self._starts[axis][:, None]
        place = torch.arange(0, self._size[axis], cell, device=start.device)
        return ((place >= start) & (place < start + self._window)).float()


class Segments:
    """Masks that keep each segment of an image with probability one half; the first keeps all.

    Attributes:
        design: `[B, M, S]`: 1 where a mask keeps a segment; S is the most that an image has, the rest is never kept.
        counts: `[B]`: how many segments each image has.
        members: `[B, S, h, w]`: the share of each segment in each cell.
    """

    def __init__(self, segments: Int64[Tensor, "B H W"], num_samples: int, cell_px: int):
        self._segments, self.num = segments, num_samples
        self.counts = segments.flatten(1).amax(1) + 1
        most = int(self.counts.max())
        design = torch.zeros(len(segments), num_samples, most)
        for one, count in zip(design, self.counts.tolist(), strict=True):
            random = torch.Generator().manual_seed(torch.initial_seed())  # whatever images are beside it
            one[:, :count] = torch.randint(2, (num_samples, count), generator=random)
            one[0, :count] = 1
        self.design = design.to(segments.device)
        # An image at a time: of all at once the pixels' membership would be large.
        members = (F.one_hot(one, most).permute(2, 0, 1).float() for one in segments)
        self.members = torch.stack([_cells(one, cell_px) for one in members])

    def keep(self, images: Int64[Tensor, " n"], numbers: Int64[Tensor, " n"]) -> Float[Tensor, "n H W"]:
        kept = self.design[images, numbers]
        return kept.gather(1, self._segments[images].flatten(1)).view(-1, *self._segments.shape[1:])


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
        assert subject.classifier is not None
        self._subject, self._backbone = subject, subject.classifier.backbone
        with torch.no_grad():
            self._tokens = embed_patches(self._backbone.model, subject.normalise(pixels))  # pyright: ignore[reportArgumentType]

    def __call__(self, images: Int64[Tensor, " n"], keep: Float[Tensor, "n H W"]) -> Float[Tensor, "n C"]:
        model, num_prefix = self._backbone.model, self._backbone._num_prefix_tokens
        share = F.adaptive_avg_pool2d(keep[:, None], self._backbone.grid).flatten(1)
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
            pooled = model.forward_head(tokens, pre_logits=True).flatten(1)
            found = self._subject.logits_of(Features(tokens.mT[..., None], pooled))
            logits = found.new_empty(len(order), found.shape[1]) if logits is None else logits
            logits[rows] = found
        assert logits is not None
        return logits


def _without_tokens(subject: Subject, pixels: Tensor) -> _WithoutTokens:
    if subject.classifier is None or not is_plain_vit(subject.classifier.backbone.model):
        raise InputError(
            "baseline: drop leaves out the tokens of a ViT; this model is none that can do without (take another)"
        )
    return _WithoutTokens(subject, pixels)
