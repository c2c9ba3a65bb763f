"""Models: timm backbones, heads, and the weights they start from."""

from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mlvision.errors import InputError
from mlvision.models.alignment import TextHead, TextHeadConfig
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
from mlvision.models.heads import CsraHead, CsraHeadConfig, Head, HeadConfig, LinearHead, LinearHeadConfig
from mlvision.models.queries import MLDecoderHead, MLDecoderHeadConfig, Query2LabelHead, Query2LabelHeadConfig
from mlvision.models.weights import LoadReport

HEADS: dict[str, tuple[type[HeadConfig], type[Head]]] = {
    "linear": (LinearHeadConfig, LinearHead),
    "csra": (CsraHeadConfig, CsraHead),
    "ml_decoder": (MLDecoderHeadConfig, MLDecoderHead),
    "query2label": (Query2LabelHeadConfig, Query2LabelHead),
    "text": (TextHeadConfig, TextHead),
}
HeadConfig.choices = {name: config for name, (config, _) in HEADS.items()}


def build_head(
    config: HeadConfig | str,
    in_features: int,
    num_classes: int,
    *,
    map_features: int | None = None,
    label_embeddings: Float[Tensor, "C D"] | None = None,
    **options: Any,
) -> Head:
    """Build a head from its config, or from its name in HEADS and the fields of its config.

    Args:
        config: a head's config, or a key of HEADS.
        in_features: width of the pooled features: a backbone's `num_features`.
        num_classes: C.
        map_features: width of the map: a backbone's `map_features`; as in_features where not given.
        label_embeddings: of the classes' names (`models/text.py`), which the text head alone needs.
        **options: fields of the config.

    Raises:
        InputError: an unknown name, an option outside its range, or no embeddings for a text head.
    """
    name = config if isinstance(config, str) else config.name
    if name not in HEADS:
        raise InputError(f"head.name: expected one of {', '.join(HEADS)}, got '{name}'")
    config_type, head_type = HEADS[name]
    config = config_type(**options) if isinstance(config, str) else replace(config, **options)
    if not isinstance(config, TextHeadConfig):
        return head_type(in_features, num_classes, config, map_features)
    if label_embeddings is None:
        raise InputError(
            "label_embeddings: a text head compares with them; make them with mlvision.models.text.embed_labels"
        )
    return TextHead(in_features, num_classes, config, map_features, label_embeddings=label_embeddings)


def build_classifier(
    model: BackboneConfig,
    head: HeadConfig,
    num_classes: int,
    *,
    image_size: tuple[int, int] | int | None = None,
    label_embeddings: Float[Tensor, "C D"] | None = None,
) -> Classifier:
    """Build backbone and head, and load the weights into both: a classifier of as many classes goes into a linear head, and
    CLIP's projection of images into a head that compares with open_clip's text, which is zero-shot CLIP before training.

    Raises:
        InputError: see `build_backbone` and `build_head`.
    """
    backbone = create_backbone(model, image_size)
    built = build_head(
        head, backbone.num_features, num_classes, map_features=backbone.map_features, label_embeddings=label_embeddings
    )
    report = load_weights(backbone, model, _linear_of(built))
    built.pretrained = report is not None and report.has_classifier
    return Classifier(backbone, built)


def _linear_of(head: nn.Module) -> nn.Linear | None:
    """The layer of the head that a classifier which comes with weights may fill."""
    if isinstance(head, TextHead):
        return head.project if head.config.text.encoder == "open_clip" else None
    return head.linear if isinstance(head, LinearHead) else None


__all__ = [
    "HEADS",
    "AveragedTeacher",
    "Backbone",
    "BackboneConfig",
    "Classifier",
    "CsraHead",
    "CsraHeadConfig",
    "DenseTeacher",
    "Head",
    "HeadConfig",
    "LinearHead",
    "LinearHeadConfig",
    "LoadReport",
    "MLDecoderHead",
    "MLDecoderHeadConfig",
    "Preprocessing",
    "Query2LabelHead",
    "Query2LabelHeadConfig",
    "Teacher",
    "TextHead",
    "TextHeadConfig",
    "build_backbone",
    "build_classifier",
    "build_head",
    "build_teacher",
    "check_identity",
]
