"""Heads: features in, one logit a class out."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mlvision.errors import InputError, check_fields
from mlvision.options import Selectable
from mlvision.types import Features, HeadOutput


@dataclass(frozen=True)
class HeadConfig(Selectable):
    """The options of every head; each head's own Config adds to them."""

    name: Annotated[str, "which head: a key of HEADS"]

    def __post_init__(self) -> None:
        check_fields(self, "head.")


class Head(nn.Module):
    """Features in, one logit per class out.

    Attributes:
        num_classes: C.
        map_kind: the kind of the maps that `forward` returns, a key of `types.KINDS`; None: it returns none.
        pretrained: its classifier came with the weights of the backbone, so it keeps the biases that it has.
    """

    num_classes: int
    map_kind: str | None = None
    pretrained: bool = False

    def forward(self, features: Features) -> HeadOutput:
        raise NotImplementedError

    def start_at(self, logits: Float[Tensor, " C"]) -> None:
        """Set the biases, before training, so that features of 0 give these logits.

        Methods call it with each class's share of the training images. A head whose biases start at 0 calls every class
        half-present wherever it sees nothing. A few hundred steps of training do not move them, because the weights make
        up for them in the image as a whole; the cells of a label map then hold 0.5 for every class that is not there.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LinearHeadConfig(HeadConfig):
    name: Annotated[str, "which head: a key of HEADS"] = "linear"
    dropout: Annotated[float, "probability of dropping a pooled feature in training"] = 0.0


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
        if not 0 <= config.dropout < 1:
            raise InputError(f"head.dropout: expected a probability in [0, 1), got {config.dropout}")
        self.num_classes = num_classes
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(in_features, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def start_at(self, logits: Float[Tensor, " C"]) -> None:
        set_bias(self.linear.bias, logits)

    def forward(self, features: Features) -> HeadOutput:
        """Logits `[B, C]`; the embedding is the pooled features, before dropout.

        Computed in the weights' own precision also under autocast: logits rounded to bfloat16 tie, and ties move AP.
        """
        with torch.autocast(features.pooled.device.type, enabled=False):
            pooled = features.pooled.to(self.linear.weight.dtype)
            return HeadOutput(self.linear(self.dropout(pooled)), embedding=pooled)


def set_bias(bias: Tensor, logits: Float[Tensor, " C"]) -> None:
    """Write logits into a parameter, whatever its dtype and device."""
    with torch.no_grad():
        bias.copy_(logits)


# By the number of heads, each head's temperature; infinity takes the highest cell, and is 99 in the published code.
CSRA_TEMPERATURES: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (1.0, math.inf),
    4: (1.0, 2.0, 4.0, math.inf),
    6: (1.0, 2.0, 3.0, 4.0, 5.0, math.inf),
    8: (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, math.inf),
}


@dataclass(frozen=True)
class CsraHeadConfig(HeadConfig):
    name: Annotated[str, "which head: a key of HEADS"] = "csra"
    lam: Annotated[
        float, "weight of the attended score beside the mean; published: 0.1 for VOC, 0.4 to 0.5 for COCO"
    ] = 0.1
    num_heads: Annotated[int, "classifiers that are summed, each of its own temperature: 1, 2, 4, 6 or 8"] = 1


class CsraHead(Head):
    """Class-specific residual attention: a class's mean over the cells, plus a share of where it is strongest.

        s[n] = x[n] . w / |w|
        logit = b + sum over the heads: mean_n s[n] + lam * sum_n s[n] softmax_n(T s)[n]

    Each head has weights w of its own for every class and its own temperature T. The maps are the sum of b and the scores s
    of all heads: with lam = 0 their mean over the cells is the logit.

    Args:
        in_features: width of the pooled features, which are not read but handed on as the embedding.
        map_features: width of the map x; as in_features where not given.

    Raises:
        InputError: an option outside its range.

    Source: Zhu & Wu, "Residual Attention: A Simple but Effective Method for Multi-Label Recognition", ICCV 2021, and its
    published code.

    DEVIATION: the published head has no bias, so a cell without features scores 0.5 for every class; see `Head.start_at`.
    """

    map_kind = "logit"

    def __init__(self, in_features: int, num_classes: int, config: CsraHeadConfig, map_features: int | None = None):
        super().__init__()
        rules = (
            ("lam", config.lam >= 0, "0 or more"),
            ("num_heads", config.num_heads in CSRA_TEMPERATURES, f"one of {', '.join(map(str, CSRA_TEMPERATURES))}"),
        )
        check_fields(config, "head.", rules)
        self.num_classes, self.lam = num_classes, config.lam
        self.temperatures = CSRA_TEMPERATURES[config.num_heads]
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
