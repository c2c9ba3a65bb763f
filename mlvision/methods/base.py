"""The interface between a paper's method and everything that runs it.

A method is one file: what it computes in a training step, and what it predicts. The loop, the loader and the scripts know
only what stands here.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mlvision.data.manifest import Manifest
from mlvision.data.samplers import EpochOrder, shuffled
from mlvision.errors import check_fields
from mlvision.models import Classifier
from mlvision.options import Selectable
from mlvision.parts import Context, LabelStatistics
from mlvision.types import Batch, HeadOutput, LabelMap, StepOutput, to_scores


@dataclass(frozen=True)
class MethodConfig(Selectable):
    """The options of every method; each method's own Config adds to them, and builds the method."""

    name: Annotated[str, "which method: a key of METHODS"]

    def __post_init__(self) -> None:
        check_fields(self, "method.")

    def build(self, context: Context, classifier: Classifier) -> "Method":
        """The method around a classifier.

        Raises:
            InputError: options that do not fit the classes or the classifier.
        """
        raise NotImplementedError


class Method(nn.Module):
    """A classifier with the training rule of one paper.

    Images come as uint8, or as float in [0, 1], everywhere outside; the method owns mean and standard deviation and
    normalises as its first step. State that must survive a resume is a buffer.

    Each of several processes calls `forward` with its part of the batch; the same parameters must get a gradient in every
    step. Before each call all buffers are overwritten by rank 0's. So a buffer that collects what comes by (a counter, a
    moving average, a bank of features) holds rank 0's part of the batches only; a method that needs all of them has to
    exchange them itself, or to say that it runs in one process.

    Attributes:
        needs_label_map: the loader puts a label map into every batch.
        num_views: how many views of each image a batch holds, adjacent.
        activation: what makes probabilities of its logits: sigmoid, or softmax where it trains them so.
    """

    needs_label_map = False
    num_views = 1
    activation = "sigmoid"
    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier):
        super().__init__()
        preprocessing = classifier.backbone.preprocessing
        self.classifier = classifier
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))

    def normalise(self, images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B in_chans H W"]:
        """uint8, or float in [0, 1], to what the weights expect; keeps the memory format."""
        # What is made here is changed in place: new memory for each result costs more than the arithmetic.
        raw = images.dtype == torch.uint8
        centred = images.to(self.mean.dtype).div_(255).sub_(self.mean) if raw else images - self.mean
        return centred.div_(self.std)

    def classify(self, images: Shaped[Tensor, "B in_chans H W"]) -> HeadOutput:
        """All that the head gives for raw images; logits in at least float32 also under autocast."""
        output = self.classifier(self.normalise(images))
        output.logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        return output

    def predict(self, images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C"]:
        """Logits of raw images; differentiable."""
        return self.classify(images).logits

    def scores(self, logits: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        """Logits to what the method takes for probabilities."""
        return to_scores(logits, self.activation)

    def forward(self, batch: Batch) -> StepOutput:
        """One training step's loss, and detached scalars to log."""
        raise NotImplementedError

    def prepare(self, statistics: LabelStatistics) -> None:
        """See the training split's statistics once, before the first step; what is kept of them is in the state.

        A head without a trained classifier starts at each class's share of the images.
        """
        if not self.classifier.head.pretrained:
            self.classifier.head.start_at(starting_logits(statistics, self.activation))

    def check_label_map(self, label_map: LabelMap) -> None:
        """See one map of the training images before the first step, where the method needs them.

        Raises:
            InputError: maps of a kind that the method cannot learn from.
        """

    def make_sampler(self, manifest: Manifest, seed: int) -> EpochOrder:
        """The order of the training images in each epoch: a function of (seed, epoch)."""
        return shuffled(manifest, seed)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Named groups, to which `optim.lr_scales` refers."""
        backbone = list(self.classifier.backbone.parameters())
        known = {id(p) for p in backbone}
        return {"backbone": backbone, "head": [p for p in self.parameters() if id(p) not in known]}

    def layers(self) -> list[list[nn.Parameter]]:
        """From the first to the last, the layers whose learning rates `optim.layer_decay` sets apart."""
        return self.classifier.backbone.layers()

    def on_epoch_start(self, epoch: int) -> None:
        """Called before the first step of an epoch, and again where a run resumes within it."""

    def after_step(self, output: StepOutput) -> None:
        """Called after each optimizer step."""


def starting_logits(statistics: LabelStatistics, activation: str) -> Float[Tensor, " C"]:
    """What a classifier that sees nothing should say: the log-odds of each class's share of the images (sigmoid), or the
    logarithm of its share of the labels (softmax).

    Images in which a class is unknown do not count for it. A class in none or in all of n images counts as in half an
    image of them, or as missing in half a one; a class that is unknown in all images has the mean share of the others.
    """
    present, known = (torch.tensor(counts).double() for counts in (statistics.positives, statistics.known))
    least = 0.5 / known
    share = (present / known).maximum(least).minimum(1 - least)
    share = share.where(known > 0, share[known > 0].mean() if known.any() else 0.5)
    logits = (share / share.sum()).log() if activation == "softmax" else share.logit()
    return logits.float()
