"""Losses: pure functions of tensors with an explicit reduction, and the options that build them.

A new one is a file and a line here.
"""

from mlvision.losses.asymmetric import AslConfig, asymmetric_loss
from mlvision.losses.base import Loss, LossConfig
from mlvision.losses.bce import BceConfig, binary_cross_entropy
from mlvision.losses.decoupled import DecoupledSoftmaxConfig, decoupled_softmax_loss
from mlvision.losses.focal import FocalConfig, focal_loss
from mlvision.losses.hill import HillConfig, hill_loss
from mlvision.losses.smoothing import smooth_labels
from mlvision.losses.soft_top_k import SoftTopKConfig, soft_top_k_loss
from mlvision.losses.softmax import SoftmaxConfig, softmax_cross_entropy
from mlvision.losses.transport import Transport, conditional_transport

LOSSES: dict[str, type[LossConfig]] = {
    "bce": BceConfig,
    "asl": AslConfig,
    "focal": FocalConfig,
    "hill": HillConfig,
    "softmax": SoftmaxConfig,
    "decoupled_softmax": DecoupledSoftmaxConfig,
    "soft_top_k": SoftTopKConfig,
}
LossConfig.choices = LOSSES

__all__ = [
    "LOSSES",
    "AslConfig",
    "BceConfig",
    "DecoupledSoftmaxConfig",
    "FocalConfig",
    "HillConfig",
    "Loss",
    "LossConfig",
    "SoftTopKConfig",
    "SoftmaxConfig",
    "Transport",
    "asymmetric_loss",
    "binary_cross_entropy",
    "conditional_transport",
    "decoupled_softmax_loss",
    "focal_loss",
    "hill_loss",
    "smooth_labels",
    "soft_top_k_loss",
    "softmax_cross_entropy",
]
