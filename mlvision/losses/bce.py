"""Binary cross-entropy of independent sigmoids."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mlvision.losses.base import Loss, LossConfig
from mlvision.losses.reduction import mask_unknown, per_class, reduce_loss
from mlvision.parts import Context


@dataclass(frozen=True)
class BceConfig(LossConfig):
    """Binary cross-entropy."""

    name: Annotated[str, "which loss: a key of LOSSES"] = "bce"

    def build(self, context: Context) -> Loss:
        return binary_cross_entropy


def binary_cross_entropy(
    logits: Float[Tensor, "B C"],
    targets: Float[Tensor, "B C"],
    *,
    class_weights: Float[Tensor, " C"] | None = None,
    positive_weights: Float[Tensor, " C"] | None = None,
    reduction: str = "image",
) -> Float[Tensor, ""] | Float[Tensor, "B C"]:
    """Binary cross-entropy, `-w_c * (v_c * y * log p + (1 - y) * log(1 - p))` with `p = sigmoid(logit)`.

    Written with two log-sigmoids: `binary_cross_entropy_with_logits` gives 0 for a confident right answer in float32
    (`x + softplus(-x)` cancels), and the asymmetric loss without focusing is then this loss bit for bit.

    Args:
        logits: Any float dtype; computed in at least float32, also under autocast.
        targets: 1 present, 0 absent, NaN unknown (contributes nothing), or soft values in [0, 1]. Others are refused on a
            CPU; on a GPU, which looking for them would stall, they give a meaningless loss.
        class_weights: `w`, factor of each class, 0 or more.
        positive_weights: `v`, factor of the positive term of each class, 0 or more.
        reduction: image: sum over classes, mean over images; sum; mean: over known entries; none: `[B, C]`.

    Raises:
        InputError: Shapes do not fit, no such reduction, or (on a CPU) a target or weight out of range.
    """
    with torch.autocast(logits.device.type, enabled=False):
        x, y, known = mask_unknown(logits, targets)
        present = y * F.logsigmoid(x)
        if positive_weights is not None:
            present = present * per_class("positive_weights", positive_weights, x)
        absent = (1 - y) * F.logsigmoid(-x)
        return reduce_loss(-(present + absent), known, class_weights, reduction)
