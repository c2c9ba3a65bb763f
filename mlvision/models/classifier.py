"""A backbone with a head: normalised images in, logits out."""

from jaxtyping import Float
from torch import Tensor, nn

from mlvision.models.backbone import Backbone
from mlvision.models.heads import Head
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
