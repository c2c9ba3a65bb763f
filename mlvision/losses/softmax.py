"""Softmax cross-entropy: classes that share one unit of probability."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mlvision.losses.base import Loss, LossConfig
from mlvision.losses.reduction import mask_unknown, reduce_loss
from mlvision.parts import Context


@dataclass(frozen=True)
class SoftmaxConfig(LossConfig):
    """Softmax cross-entropy, of classes that exclude each other."""

    name: Annotated[str, "which loss: a key of LOSSES"] = "softmax"

    activation: ClassVar[str] = "softmax"

    def build(self, context: Context) -> Loss:
        return softmax_cross_entropy


def softmax_cross_entropy(
    logits: Float[Tensor, "B C"],
    targets: Float[Tensor, "B C"],
    *,
    class_weights: Float[Tensor, " C"] | None = None,
    reduction: str = "image",
) -> Float[Tensor, ""] | Float[Tensor, "B C"]:
    """Cross-entropy of a softmax against a distribution, `-t_c * log softmax(z)_c` with `t = y / sum(y)`.

    A teacher's probabilities are such a distribution; several labels of an image share its unit evenly (Mahajan et al.,
    "Exploring the Limits of Weakly Supervised Pretraining", ECCV 2018).

    Args:
        logits: Any float dtype; computed in at least float32, also under autocast.
        targets: At least 0; NaN unknown: the class is left out of the image's softmax. An image without any label
            contributes nothing. Negative ones are refused on a CPU; on a GPU, which looking for them would stall, they
            give a meaningless loss.
        class_weights: Factor of each class.
        reduction: image: sum over classes, mean over images; sum; mean: over known entries; none: `[B, C]`.

    Raises:
        InputError: Shapes do not fit, no such reduction, or (on a CPU) a negative or infinite target or class weight.
    """
    with torch.autocast(logits.device.type, enabled=False):
        x, y, known = mask_unknown(logits, targets, highest=math.inf)
        x = x.masked_fill(~known, -1e30)  # finite: a row of nothing but unknown classes has no NaN in its gradient
        total = y.sum(dim=1, keepdim=True)
        values = -(y / total.where(total > 0, 1)) * x.log_softmax(dim=1)
        return reduce_loss(values, known, class_weights, reduction)
