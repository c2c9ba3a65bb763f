"""The focal loss of each label: what is right already weighs little."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from mlvision.errors import InputError, check_fields
from mlvision.losses.asymmetric import asymmetric_loss
from mlvision.losses.base import Loss, LossConfig
from mlvision.parts import Context


@dataclass(frozen=True)
class FocalConfig(LossConfig):
    """Focal loss."""

    name: Annotated[str, "which loss: a key of LOSSES"] = "focal"
    gamma: Annotated[float, "focusing exponent of all labels"] = 2.0

    def __post_init__(self) -> None:
        check_fields(self, "method.loss.", [("gamma", self.gamma >= 0, "0 or more")])

    def build(self, context: Context) -> Loss:
        return partial(focal_loss, gamma=self.gamma)


def focal_loss(
    logits: Float[Tensor, "B C"],
    targets: Float[Tensor, "B C"],
    *,
    gamma: float = 2.0,
    class_weights: Float[Tensor, " C"] | None = None,
    reduction: str = "image",
) -> Float[Tensor, ""] | Float[Tensor, "B C"]:
    """Focal loss, `-(1 - p_t)^gamma log p_t`, where p_t is the probability of what a label's target says.

    The asymmetric loss with one exponent for present and absent labels and no margin; with gamma 0, binary cross-entropy.

    Args, Raises: As `asymmetric_loss`.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 4.

    DEVIATION: without their balance alpha between present and absent labels, which `class_weights` does not replace.
    """
    if not 0 <= gamma < math.inf:
        raise InputError(f"gamma {gamma}: expected an exponent of at least 0, finite")
    return asymmetric_loss(
        logits, targets, gamma_neg=gamma, gamma_pos=gamma, clip=0.0, class_weights=class_weights, reduction=reduction
    )
