"""A backbone with a head: normalised images in, logits out."""

from jaxtyping import Float
from torch import Tensor, nn

from mlvision.models.backbone import Backbone, BackboneConfig, create_backbone, load_weights
from mlvision.models.heads.base import NO_ASSETS, Assets, Head, HeadConfig
from mlvision.types import HeadOutput


class Classifier(nn.Module):
    """What a Method trains; every method has the same one, so weights pass from one to another."""

    def __init__(self, backbone: Backbone, head: Head):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.num_classes = head.num_classes

    def forward(self, images: Float[Tensor, "B in_chans H W"]) -> HeadOutput:
        """The head's output for normalised images."""
        return self.head(self.backbone(images))


def build_classifier(
    model: BackboneConfig,
    head: HeadConfig,
    num_classes: int,
    *,
    image_size: tuple[int, int] | int | None = None,
    assets: Assets = NO_ASSETS,
) -> Classifier:
    """Build backbone and head, and load the weights into both: what classifies in the file goes into the head's
    `classifier_layer`, if it has one that fits.

    Args:
        assets: what the head needs besides widths and options; see `HeadConfig`.

    Raises:
        InputError: see `build_backbone` and `HeadConfig.build`.
    """
    backbone = create_backbone(model, image_size)
    built = head.build(backbone.num_features, num_classes, backbone.map_features, assets)
    report = load_weights(backbone, model, built.classifier_layer)
    built.pretrained = report is not None and report.has_classifier
    return Classifier(backbone, built)
