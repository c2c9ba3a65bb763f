"""Decoupled softmax: each label of an image against its absent classes only."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from mlvision.losses.base import Loss, LossConfig
from mlvision.losses.reduction import mask_unknown, reduce_loss
from mlvision.parts import Context


@dataclass(frozen=True)
class DecoupledSoftmaxConfig(LossConfig):
    """Decoupled softmax: only the order of an image's classes is learnt, no threshold means anything."""

    name: Annotated[str, "which loss: a key of LOSSES"] = "decoupled_softmax"

    def build(self, context: Context) -> Loss:
        return decoupled_softmax_loss


def decoupled_softmax_loss(
    logits: Float[Tensor, "B C"],
    targets: Float[Tensor, "B C"],
    *,
    class_weights: Float[Tensor, " C"] | None = None,
    reduction: str = "image",
) -> Float[Tensor, ""] | Float[Tensor, "B C"]:
    """Mean over an image's labels l of `-log(e^z_l / (e^z_l + sum over absent classes j of e^z_j))`.

    The labels of an image do not compete: in a common softmax one of them can only rise at the cost of another. With one
    label this is softmax cross-entropy. A constant added to an image's logits changes nothing: they rank its classes, and no
    sigmoid of them is a probability.

    Args:
        logits: Any float dtype; computed in at least float32, also under autocast. Similarities of a dual encoder come
            divided by their temperature.
        targets: 1 present, 0 absent, NaN unknown: the class is in no sum. An image without labels costs nothing. A soft
            target y counts as a label by y and among the absent classes, of the others, by 1 - y.
        class_weights: Factor of each label's term.
        reduction: image: sum over classes, mean over images; sum; mean: over known entries; none: `[B, C]`.

    Raises:
        InputError: Shapes do not fit, no such reduction, or (on a CPU) a target outside [0, 1] or a class weight below 0.

    Source: Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification", ICLR 2024.

    DEVIATION: all labels take part, where the authors sample one an image. Soft targets are ours.
    """
    with torch.autocast(logits.device.type, enabled=False):
        x, y, known = mask_unknown(logits, targets)
        # Finite in the place of log 0, so that a sum over nothing has no NaN in its gradient.
        log_present = y.clamp(min=0).log().clamp(min=-1e30)
        log_absent = (known.to(y) - y).clamp(min=0).log().clamp(min=-1e30)
        rivals = (x + log_absent).logsumexp(dim=1, keepdim=True) - x
        total = y.sum(dim=1, keepdim=True)
        values = y / total.where(total > 0, 1) * torch.logaddexp(rivals, log_present)
        return reduce_loss(values, known, class_weights, reduction)
