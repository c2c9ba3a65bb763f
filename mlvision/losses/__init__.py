"""Losses: pure functions of tensors with an explicit reduction. A new one is a file and a line here."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mlvision.losses.asymmetric import asymmetric_loss
from mlvision.losses.bce import binary_cross_entropy
from mlvision.losses.decoupled import decoupled_softmax_loss
from mlvision.losses.focal import focal_loss
from mlvision.losses.smoothing import smooth_labels
from mlvision.losses.soft_top_k import soft_top_k_loss
from mlvision.losses.softmax import softmax_cross_entropy
from mlvision.losses.transport import Transport, conditional_transport

LOSSES = {
    "bce": binary_cross_entropy,
    "asl": asymmetric_loss,
    "focal": focal_loss,
    "softmax": softmax_cross_entropy,
    "decoupled_softmax": decoupled_softmax_loss,
    "soft_top_k": soft_top_k_loss,
}


def build_loss(
    name: str,
    *,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    gamma: float = 2.0,
    k: int | None = None,
    alpha: float = 2.0,
) -> Callable[..., Tensor]:
    """A loss of LOSSES with the options of a method; those of asl and focal are checked now, not at the first step.

    Raises:
        InputError: gammas or a clip out of range.
    """
    if name == "soft_top_k":
        return partial(soft_top_k_loss, k=k, alpha=alpha)
    if name not in ("asl", "focal"):
        return LOSSES[name]
    asymmetric = partial(asymmetric_loss, gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip)
    loss = asymmetric if name == "asl" else partial(focal_loss, gamma=gamma)
    loss(torch.zeros(1, 1), torch.zeros(1, 1))
    return loss


__all__ = [
    "LOSSES",
    "Transport",
    "asymmetric_loss",
    "binary_cross_entropy",
    "build_loss",
    "conditional_transport",
    "decoupled_softmax_loss",
    "focal_loss",
    "smooth_labels",
    "soft_top_k_loss",
    "softmax_cross_entropy",
]
