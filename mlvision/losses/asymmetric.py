"""The asymmetric loss: focal weights that differ for present and absent labels, and a margin for absent ones."""

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
class AslConfig(LossConfig):
    """Asymmetric loss."""

    name: Annotated[str, "which loss: a key of LOSSES"] = "asl"
    gamma_neg: Annotated[float, "focusing exponent of absent labels"] = 4.0
    gamma_pos: Annotated[float, "focusing exponent of present labels"] = 0.0
    clip: Annotated[float, "probability margin below which an absent label costs nothing"] = 0.05

    def __post_init__(self) -> None:
        rules = (
            ("gamma_neg", self.gamma_neg >= 0, "0 or more"),
            ("gamma_pos", self.gamma_pos >= 0, "0 or more"),
            ("clip", self.clip == 0 or 1e-6 <= self.clip < 1, "0, or a probability margin in [1e-6, 1)"),
        )
        check_fields(self, "method.loss.", rules)

    def build(self, context: Context) -> Loss:
        return partial(asymmetric_loss, gamma_neg=self.gamma_neg, gamma_pos=self.gamma_pos, clip=self.clip)


def asymmetric_loss(
    logits: Float[Tensor, "B C"],
    targets: Float[Tensor, "B C"],
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    clip: float = 0.05,
    class_weights: Float[Tensor, " C"] | None = None,
    detach_focal: bool = False,
    reduction: str = "image",
) -> Float[Tensor, ""] | Float[Tensor, "B C"]:
    """Asymmetric loss, `-(y * (1 - p)^gamma_pos * log p + (1 - y) * p_m^gamma_neg * log(1 - p_m))`.

    Here `p = sigmoid(logit)` and `p_m = max(p - clip, 0)`: an absent label with a probability below `clip` costs
    nothing and has no gradient. With both gammas and the clip at 0 this is binary cross-entropy. The default gammas
    and clip are those of the authors' training script, not of their class (gamma_pos = 1).

    Args:
        logits: Any float dtype; computed in at least float32, also under autocast.
        targets: 1 present, 0 absent, NaN unknown (contributes nothing). A soft target mixes the two terms linearly,
            each with its own focal weight and margin (timm interpolates probability and exponent instead). Values
            outside [0, 1] are refused on a CPU; on a GPU, which looking for them would stall, they give a meaningless
            loss.
        gamma_neg: Focusing exponent of absent labels, >= 0 and finite.
        gamma_pos: Focusing exponent of present labels, >= 0 and finite.
        clip: Probability margin of absent labels: 0, or in [1e-6, 1).
        class_weights: Factor of each class.
        detach_focal: Treat the focal weights as constants in the gradient, as the authors' training script does.
        reduction: image: sum over classes, mean over images; sum; mean: over known entries; none: `[B, C]`.

    Raises:
        InputError: Shapes do not fit, a gamma that is negative, infinite or NaN, a clip out of range, no such reduction,
            or (on a CPU) a target or class weight out of range.

    Source: Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021, equations 4, 5 and 7.

    DEVIATION: log-sigmoids in place of the authors' `log(max(p, 1e-8))`: the clamp has no gradient, so a present label
    with a logit below -18.4 could never be learnt. Weights are held constant by detaching them, not by the global
    gradient switch. The authors sum over the batch (reduction="sum").
    """
    if not (0 <= gamma_neg < math.inf and 0 <= gamma_pos < math.inf):
        raise InputError(f"gamma_neg {gamma_neg}, gamma_pos {gamma_pos}: expected exponents of at least 0, finite")
    # Below 1e-6 the largest p_m rounds to 1 in float32, where log(1 - p_m) is infinite.
    if clip != 0 and not 1e-6 <= clip < 1:
        raise InputError(f"clip {clip}: expected 0, or a probability margin in [1e-6, 1)")

    with torch.autocast(logits.device.type, enabled=False):
        x, y, known = mask_unknown(logits, targets)
        log_present = F.logsigmoid(x)
        p_shifted = (x.sigmoid() - clip).clamp(min=0)
        log_absent = torch.log1p(-p_shifted) if clip > 0 else F.logsigmoid(-x)

        weight_present = torch.exp(gamma_pos * F.logsigmoid(-x))
        # The slope of 0^gamma is infinite for gamma < 1, and only some versions of clamp stop 0 * inf from reaching the
        # logits. Where p_m is 0, so is log(1 - p_m), and the base can be anything.
        weight_absent = p_shifted.where(p_shifted > 0, 1) ** gamma_neg
        if detach_focal:
            weight_present, weight_absent = weight_present.detach(), weight_absent.detach()

        values = -(y * weight_present * log_present + (1 - y) * weight_absent * log_absent)
        return reduce_loss(values, known, class_weights, reduction)
