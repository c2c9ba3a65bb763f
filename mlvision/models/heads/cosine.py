"""The cosine head: how near features and classes point, whatever their lengths."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mlvision.errors import check_fields
from mlvision.models.heads.base import NO_ASSETS, Assets, Head, HeadConfig, set_bias
from mlvision.types import Features, HeadOutput


@dataclass(frozen=True)
class CosineHeadConfig(HeadConfig):
    """Scaled cosines between features and a vector per class, with a bias."""

    name: Annotated[str, "which head: a key of HEADS"] = "cosine"
    scale: Annotated[float, "factor on the cosines when training begins; it is learnt"] = 10.0

    def __post_init__(self) -> None:
        check_fields(self, "head.", [("scale", 0 < self.scale < math.inf, "more than 0")])

    def build(
        self, in_features: int, num_classes: int, map_features: int | None = None, assets: Assets = NO_ASSETS
    ) -> "CosineHead":
        return CosineHead(in_features, num_classes, self)


class CosineHead(Head):
    """`scale * cos(features, class) + bias`: a class with few images cannot be held back by a short weight.

    Source: Gidaris & Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018, equation 2.

    DEVIATION: a bias per class, so that each label can start at its share of the images; their softmax needs none.

    Args:
        in_features: width of the pooled features.
    """

    def __init__(self, in_features: int, num_classes: int, config: CosineHeadConfig):
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.randn(num_classes, in_features))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))

    def start_at(self, logits: Float[Tensor, " C"]) -> None:
        set_bias(self.bias, logits)

    def forward(self, features: Features) -> HeadOutput:
        """Logits `[B, C]`; the embedding is the pooled features. Computed in the weights' own precision, as LinearHead."""
        with torch.autocast(features.pooled.device.type, enabled=False):
            pooled = features.pooled.to(self.weight.dtype)
            cosines = F.normalize(pooled, dim=-1) @ F.normalize(self.weight, dim=-1).T
            return HeadOutput(self.log_scale.exp() * cosines + self.bias, embedding=pooled)
