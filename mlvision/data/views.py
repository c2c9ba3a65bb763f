"""Views: what a model sees of an image, with the exact box of the full image that it shows.

A training view is a random crop, then a flip, then changes of colour, then a cutout, then quarter turns. Nothing after the
crop moves a pixel but flip and turns, so box, flip and turns say where each pixel came from. Images stay in the decoder's
memory order, channels last.
"""

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from mlvision.errors import InputError, check_fields
from mlvision.options import EVALUATION

Box = tuple[float, float, float, float]
# An image and a seed to a view's pixels, its box x1, y1, x2, y2 in pixels of the image, and whether it was flipped.
Pipeline = Callable[
    [Shaped[np.ndarray, "H0 W0 C"], int], tuple[Shaped[Tensor, "C H W"], tuple[int, int, int, int], bool]
]

INTERPOLATIONS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
EVAL_RESIZES = ("squash", "crop")
_COLOUR_OPTIONS = ("color_jitter", "hue", "randaugment_ops", "cutout")


MOST_PIXELS = 4096  # of an input's side


@dataclass(frozen=True)
class ViewConfig:
    """How training and evaluation views are made."""

    size: Annotated[int, "side of the square input, pixels", EVALUATION] = 224
    backend: Annotated[str, "library that makes training views: albumentations or torchvision"] = "albumentations"
    scale: Annotated[tuple[float, float], "random crop: least and largest share of the image's area"] = (0.08, 1.0)
    ratio: Annotated[tuple[float, float], "random crop: least and largest width / height"] = (3 / 4, 4 / 3)
    flip: Annotated[float, "probability of a left-right flip"] = 0.5
    quarter_turns: Annotated[
        bool, "turn each view by 0, 90, 180 or 270 degrees: for aerial images, which have no up"
    ] = False
    color_jitter: Annotated[float, "brightness, contrast and saturation are scaled by up to 1 +- this"] = 0.0
    hue: Annotated[float, "hue is turned by up to this share of the colour circle, at most 0.5"] = 0.0
    randaugment_ops: Annotated[int, "RandAugment operations for each view, photometric ones only"] = 0
    randaugment_magnitude: Annotated[float, "their strength, 0 to 10"] = 9.0
    cutout: Annotated[float, "side of one square of random colour, as a share of the view's side; 0: none"] = 0.0
    eval_size: Annotated[
        int, "side of the square input at evaluation; 0: size. Crops enlarge, so a little more suits CNNs", EVALUATION
    ] = 0
    eval_resize: Annotated[str, "squash: the whole image, aspect lost; crop: the centre, aspect kept", EVALUATION] = (
        "squash"
    )
    crop_pct: Annotated[
        float | None, "crop: share of the short side that is kept; null: the weights' own", EVALUATION
    ] = None
    interpolation: Annotated[str, "bilinear or bicubic; empty: the weights' own", EVALUATION] = ""

    def __post_init__(self) -> None:
        share = "a number from 0 to 1"
        rules = (
            ("size", 1 <= self.size <= MOST_PIXELS, f"1 to {MOST_PIXELS}"),
            ("eval_size", 0 <= self.eval_size <= MOST_PIXELS, f"0 (as size) to {MOST_PIXELS}"),
            ("backend", self.backend in BACKENDS, f"one of {', '.join(BACKENDS)}"),
            ("scale", _is_range(self.scale, 1.0), "[min, max] with 0 < min <= max <= 1"),
            ("ratio", _is_range(self.ratio, math.inf), "[min, max] with 0 < min <= max"),
            ("flip", 0 <= self.flip <= 1, share),
            ("color_jitter", 0 <= self.color_jitter <= 1, share),
            ("hue", 0 <= self.hue <= 0.5, "a number from 0 to 0.5"),
            ("randaugment_ops", 0 <= self.randaugment_ops <= 100, "0 to 100"),
            ("randaugment_magnitude", 0 <= self.randaugment_magnitude <= 10, "a number from 0 to 10"),
            ("cutout", 0 <= self.cutout < 1, "a number from 0 to below 1"),
            ("eval_resize", self.eval_resize in EVAL_RESIZES, f"one of {', '.join(EVAL_RESIZES)}"),
            ("crop_pct", self.crop_pct is None or 0 < self.crop_pct <= 1, "a number above 0, at most 1, or null"),
            ("interpolation", self.interpolation in ("", *INTERPOLATIONS), f"one of {', '.join(INTERPOLATIONS)}"),
        )
        check_fields(self, "view.", rules)

    @property
    def eval_side(self) -> int:
        """Side of the square input at evaluation, pixels: Touvron et al., "Fixing the train-test resolution discrepancy",
        NeurIPS 2019, without its fine-tuning."""
        return self.eval_size or self.size


