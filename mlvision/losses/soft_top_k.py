"""The soft top-k loss: an image's labels are to be among the k classes that it ranks highest."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlvision.errors import InputError, check_fields
from mlvision.losses.base import Loss, LossConfig
from mlvision.losses.reduction import mask_unknown, reduce_loss
from mlvision.parts import Context


@dataclass(frozen=True)
class SoftTopKConfig(LossConfig):
    """Soft top-k: only the order of an image's classes is learnt, no threshold means anything."""

    name: Annotated[str, "which loss: a key of LOSSES"] = "soft_top_k"
    k: Annotated[int, "first ranks that the labels are to hold; 0: as many as the image has labels"] = 0
    alpha: Annotated[float, "how sharply the k best are told from the rest"] = 2.0

    def __post_init__(self) -> None:
        check_fields(self, "method.loss.", [("k", self.k >= 0, "0 or more"), ("alpha", self.alpha > 0, "more than 0")])

    def build(self, context: Context) -> Loss:
        if self.k >= len(context.space.classes):
            raise InputError(
                f"method.loss.k: expected 0, or less than the {len(context.space.classes)} classes, got {self.k}"
            )
        return partial(soft_top_k_loss, k=self.k or None, alpha=self.alpha)


def soft_top_k_loss(
    logits: Float[Tensor, "B C"],
    targets: Float[Tensor, "B C"],
    *,
    k: int | None = None,
    alpha: float = 2.0,
    class_weights: Float[Tensor, " C"] | None = None,
    reduction: str = "image",
) -> Float[Tensor, ""] | Float[Tensor, "B C"]:
    """Mean over an image's labels of `-log q_l`, `q = sigmoid(alpha (z + t))` with the t of each image at which q sums to k.

    q says how far a class is among the k best. An image costs little once its labels hold the first k ranks, in whatever
    order. A constant added to its logits changes nothing: they rank its classes, and no sigmoid of them is a probability.

    Args:
        logits: Any float dtype; computed in at least float32, also under autocast.
        targets: 1 present, 0 absent, NaN unknown: the class has no q. An image without labels costs nothing. A soft target
            y counts as a label by y.
        k: How many ranks are to be held: more than 0, less than C. None: as many as the image has labels (the sum of its
            targets). In an image with no more than k known classes all of them are among the best: q is 1, the loss 0.
        alpha: How sharply q tells the k best from the rest; more than 0 and finite.
        class_weights: Factor of each label's term.
        reduction: image: sum over classes, mean over images; sum; mean: over known entries; none: `[B, C]`.

    Raises:
        InputError: k or alpha out of range, shapes do not fit, no such reduction, or (on a CPU) a target outside [0, 1] or a
            class weight below 0.

    Source: Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification", ICLR 2024.

    DEVIATION: an image with more than k labels keeps them all, where the authors sample k. They bracket t by 10 / alpha
    beyond the extreme logits, which misses it where k is very small beside C; ours cannot (see `_mass_threshold`). Their k
    is 5 by default. Soft targets are ours.
    """
    if not 0 < alpha < math.inf:
        raise InputError(f"alpha {alpha}: expected more than 0, finite")
    with torch.autocast(logits.device.type, enabled=False):
        x, y, known = mask_unknown(logits, targets)
        if k is not None and not 0 < k < x.shape[1]:
            raise InputError(f"k {k}: expected more than 0 and less than the number of classes, {x.shape[1]}")
        total = y.sum(dim=1, keepdim=True)
        mass = total if k is None else torch.full_like(total, k)
        solvable = (mass > 0) & (mass < known.sum(dim=1, keepdim=True))
        # An image without a threshold is given one that is finite, and no part in the loss.
        inside, mass = known | ~solvable, mass.where(solvable, 0.5 * x.shape[1])
        z = alpha * (x - x.detach().masked_fill(~inside, -torch.inf).amax(dim=1, keepdim=True))
        log_q = F.logsigmoid(z + _Threshold.apply(z, inside, mass)).where(solvable, 0)
        values = -(y / total.where(total > 0, 1)) * log_q
        return reduce_loss(values, known, class_weights, reduction)


class _Threshold(torch.autograd.Function):
    """The u `[B, 1]` at which sigmoid(z + u) sums to `mass` over the classes of `inside`, differentiable in z `[B, C]`.

    The sum stays what it is, so du/dz_j = -v_j / sum(v) with v = q (1 - q), q = sigmoid(z + u).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, inside: Tensor, mass: Tensor) -> Tensor:
        threshold = _mass_threshold(z, inside, mass)
        ctx.save_for_backward(z + threshold, inside)
        return threshold

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, inside = ctx.saved_tensors
        # As a softmax: v itself is 0 everywhere once the k best are far enough above the rest.
        log_v = F.logsigmoid(x) + F.logsigmoid(-x)
        return -gradient * log_v.masked_fill(~inside, -torch.inf).softmax(dim=1), None, None


def _mass_threshold(
    z: Float[Tensor, "B C"], inside: Bool[Tensor, "B C"], mass: Float[Tensor, "B 1"]
) -> Float[Tensor, "B 1"]:
    """Bisection; z has maximum 0. At the lower end no class has more than an even share of the mass, at the upper none less.

    As many halvings as the dtype has bits: the bracket's width falls below what the dtype resolves.
    """
    even = (mass / (inside.sum(dim=1, keepdim=True) - mass)).log()
    low, high = even, even - z.masked_fill(~inside, torch.inf).amin(dim=1, keepdim=True)
    for _ in range(torch.finfo(z.dtype).bits):
        middle = (low + high) / 2
        above = _exceeds(z + middle, inside, mass)
        low, high = low.where(above, middle), middle.where(above, high)
    return (low + high) / 2


def _exceeds(x: Float[Tensor, "B C"], inside: Bool[Tensor, "B C"], mass: Float[Tensor, "B 1"]) -> Bool[Tensor, "B 1"]:
    """Whether sigmoid(x) sums to more than `mass`, exactly also where every sigmoid rounds to 0 or 1.

    Compared are what the classes below a half add to the number of those above and what the latter lack, as logarithms.
    Between k sure classes and the rest the plain sum is k for a whole range of thresholds.
    """
    upper, lower = inside & (x > 0), inside & (x <= 0)
    small = F.logsigmoid(-x.abs())
    surplus = upper.sum(dim=1, keepdim=True) - mass
    added = small.masked_fill(~lower, -torch.inf).logsumexp(dim=1, keepdim=True)
    lacking = small.masked_fill(~upper, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.logaddexp(added, surplus.clamp(min=0).log()) > torch.logaddexp(lacking, (-surplus).clamp(min=0).log())
