"""Maps that know nothing of the model: what an explainer has to beat before its figures mean anything."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mlvision.errors import check_fields
from mlvision.explain.selection import Selection
from mlvision.explain.subject import Subject


@dataclass(frozen=True)
class RandomMap:
    """Uniform noise, another for every label."""

    cells: Annotated[int, "along each side"] = 7
    label_specific = True

    def __post_init__(self) -> None:
        check_fields(self, "", [("cells", 1 <= self.cells <= 256, "1 to 256")])

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        return torch.rand(*selection.labels.shape, self.cells, self.cells).to(pixels.device)


@dataclass(frozen=True)
class CentreMap:
    """A Gaussian at the image's centre, its sigma a quarter of each side: photographers' objects are in the middle."""

    cells: Annotated[int, "along each side; odd, so that the peak is the centre"] = 15
    label_specific = False

    def __post_init__(self) -> None:
        check_fields(self, "", [("cells", 1 <= self.cells <= 256, "1 to 256")])

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        place = (torch.arange(self.cells, device=pixels.device) + 0.5) / self.cells - 0.5
        falloff = (-(place**2) / (2 * 0.25**2)).exp()
        return torch.outer(falloff, falloff).expand(*selection.labels.shape, -1, -1)


@dataclass(frozen=True)
class EdgeMap:
    """How steep the brightness is (Sobel), averaged over cells: explanations that only trace edges look like this."""

    cell_px: Annotated[int, "side of a cell"] = 4
    label_specific = False

    def __post_init__(self) -> None:
        check_fields(self, "", [("cell_px", self.cell_px >= 1, "1 or more")])

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        grey = F.pad(pixels.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = pixels.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
        slopes = F.conv2d(grey, torch.stack([across, across.T])[:, None])
        height, width = (-(-side // self.cell_px) for side in pixels.shape[2:])
        steepness = F.adaptive_avg_pool2d(slopes.square().sum(1, keepdim=True).sqrt(), (height, width))
        return steepness.expand(-1, selection.labels.shape[1], -1, -1)
