"""Losses: pure functions of tensors with an explicit reduction. A new one is a file and a line here."""

from mlvision.losses.asymmetric import asymmetric_loss
from mlvision.losses.bce import binary_cross_entropy
from mlvision.losses.smoothing import smooth_labels
from mlvision.losses.softmax import softmax_cross_entropy

LOSSES = {
    "bce": binary_cross_entropy,
    "asl": asymmetric_loss,
    "softmax": softmax_cross_entropy,
}

__all__ = ["LOSSES", "asymmetric_loss", "binary_cross_entropy", "smooth_labels", "softmax_cross_entropy"]
