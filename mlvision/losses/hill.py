"""The Hill loss: an absent label that the model is sure to see may be a missing one, and counts less."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mlvision.errors import InputError, check_fields
from mlvision.losses.base import Loss, LossConfig
from mlvision.losses.reduction import mask_unknown, reduce_loss
from mlvision.parts import Context


@dataclass(frozen=True)
class HillConfig(LossConfig):
    """Hill loss, for labels of which positives are missing."""

    name: Annotated[str, "which loss: a key of LOSSES"] = "hill"
    lam: Annotated[float, "an absent label costs (lam - p) p^2; its slope falls again from p = 2/3 lam on"] = 1.5
    margin: Annotated[float, "taken off the logits of present labels"] = 1.0
    gamma: Annotated[float, "focusing exponent of present labels"] = 2.0

    def __post_init__(self) -> None:
        rules = (
            ("lam", 1 <= self.lam < math.inf, "1 or more"),
            ("margin", 0 <= self.margin < math.inf, "0 or more"),
            ("gamma", 0 <= self.gamma < math.inf, "0 or more"),
        )
        check_fields(self, "method.loss.", rules)

    def build(self, context: Context) -> Loss:
        return partial(hill_loss, lam=self.lam, margin=self.margin, gamma=self.gamma)


def hill_loss(
    logits: Float[Tensor, "B C"],
    targets: Float[Tensor, "B C"],
    *,
    lam: float = 1.5,
    margin: float = 1.0,
    gamma: float = 2.0,
    class_weights: Float[Tensor, " C"] | None = None,
    reduction: str = "image",
) -> Float[Tensor, ""] | Float[Tensor, "B C"]:
    """Hill loss, `-y (1 - p_m)^gamma log p_m + (1 - y) (lam - p) p^2`, with `p = sigmoid(z)`, `p_m = sigmoid(z - margin)`.

    The gradient of an absent label is a hill over p: it is small where the model sees nothing, and small again where it is
    sure of the label, which may then be a positive that nobody annotated.

    >>> absent = torch.zeros(1, 1)
    >>> hill_loss(torch.tensor([[0.0]]), absent), hill_loss(torch.tensor([[20.0]]), absent)
    (tensor(0.2500), tensor(0.5000))

    Args:
        logits: Any float dtype; computed in at least float32, also under autocast.
        targets: 1 present, 0 absent, NaN unknown; a soft target mixes the two terms linearly.
        lam: At least 1, so that no absent label costs less than nothing.
        margin: At least 0.
        gamma: At least 0.
        class_weights: Factor of each class.
        reduction: image: sum over classes, mean over images; sum; mean: over known entries; none: `[B, C]`.

    Raises:
        InputError: Shapes do not fit, an option out of range, no such reduction, or (on a CPU) a target or class weight
            out of range.

    Source: Zhang et al., "Simple and Robust Loss Design for Multi-Label Learning with Missing Labels", arXiv 2112.07368
    (2021), equations of L_Hill and of the focal margin loss; the defaults are those of the authors' code.
    """
    if not (1 <= lam < math.inf and 0 <= margin < math.inf and 0 <= gamma < math.inf):
        raise InputError(f"lam {lam}, margin {margin}, gamma {gamma}: expected at least 1, 0 and 0, finite")
    with torch.autocast(logits.device.type, enabled=False):
        x, y, known = mask_unknown(logits, targets)
        focus = torch.exp(gamma * F.logsigmoid(margin - x))
        p = x.sigmoid() + 0 * x  # NaN for an infinite logit, which would cost something finite
        values = (1 - y) * (lam - p) * p.square() - y * focus * F.logsigmoid(x - margin)
        return reduce_loss(values, known, class_weights, reduction)
