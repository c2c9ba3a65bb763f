"""CutMix and Mixup of a batch, with targets pooled from what is really visible of each image.

Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix", ICCV 2019.

DEVIATION: the published combination of CutMix and label maps mixes the labels of the two whole crops by area, though the
pasted patch hides a part of the one and shows a part of the other. Here, with `exact`, each image's map is pooled over its
own visible part. `linear` is the published form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mlvision.errors import check_fields
from mlvision.label_maps.geometry import boxes_in_image, one_box
from mlvision.space import Groups, join_groups, split_groups
from mlvision.types import CropBox

# The pooled targets of a batch, in its order: of each box, but for what the hole covers of it.
Pool = Callable[[CropBox, Float[Tensor, "B 4"] | None], Float[Tensor, "B C"]]


@dataclass(frozen=True)
class MixConfig:
    """How the images of a batch are mixed in pairs."""

    cutmix: Annotated[float, "alpha of CutMix's Beta distribution; 0: no CutMix"] = 0.0
    mixup: Annotated[
        float, "alpha of Mixup's Beta distribution; 0: no Mixup; with both, each takes half of the steps"
    ] = 0.0
    probability: Annotated[float, "share of the steps that mix"] = 1.0
    until_epoch: Annotated[int, "epochs that mix, from the first; 0: all"] = 0
    targets: Annotated[str, "CutMix. exact: from what is visible of each image; linear: the crops' labels, by area"] = (
        "exact"
    )
    union: Annotated[
        bool,
        "exact, where classes do not exclude each other: labels of two images are united, 1 - (1 - a)(1 - b); false: "
        "averaged by area, as those of a softmax always are",
    ] = True

    def __post_init__(self) -> None:
        rules = (
            ("cutmix", self.cutmix >= 0, "0 or more"),
            ("mixup", self.mixup >= 0, "0 or more"),
            ("probability", 0 <= self.probability <= 1, "a number from 0 to 1"),
            ("until_epoch", self.until_epoch >= 0, "0 or more"),
            ("targets", self.targets in ("exact", "linear"), "exact or linear"),
        )
        check_fields(self, "method.mix.", rules)


@dataclass(frozen=True)
class Mix:
    """One step's mixing: every image with its partner, which is the batch in reverse.

    Attributes:
        share: of the image itself, in area or in brightness; the partner has the rest.
        patch: (x1, y1, x2, y2) in pixels where the partner is pasted, or None for Mixup.
    """

    config: MixConfig
    share: float
    patch: tuple[int, int, int, int] | None

    def images(self, images: Shaped[Tensor, "B c H W"]) -> Shaped[Tensor, "B c H W"]:
        """Images as they were, with the patch of their partner; or the weighted mean in [0, 1]. The input is not changed."""
        if self.patch is None:
            images = images / 255 if images.dtype == torch.uint8 else images
            return self.share * images + (1 - self.share) * images.flip(0)
        x1, y1, x2, y2 = self.patch
        mixed = images.clone()
        mixed[:, :, y1:y2, x1:x2] = images.flip(0)[:, :, y1:y2, x1:x2]
        return mixed

    def targets(self, pool: Pool, view: CropBox, size: tuple[int, int], groups: Groups) -> Float[Tensor, "B C"]:
        """Targets of the mixed images, NaN where unknown.

        Args:
            size: (H, W) of the views in pixels.
            groups: of the classes that share a softmax, whose labels are averaged; those of a class for itself are united.
        """
        if self.share == 1:
            return pool(view, None)
        if self.patch is None or self.config.targets == "linear":
            own = pool(view, None)
            return self._average(own, own.flip(0))
        height, width = size
        x1, y1, x2, y2 = self.patch
        boxes = boxes_in_image(one_box(x1 / width, y1 / height, x2 / width, y2 / height, view.boxes), view)
        # The patch hides this part of an image, and shows the same part of it in its partner.
        other = pool(CropBox(boxes), None).flip(0)
        if self.share == 0:
            return other
        own = pool(view, boxes)
        if not self.config.union:
            return self._average(own, other)
        pairs = zip(split_groups(own, groups), split_groups(other, groups), strict=True)
        return join_groups([_unite(a, b) if a.shape[2] == 1 else self._average(a, b) for a, b in pairs])

    def _average(self, own: Float[Tensor, "..."], other: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.share * own + (1 - self.share) * other


def _unite(own: Float[Tensor, "..."], other: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A label that one of the two surely shows is there, whatever is unknown of the other."""
    return torch.where((own == 1) | (other == 1), 1.0, 1 - (1 - own) * (1 - other))


def draw_mix(config: MixConfig, size: tuple[int, int]) -> Mix | None:
    """The mixing of one step, from torch's global generator; None where the step does not mix. `size`: (H, W)."""
    if not (config.cutmix or config.mixup) or torch.rand(()) >= config.probability:
        return None
    cut = config.cutmix > 0 and (config.mixup == 0 or torch.rand(()).item() < 0.5)
    alpha = torch.tensor(config.cutmix if cut else config.mixup)
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    if not cut:
        return Mix(config, share, None)
    height, width = size
    side = (1 - share) ** 0.5
    across, down = (round(length * side / 2) for length in (width, height))
    x, y = (int(torch.randint(length, ())) for length in (width, height))
    x1, x2, y1, y2 = max(x - across, 0), min(x + across, width), max(y - down, 0), min(y + down, height)
    return Mix(config, 1 - (x2 - x1) * (y2 - y1) / (width * height), (x1, y1, x2, y2))
