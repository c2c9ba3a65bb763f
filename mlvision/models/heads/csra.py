"""Class-specific residual attention."""

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

# By the number of heads, each head's temperature; infinity takes the highest cell, and is 99 in the published code.
TEMPERATURES: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (1.0, math.inf),
    4: (1.0, 2.0, 4.0, math.inf),
    6: (1.0, 2.0, 3.0, 4.0, 5.0, math.inf),
    8: (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, math.inf),
}


@dataclass(frozen=True)
class CsraHeadConfig(HeadConfig):
    """Class-specific residual attention: the mean of the map plus a weight times its attended part."""

    name: Annotated[str, "which head: a key of HEADS"] = "csra"
    lam: Annotated[
        float, "weight of the attended score beside the mean; published: 0.1 for VOC, 0.4 to 0.5 for COCO"
    ] = 0.1
    num_heads: Annotated[int, "classifiers that are summed, each of its own temperature: 1, 2, 4, 6 or 8"] = 1

    def __post_init__(self) -> None:
        rules = (
            ("lam", self.lam >= 0, "0 or more"),
            ("num_heads", self.num_heads in TEMPERATURES, f"one of {', '.join(map(str, TEMPERATURES))}"),
        )
        check_fields(self, "head.", rules)

    def build(
        self, in_features: int, num_classes: int, map_features: int | None = None, assets: Assets = NO_ASSETS
    ) -> "CsraHead":
        return CsraHead(in_features, num_classes, self, map_features)


class CsraHead(Head):
    """Class-specific residual attention: a class's mean over the cells, plus a share of where it is strongest.

        s[n] = x[n] . w / |w|
        logit = b + sum over the heads: mean_n s[n] + lam * sum_n s[n] softmax_n(T s)[n]

    Each head has weights w of its own for every class and its own temperature T. The maps are the sum of b and the scores s
    of all heads: with lam = 0 their mean over the cells is the logit.

    Args:
        in_features: width of the pooled features, which are not read but handed on as the embedding.
        map_features: width of the map x; as in_features where not given.

    Source: Zhu & Wu, "Residual Attention: A Simple but Effective Method for Multi-Label Recognition", ICCV 2021, and its
    published code.

    DEVIATION: the published head has no bias, so a cell without features scores 0.5 for every class; see `Head.start_at`.
    """

    map_kind = "logit"

    def __init__(self, in_features: int, num_classes: int, config: CsraHeadConfig, map_features: int | None = None):
        super().__init__()
        self.num_classes, self.lam = num_classes, config.lam
        self.temperatures = TEMPERATURES[config.num_heads]
        width = map_features or in_features
        self.weight = nn.Parameter(torch.empty(config.num_heads, num_classes, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def start_at(self, logits: Float[Tensor, " C"]) -> None:
        set_bias(self.bias, logits)

    def forward(self, features: Features) -> HeadOutput:
        """Logits `[B, C]` and maps `[B, C, h, w]` in the weights' own precision also under autocast, as in LinearHead."""
        with torch.autocast(features.map.device.type, enabled=False):
            cells = features.map.flatten(2).to(self.weight.dtype)
            scores = torch.einsum("kcd,bdn->bkcn", F.normalize(self.weight, dim=-1), cells)
            heads = zip(scores.unbind(1), self.temperatures, strict=True)
            attended = torch.stack([_attended(of_head, temperature) for of_head, temperature in heads])
            logits = scores.mean(3).sum(1) + self.lam * attended.sum(0) + self.bias
            maps = scores.sum(1) + self.bias[:, None]
            return HeadOutput(logits, maps.unflatten(2, features.map.shape[2:]), features.pooled)


def _attended(scores: Float[Tensor, "B C N"], temperature: float) -> Float[Tensor, "B C"]:
    """The scores' mean over the cells, weighted by the softmax of what they are themselves."""
    if temperature == math.inf:
        return scores.amax(2)
    return (scores * (temperature * scores).softmax(2)).sum(2)
