"""The records that cross rooms.

Shape letters, here and everywhere: B images, C classes, D feature width; H, W image pixels; h, w cells of a feature grid
or label map (rows first).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor


@dataclass
class CropBox:
    """The part of each full image that a view shows.

    Attributes:
        boxes: `[B, 4]` float, x1, y1, x2, y2 in [0, 1] of the full image, x first.
        flipped: `[B]` bool, True where the view was mirrored left to right after the crop; None where none was.
        quarter_turns: `[B]` int64, how often the view was then turned by 90 degrees counter-clockwise; None where none was.
    """

    boxes: Float[Tensor, "B 4"]
    flipped: Bool[Tensor, " B"] | None = None
    quarter_turns: Int64[Tensor, " B"] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "CropBox":
        return self._each(lambda column: column.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "CropBox":
        return self._each(lambda column: column.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "CropBox":
        columns = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{name: change(column) for name, column in columns if column is not None})


@dataclass
class Batch:
    """One step's input.

    Attributes:
        images: `[B, in_chans, H, W]` uint8, or float32 in [0, 1]; never normalised (a Method does that itself).
        targets: `[B, C]` float32: 1 present, 0 absent, NaN unknown.
        index: `[B]` int64, the row of each image in the manifest.
        view: what part of each full image `images` shows. With several views of an image, they are adjacent.
    """

    images: Shaped[Tensor, "B in_chans H W"]
    targets: Float[Tensor, "B C"]
    index: Int64[Tensor, " B"]
    view: CropBox

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        return Batch(**moved)

    def pin_memory(self) -> "Batch":
        """What torch's DataLoader calls where a GPU is used."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


@dataclass
class StepOutput:
    """What a Method's forward gives to the loop: a scalar loss with its graph, and detached scalar tensors to log."""

    loss: Float[Tensor, ""]
    logs: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Features:
    """What a backbone gives to a head: `map` `[B, D, h, w]` and its pooled form `[B, P]`.

    P is D, except in networks with further layers after the pooling (MobileNetV3, VGG, ...).
    """

    map: Float[Tensor, "B D h w"]
    pooled: Float[Tensor, "B P"]


@dataclass
class HeadOutput:
    """What a head gives: `logits` `[B, C]`, and where it has them `maps` `[B, C, h, w]` and `embedding` `[B, D]`."""

    logits: Float[Tensor, "B C"]
    maps: Float[Tensor, "B C h w"] | None = None
    embedding: Float[Tensor, "B D"] | None = None
