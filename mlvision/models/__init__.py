"""Models: timm backbones, heads, and the weights they start from."""

from dataclasses import replace
from typing import Any

from torch import nn

from mlvision.errors import InputError
from mlvision.models.backbone import (
    Backbone,
    BackboneConfig,
    Preprocessing,
    build_backbone,
    create_backbone,
    load_weights,
)
from mlvision.models.classifier import Classifier
from mlvision.models.dense import AveragedTeacher, DenseTeacher, Teacher, build_teacher, check_identity
from mlvision.models.heads import HeadConfig, LinearHead, LinearHeadConfig
from mlvision.models.weights import LoadReport

HEADS: dict[str, tuple[type[HeadConfig], type[nn.Module]]] = {"linear": (LinearHeadConfig, LinearHead)}


def build_head(config: HeadConfig | str, in_features: int, num_classes: int, **options: Any) -> nn.Module:
    """Build a head from its config, or from its name in HEADS and the fields of its config.

    Raises:
        InputError: an unknown name, or an option outside its range.
    """
    name = config if isinstance(config, str) else config.name
    if name not in HEADS:
        raise InputError(f"head.name: expected one of {', '.join(HEADS)}, got '{name}'")
    config_type, head_type = HEADS[name]
    config = config_type(**options) if isinstance(config, str) else replace(config, **options)
    return head_type(in_features, num_classes, config)


def build_classifier(
    model: BackboneConfig, head: HeadConfig, num_classes: int, *, image_size: tuple[int, int] | int | None = None
) -> Classifier:
    """Build backbone and head, and load the weights into both: a classifier of as many classes goes into a linear head.

    Raises:
        InputError: see `build_backbone` and `build_head`.
    """
    backbone = create_backbone(model, image_size)
    built = build_head(head, backbone.num_features, num_classes)
    load_weights(backbone, model, built.linear if isinstance(built, LinearHead) else None)
    return Classifier(backbone, built)


__all__ = [
    "HEADS",
    "AveragedTeacher",
    "Backbone",
    "BackboneConfig",
    "Classifier",
    "DenseTeacher",
    "HeadConfig",
    "LinearHead",
    "LinearHeadConfig",
    "LoadReport",
    "Preprocessing",
    "Teacher",
    "build_backbone",
    "build_classifier",
    "build_head",
    "build_teacher",
    "check_identity",
]
