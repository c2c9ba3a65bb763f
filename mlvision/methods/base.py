"""The interface between a paper's method and everything that runs it.

A method is one file: what it computes in a training step, and what it predicts. The loop, the loader and the scripts know
only what stands here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mlvision.data.manifest import Manifest
from mlvision.errors import InputError, check_fields
from mlvision.models import Classifier
from mlvision.options import Selectable
from mlvision.parts import Context, LabelStatistics
from mlvision.space import LabelSpace, map_groups
from mlvision.types import Batch, EpochPlan, Features, HeadOutput, LabelMap, Predictions, StepOutput


@dataclass(frozen=True)
class MethodConfig(Selectable):
    """The options of every method; each method's own Config adds to them, and builds the method."""

    name: Annotated[str, "which method: a key of METHODS"]

    def __post_init__(self) -> None:
        check_fields(self, "method.")

    def build(self, context: Context, classifier: Classifier) -> "Method":
        """The method around a classifier; without its helpers when `context.training` is False.

        Raises:
            InputError: options that do not fit the classes or the classifier.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Epoch:
    """What a method can see and ask before it plans an epoch.

    Attributes:
        number: from 0.
        seed: differs between runs and epochs, and is the same in all processes.
        train: the training images, whose rows `Batch.index` counts.
        predict: a role, train or val, to predictions of its images as at evaluation, by the weights of this moment. Of
            several processes each has to call it.
    """

    number: int
    seed: int
    train: Manifest
    predict: Callable[[str], Predictions]


class Helpers(dict[str, nn.Module]):
    """Frozen networks that help to train a method and are no part of it; a copy of the method has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Helpers":
        return Helpers()


