"""Models: timm backbones, heads, and the weights they start from."""

from mlvision.models.backbone import (
    Backbone,
    BackboneConfig,
    Preprocessing,
    build_backbone,
)
from mlvision.models.classifier import Classifier, build_classifier
from mlvision.models.dense import AveragedTeacher, DenseTeacher, Teacher, build_teacher, check_identity
from mlvision.models.heads import (
    HEADS,
    CsraHead,
    CsraHeadConfig,
    Head,
    HeadConfig,
    JointHead,
    LinearHead,
    LinearHeadConfig,
    MLDecoderHead,
    MLDecoderHeadConfig,
    Query2LabelHead,
    Query2LabelHeadConfig,
    TextHead,
    TextHeadConfig,
    build_head,
)
from mlvision.models.weights import LoadReport

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
    "JointHead",
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