def check_channels(config: ViewConfig, num_channels: int) -> None:
    """Refuses changes of colour for images that are no colour pictures.

    Raises:
        InputError: naming the option.
    """
    if num_channels == 3:
        return
    for option in _COLOUR_OPTIONS:
        if getattr(config, option):
            raise InputError(
                f"view.{option}: expected 0 for images of {num_channels} channels (changes of colour are for red, green and "
                f"blue), got {getattr(config, option)}"
            )


def _is_range(limits: tuple[float, float], largest: float) -> bool:
    return 0 < limits[0] <= limits[1] <= largest


@dataclass(frozen=True)
class View:
    """One view of one image.

    Attributes:
        image: `[C, H, W]` uint8, or float32 in [0, 1] of bands; channels last in memory.
        box: x1, y1, x2, y2 in [0, 1] of the full image: the part that `image` shows.
        flipped: whether it was mirrored left to right after the crop.
        quarter_turns: how often it was turned by 90 degrees counter-clockwise, after everything else.
    """

    image: Shaped[Tensor, "C H W"]
    box: Box
    flipped: bool
    quarter_turns: int = 0


class TrainView:
    """A random view; the seed alone determines it.

    The view is the same for any number of workers, and is the same box and flip with and without changes of colour.
    The two backends draw from the same distributions, not the same numbers.
    """

    def __init__(self, config: ViewConfig, size: tuple[int, int] | None = None) -> None:
        """`size`: (H, W) in pixels where the view is not a square of `config.size`."""
        self.config = config
        self.size = (config.size, config.size) if size is None else size
        if config.quarter_turns and self.size[0] != self.size[1]:
            raise InputError(f"view.quarter_turns: expected square views, got {self.size[0]}x{self.size[1]} (H x W)")
        self._pipeline = BACKENDS[config.backend](config, self.size)

    def __call__(self, image: Shaped[np.ndarray, "H0 W0 C"], seed: int) -> View:
        check_channels(self.config, image.shape[2])
        pixels, (x1, y1, x2, y2), flipped = self._pipeline(image, seed)
        height, width = image.shape[:2]
        turns = 0
        if self.config.quarter_turns:
            # Drawn apart from the pipeline, so that box and flip are those of the view without turns.
            turns = int(np.random.SeedSequence(seed, spawn_key=(0,)).generate_state(1)[0] % 4)
            pixels = torch.rot90(pixels, turns, dims=(1, 2))
        return View(pixels, (x1 / width, y1 / height, x2 / width, y2 / height), flipped, turns)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pipelines hold functions that cannot be pickled; a worker that was not forked builds its own.
        return TrainView, (self.config, self.size)


