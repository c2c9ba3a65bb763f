"""Softmax cross-entropy: classes that share one unit of probability, all of them or those of each group."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mlvision.losses.base import Loss, LossConfig
from mlvision.losses.reduction import mask_unknown, reduce_loss
from mlvision.parts import Context
from mlvision.space import Groups, LabelSpace, join_groups, split_groups


@dataclass(frozen=True)
class SoftmaxConfig(LossConfig):
    """Softmax cross-entropy: over each group of classes that exclude each other, over all if the data have no groups."""

    name: Annotated[str, "which loss: a key of LOSSES"] = "softmax"

    def space(self, space: LabelSpace) -> LabelSpace:
        return space.with_softmax()

    def build(self, context: Context) -> Loss:
        return partial(softmax_cross_entropy, groups=self.space(context.space).groups)


def softmax_cross_entropy(
    logits: Float[Tensor, "B C"],
    targets: Float[Tensor, "B C"],
    *,
    groups: Groups | None = None,
    class_weights: Float[Tensor, " C"] | None = None,
    reduction: str = "image",
) -> Float[Tensor, ""] | Float[Tensor, "B C"]:
    """Cross-entropy of a softmax against a distribution, `-t_c * log softmax(z)_c` with `t = y / sum(y)`.

    A teacher's probabilities are such a distribution; several labels of an image share its unit evenly (Mahajan et al.,
    "Exploring the Limits of Weakly Supervised Pretraining", ECCV 2018). Each group has its own softmax and distribution; a
    class for itself has the binary cross-entropy of its sigmoid.

    Args:
        logits: Any float dtype; computed in at least float32, also under autocast.
        targets: At least 0, of a class for itself at most 1; NaN unknown: the class is left out of the image's softmax. A
            softmax without any label contributes nothing. Negative ones are refused on a CPU; on a GPU, which looking for
            them would stall, they give a meaningless loss.
        groups: Sizes of the groups that share a softmax, see `LabelSpace.groups`; (): each class for itself. None: one
            softmax of all.
        class_weights: Factor of each class.
        reduction: image: sum over classes, mean over images; sum; mean: over known entries; none: `[B, C]`.

    Raises:
        InputError: Shapes do not fit, no such reduction, or (on a CPU) a negative or infinite target or class weight.
    """
    with torch.autocast(logits.device.type, enabled=False):
        x, y, known = mask_unknown(logits, targets, highest=math.inf)
        x = x.masked_fill(~known, -1e30)  # finite: a row of nothing but unknown classes has no NaN in its gradient
        groups = (x.shape[1],) if groups is None else groups
        runs = zip(split_groups(x, groups), split_groups(y, groups), strict=True)
        values = join_groups([_cross_entropy(logits, targets) for logits, targets in runs])
        return reduce_loss(values, known, class_weights, reduction)


def _cross_entropy(x: Float[Tensor, "B G n"], y: Float[Tensor, "B G n"]) -> Float[Tensor, "B G n"]:
    """Of groups of n classes each."""
    if x.shape[2] == 1:
        return -(y * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x))
    total = y.sum(dim=2, keepdim=True)
    return -(y / total.where(total > 0, 1)) * x.log_softmax(dim=2)
