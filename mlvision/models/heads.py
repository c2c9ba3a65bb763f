"""Heads: features in, one logit a class out."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from mlvision.errors import InputError
from mlvision.types import Features, HeadOutput


@dataclass(frozen=True)
class HeadConfig:
    """The options of every head; each head's own Config adds to them."""

    name: Annotated[str, "which head: a key of HEADS"]


@dataclass(frozen=True)
class LinearHeadConfig(HeadConfig):
    name: Annotated[str, "which head: a key of HEADS"] = "linear"
    dropout: Annotated[float, "probability of dropping a pooled feature in training"] = 0.0


class LinearHead(nn.Module):
    """One linear layer on the pooled features.

    It starts near zero (normal, std 0.01; zero bias), so every label starts near probability 0.5 whatever the scale of
    the features.
    """

    def __init__(self, in_features: int, num_classes: int, config: LinearHeadConfig):
        super().__init__()
        if not 0 <= config.dropout < 1:
            raise InputError(f"head.dropout: expected a probability in [0, 1), got {config.dropout}")
        self.num_classes = num_classes
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(in_features, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> HeadOutput:
        """Logits `[B, C]`; the embedding is the pooled features, before dropout.

        Computed in the weights' own precision also under autocast: logits rounded to bfloat16 tie, and ties move AP.
        """
        with torch.autocast(features.pooled.device.type, enabled=False):
            pooled = features.pooled.to(self.linear.weight.dtype)
            return HeadOutput(self.linear(self.dropout(pooled)), embedding=pooled)
