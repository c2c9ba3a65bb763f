"""Losses: pure functions of tensors with an explicit reduction. A new one is a file and a line here."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mlvision.losses.asymmetric import asymmetric_loss
from mlvision.losses.bce import binary_cross_entropy
from mlvision.losses.smoothing import smooth_labels
from mlvision.losses.softmax import softmax_cross_entropy
from mlvision.losses.transport import Transport, conditional_transport

LOSSES = {
    "bce": binary_cross_entropy,
    "asl": asymmetric_loss,
    "softmax": softmax_cross_entropy,
}


def build_loss(name: str, *, gamma_neg: float, gamma_pos: float, clip: float) -> Callable[..., Tensor]:
    """A loss of LOSSES with the options of a method; those of asl are checked now, not at the first step.

    Raises:
        InputError: gammas or a clip out of range.
    """
    if name != "asl":
        return LOSSES[name]
    loss = partial(asymmetric_loss, gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip)
    loss(torch.zeros(1, 1), torch.zeros(1, 1))
    return loss


__all__ = [
    "LOSSES",
    "Transport",
    "asymmetric_loss",
    "binary_cross_entropy",
    "build_loss",
    "conditional_transport",
    "smooth_labels",
    "softmax_cross_entropy",
]