class Method(nn.Module):
    """A classifier with the training rule of one paper.

    Images come as uint8, or as float in [0, 1], everywhere outside; the method owns mean and standard deviation and
    normalises as its first step.

    In a training step, each of several processes calls `forward` with its part of the batch; the same parameters must get a
    gradient in every step. What else changes while a method trains is one of these, and survives a resume bit for bit:

    - A plain buffer, such as the statistics of a batch norm. Before each step all processes take those of rank 0, which has
      seen its own part of the batches only.
    - Local state (`add_local_state`): a bank of features, a counter, pseudo-labels. Only `after_step` and `begin_epoch` may
      change it, from what all processes have gathered, so it is the same in one process and in several.
    - A helper (`add_helper`): a frozen network such as a teacher. It is not averaged, not a part of `best.pt`, and not
      needed to predict. `after_step` may change it.
    - The plan of an epoch (`begin_epoch`).

    Attributes:
        needs_label_map: the loader puts a label map into every batch.
        sparse_targets: batches have `labels`, a list per image, in place of `targets`: for very many classes.
        num_views: how many views of each image a batch holds, adjacent.
        has_order: `begin_epoch` plans the order of the training images, which leaves `loader.sampling` no say.
        epoch: the epoch under way, from 0.
        space: what makes scores of its logits, by the loss that trains them, and how the scores decide.
    """

    needs_label_map = False
    sparse_targets = False
    num_views = 1
    has_order = False
    epoch = 0
    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier, space: LabelSpace):
        super().__init__()
        preprocessing = classifier.backbone.preprocessing
        self.classifier = classifier
        self.space = space
        self.helpers = Helpers()
        self.local_state: set[str] = set()
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))

    def add_helper(self, name: str, module: nn.Module) -> None:
        """Register a frozen network as `self.helpers[name]`, in eval mode, without gradients."""
        self.helpers[name] = module.requires_grad_(False).eval()

    def add_local_state(self, name: str, value: Tensor) -> None:
        """Register a buffer as `self.<name>` whose content is the same in one process and in several."""
        self.register_buffer(name, value)
        self.local_state.add(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Method":
        """What nn.Module calls to move itself; the helpers follow."""
        for helper in self.helpers.values():
            helper._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def normalise(self, images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B in_chans H W"]:
        """uint8, or float in [0, 1], to what the weights expect; keeps the memory format."""
        # What is made here is changed in place: new memory for each result costs more than the arithmetic.
        raw = images.dtype == torch.uint8
        centred = images.to(self.mean.dtype).div_(255).sub_(self.mean) if raw else images - self.mean
        return centred.div_(self.std)

    def features(self, images: Shaped[Tensor, "B in_chans H W"]) -> Features:
        """What the backbone gives of raw images, in at least float32 also under autocast."""
        features = self.classifier.backbone(self.normalise(images))
        return Features(_at_least_float32(features.map), _at_least_float32(features.pooled))

    def classify(self, images: Shaped[Tensor, "B in_chans H W"]) -> HeadOutput:
        """All that the head gives for raw images; logits in at least float32 also under autocast."""
        output = self.classifier(self.normalise(images))
        output.logits = _at_least_float32(output.logits)
        return output

    def predict(self, images: Shaped[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C"]:
        """Logits of raw images; differentiable."""
        return self.classify(images).logits

    def label_maps(self, images: Shaped[Tensor, "B in_chans H W"]) -> LabelMap:
        """How much the method sees of each label in each cell of raw images, if it is a method that makes maps.

        Raises:
            InputError: it has no maps of its own.
        """
        raise InputError(f"own_maps: {type(self).__name__} has no label maps of its own (take dense_head or grad_cam)")

    def forward(self, batch: Batch) -> StepOutput:
        """One training step's loss, detached scalars to log, and rows for `after_step`."""
        raise NotImplementedError

    def prepare(self, statistics: LabelStatistics) -> None:
        """See the training split's statistics once, before the first step; what is kept of them is in the state.

        A head without a trained classifier starts at each class's share of the images.
        """
        if not self.classifier.head.pretrained:
            self.classifier.head.start_at(starting_logits(statistics, self.space))

    def check_label_map(self, label_map: LabelMap) -> None:
        """See one map of the training images before the first step, where the method needs them.

        Raises:
            InputError: maps of a kind that the method cannot learn from.
        """

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Named groups, to which `optim.lr_scales` refers."""
        backbone = list(self.classifier.backbone.parameters())
        known = {id(p) for p in backbone}
        return {"backbone": backbone, "head": [p for p in self.parameters() if id(p) not in known]}

    def layers(self) -> list[list[nn.Parameter]]:
        """From the first to the last, the layers whose learning rates `optim.layer_decay` sets apart."""
        return self.classifier.backbone.layers()

    def begin_epoch(self, epoch: Epoch) -> EpochPlan:
        """Decide what the epoch visits and what its images show; called once, before its first step.

        A run that resumes within an epoch goes on with the plan that it had.
        """
        return EpochPlan()

    def after_step(self, rows: dict[str, Shaped[Tensor, "B ..."]]) -> None:
        """Called after each optimizer step, with the rows that `forward` gave for the whole batch, of all processes."""


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def starting_logits(statistics: LabelStatistics, space: LabelSpace) -> Float[Tensor, " C"]:
    """What a classifier that sees nothing should say: the log-odds of each class's share of the images (sigmoid), or the
    logarithm of its share of the labels of its group (softmax).

    Images in which a class is unknown do not count for it. A class in none or in all of n images counts as in half an
    image of them, or as missing in half a one; a class that is unknown in all images has the mean share of the others.
    """
    present, known = (torch.tensor(counts).double() for counts in (statistics.positives, statistics.known))
    least = 0.5 / known
    share = (present / known).maximum(least).minimum(1 - least)
    share = share.where(known > 0, share[known > 0].mean() if known.any() else 0.5)
    return map_groups(
        lambda group, dim: (group / group.sum(dim, keepdim=True)).log(), share, space.groups, torch.logit, dim=0
    ).float()
