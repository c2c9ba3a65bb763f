"""The linear head."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mlvision.errors import check_fields
from mlvision.models.heads.base import NO_ASSETS, Assets, Head, HeadConfig, set_bias
from mlvision.types import Features, HeadOutput


@dataclass(frozen=True)
class LinearHeadConfig(HeadConfig):
    """One linear layer on the pooled features."""

    name: Annotated[str, "which head: a key of HEADS"] = "linear"
    dropout: Annotated[float, "probability of dropping a pooled feature in training"] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "head.", [("dropout", 0 <= self.dropout < 1, "a probability in [0, 1)")])

    def build(
        self, in_features: int, num_classes: int, map_features: int | None = None, assets: Assets = NO_ASSETS
    ) -> "LinearHead":
        return LinearHead(in_features, num_classes, self, map_features)


class LinearHead(Head):
    """One linear layer on the pooled features.

    Its weights start near zero (normal, std 0.01), so every label starts near the probability of its bias whatever the
    scale of the features.

    Args:
        in_features: width of the pooled features.
        map_features: width of the map, which every head is told and this one does not read.
    """

    def __init__(self, in_features: int, num_classes: int, config: LinearHeadConfig, map_features: int | None = None):
        super().__init__()
        self.num_classes = num_classes
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(in_features, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    @property
    def classifier_layer(self) -> nn.Linear:
        return self.linear

    def start_at(self, logits: Float[Tensor, " C"]) -> None:
        set_bias(self.linear.bias, logits)

    def forward(self, features: Features) -> HeadOutput:
        """Logits `[B, C]`; the embedding is the pooled features, before dropout.

        Computed in the weights' own precision also under autocast: logits rounded to bfloat16 tie, and ties move AP.
        """
        with torch.autocast(features.pooled.device.type, enabled=False):
            pooled = features.pooled.to(self.linear.weight.dtype)
            return HeadOutput(self.linear(self.dropout(pooled)), embedding=pooled)