class EvalView:
    """The view that evaluation, teachers and prediction use; the same for every seed.

    `squash` resizes the whole image to (H, W). `crop` resizes it, aspect kept, until it just covers (H, W) / crop_pct
    (rounded down), and takes the centre, as timm does.
    """

    def __init__(
        self,
        size: tuple[int, int],
        interpolation: str = "bilinear",
        eval_resize: str = "squash",
        crop_pct: float = 1.0,
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            raise InputError(f"view.interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        if eval_resize not in EVAL_RESIZES:
            raise InputError(f"view.eval_resize: expected one of {', '.join(EVAL_RESIZES)}, got {eval_resize!r}")
        self.size = size
        self.interpolation = interpolation
        self.eval_resize = eval_resize
        self.crop_pct = crop_pct

    def __call__(self, image: Shaped[np.ndarray, "H0 W0 C"], seed: int = 0) -> View:
        if self.eval_resize == "squash":
            return View(_resize(image, self.size, self.interpolation), (0.0, 0.0, 1.0, 1.0), False)
        height, width = self._covering_size(*image.shape[:2])
        resized = _resize(image, (height, width), self.interpolation)
        top, left = round((height - self.size[0]) / 2), round((width - self.size[1]) / 2)
        bottom, right = top + self.size[0], left + self.size[1]
        box = (left / width, top / height, right / width, bottom / height)
        return View(resized[:, top:bottom, left:right], box, False)

    def _covering_size(self, height: int, width: int) -> tuple[int, int]:
        """The size of the whole resized image, of which the centre is taken."""
        least_height, least_width = (math.floor(side / self.crop_pct) for side in self.size)
        if height * least_width <= width * least_height:
            return least_height, width * least_height // height
        return height * least_width // width, least_width


def _resize(image: Shaped[np.ndarray, "h w C"], size: tuple[int, int], interpolation: str) -> Shaped[Tensor, "C H W"]:
    """The one resizer, antialiased where it shrinks.

    Mean difference to Pillow's antialiased resize, in grey levels, for random crops of 500x375 photographs to 128 px
    (to 224 px): this 0.01 (0.02); OpenCV's area 1.2 (0.5); OpenCV's linear, albumentations' default, 2.9 (0.9). It
    takes about half the time of OpenCV's area.
    """
    # Contiguous first: torch is faster on it and then gives channels-last back. Writable: torch warns otherwise.
    pixels = torch.from_numpy(np.require(image, requirements=("C", "W")))
    resized = F.resize(pixels.permute(2, 0, 1), list(size), INTERPOLATIONS[interpolation], antialias=True)
    # Bicubic overshoots; of uint8, torch clips that itself.
    return resized.clamp(0, 1) if resized.is_floating_point() else resized


def _albumentations_pipeline(config: ViewConfig, size: tuple[int, int]) -> Pipeline:
    """Training views by albumentations: add a step by adding a line, after the flip."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else importing it asks the network for a newer version
    import albumentations as A

    interpolation = config.interpolation or "bilinear"

    class ResizedCrop(A.RandomResizedCrop):
        def apply(self, img: np.ndarray, crop_coords: tuple[int, int, int, int], **params: Any) -> np.ndarray:
            x1, y1, x2, y2 = crop_coords
            return _resize(img[y1:y2, x1:x2], size, interpolation).permute(1, 2, 0).numpy()

    steps = [
        ResizedCrop(size, scale=config.scale, ratio=config.ratio, p=1),
        A.HorizontalFlip(p=config.flip),
    ]
    if config.color_jitter or config.hue:
        jitter = config.color_jitter
        steps += [A.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter, hue=config.hue, p=1)]
    if config.randaugment_ops:
        operations = A.OneOf(_albumentations_operations(config.randaugment_magnitude), p=1)
        steps += [operations] * config.randaugment_ops
    if config.cutout:
        sides = (config.cutout, config.cutout)
        steps += [A.CoarseDropout((1, 1), hole_height_range=sides, hole_width_range=sides, fill="random_uniform", p=1)]
    compose = A.Compose(steps, save_applied_params=True)

    def pipeline(image: np.ndarray, seed: int) -> tuple[Tensor, tuple[int, int, int, int], bool]:
        # Not set_random_seed: it starts every step's own generator at the same number, and the draw that makes a crop
        # small would be the draw that flips it.
        compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = compose(image=image)
        applied = dict(result["applied_transforms"])
        pixels = torch.from_numpy(result["image"]).permute(2, 0, 1)
        return pixels, applied["ResizedCrop"]["crop_coords"], "HorizontalFlip" in applied

    return pipeline


def _torchvision_pipeline(config: ViewConfig, size: tuple[int, int]) -> Pipeline:
    """The same views by torchvision alone: what remains when albumentations, no longer maintained, stops working."""
    interpolation = config.interpolation or "bilinear"
    crop = v2.RandomResizedCrop(size, scale=config.scale, ratio=config.ratio)
    steps = []
    if config.color_jitter or config.hue:
        jitter = config.color_jitter
        steps += [v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter, hue=config.hue)]
    if config.randaugment_ops:
        operations = v2.RandomChoice(_torchvision_operations(config.randaugment_magnitude))
        steps += [operations] * config.randaugment_ops
    if config.cutout:
        steps += [lambda image: _cut_out(image, config.cutout)]

    def pipeline(image: np.ndarray, seed: int) -> tuple[Tensor, tuple[int, int, int, int], bool]:
        # The CPU's generator only: torch.manual_seed would also seed the GPUs, and leave them so.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            drawn = crop.make_params([torch.from_numpy(image).permute(2, 0, 1)])
            y1, x1 = drawn["top"], drawn["left"]
            y2, x2 = y1 + drawn["height"], x1 + drawn["width"]
            pixels = _resize(image[y1:y2, x1:x2], size, interpolation)
            flipped = torch.rand(()).item() < config.flip
            if flipped:
                pixels = F.horizontal_flip(pixels)
            for step in steps:
                pixels = step(pixels)
        return pixels, (x1, y1, x2, y2), flipped

    return pipeline


BACKENDS: dict[str, Callable[[ViewConfig, tuple[int, int]], Pipeline]] = {
    "albumentations": _albumentations_pipeline,
    "torchvision": _torchvision_pipeline,
}


# RandAugment's operations at a magnitude of 0 to 10, in one order for both libraries.
#
# Source: Cubuk et al., RandAugment, CVPR workshops 2020; the ranges are those of torchvision.transforms.RandAugment.
# DEVIATION: the five geometric operations are left out, for they would make the crop box a lie. Brightness, contrast
# and saturation are drawn evenly up to their strength, not as one of its two ends; sharpness is only ever raised.


def _albumentations_operations(magnitude: float) -> list[Any]:
    import albumentations as A

    strength, bits, threshold = _operation_strengths(magnitude)
    # Pillow's "sharpness" adds (factor - 1) * (8 pixel - sum of its neighbours) / 13; albumentations leaves out the 13.
    sharpness = strength / 13
    return [
        A.NoOp(p=1),
        A.AutoContrast(method="pil", p=1),
        A.Equalize(p=1),
        A.Posterize(num_bits=(bits, bits), p=1),
        A.Solarize(threshold_range=(threshold, threshold), p=1),
        A.Sharpen(alpha=(sharpness, sharpness), lightness=(1, 1), p=1),
        A.ColorJitter(brightness=strength, contrast=0, saturation=0, hue=0, p=1),
        A.ColorJitter(brightness=0, contrast=strength, saturation=0, hue=0, p=1),
        A.ColorJitter(brightness=0, contrast=0, saturation=strength, hue=0, p=1),
    ]


def _torchvision_operations(magnitude: float) -> list[Any]:
    strength, bits, threshold = _operation_strengths(magnitude)
    return [
        v2.Identity(),
        v2.RandomAutocontrast(p=1),
        v2.RandomEqualize(p=1),
        v2.RandomPosterize(bits, p=1),
        v2.RandomSolarize(threshold * 255, p=1),
        v2.RandomAdjustSharpness(1 + strength, p=1),
        v2.ColorJitter(brightness=strength),
        v2.ColorJitter(contrast=strength),
        v2.ColorJitter(saturation=strength),
    ]


def _operation_strengths(magnitude: float) -> tuple[float, int, float]:
    """How far a factor may be from 1, the bits that posterize keeps, the share of white from which solarize inverts."""
    return 0.09 * magnitude, 8 - round(0.4 * magnitude), 1 - magnitude / 10


def _cut_out(image: UInt8[Tensor, "3 H W"], share: float) -> UInt8[Tensor, "3 H W"]:
    """Fills one rectangle, `share` of each side and wholly inside the image, with one random colour."""
    image_height, image_width = image.shape[-2:]
    height, width = int(image_height * share), int(image_width * share)
    top = torch.randint(image_height - height + 1, ()).item()
    left = torch.randint(image_width - width + 1, ()).item()
    image = image.clone()
    image[:, top : top + height, left : left + width] = torch.randint(256, (3, 1, 1), dtype=torch.uint8)
    return image
