"""What every head has: its options, and the hooks by which methods, explainers and run folders use it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mlvision.errors import InputError, check_fields
from mlvision.options import Selectable
from mlvision.types import Features, HeadOutput

# What a head needs besides widths and options, by name, such as the embeddings of its labels' names.
Assets = Mapping[str, Tensor]
NO_ASSETS: Assets = MappingProxyType({})
TAU_RANGE = (0.01, 1.0)  # of the temperature of transport: a colder one would freeze the plan


@dataclass(frozen=True)
class HeadConfig(Selectable):
    """The options of every head; each head's own Config adds to them and builds it.

    A head that needs more than widths has assets. They are made once, before training, stored in the run folder by
    `Head.save_assets`, and loaded from there with the trained run.

    Attributes:
        asset_files: names of the files that the head stores in the run folder.
    """

    asset_files: ClassVar[tuple[str, ...]] = ()

    name: Annotated[str, "which head: a key of HEADS"]

    def __post_init__(self) -> None:
        check_fields(self, "head.")

    def build(
        self, in_features: int, num_classes: int, map_features: int | None = None, assets: Assets = NO_ASSETS
    ) -> "Head":
        """A new head with random weights.

        Args:
            in_features: width of the pooled features.
            map_features: width of the map; None: as in_features.
            assets: what `make_assets` or `load_assets` returned.

        Raises:
            InputError: an option that does not fit these widths, or an asset that is missing.
        """
        raise NotImplementedError

    def make_assets(self, classes: Sequence[str]) -> Assets:
        """What a new head needs, made of the names of its classes; nothing by default."""
        return NO_ASSETS

    def load_assets(self, folder: Path, classes: Sequence[str]) -> Assets:
        """What `Head.save_assets` stored in a run folder; nothing by default.

        Raises:
            InputError: the file is missing, or belongs to other classes or options.
        """
        return NO_ASSETS


class Head(nn.Module):
    """Features in, one logit per class out.

    Attributes:
        num_classes: C.
        map_kind: the kind of the maps that `forward` returns, a key of `types.KINDS`; None: it returns none.
        pretrained: its classifier came with the weights of the backbone, so it keeps the biases that it has.
    """

    num_classes: int
    map_kind: str | None = None
    pretrained: bool = False

    @property
    def classifier_layer(self) -> nn.Linear | None:
        """The layer that a classifier in the backbone's file of weights may fill; None: there is no such layer."""
        return None

    def forward(self, features: Features) -> HeadOutput:
        raise NotImplementedError

    def start_at(self, logits: Float[Tensor, " C"]) -> None:
        """Set the biases, before training, so that features of 0 give these logits.

        Methods call it with each class's share of the training images. A head whose biases start at 0 calls every class
        half-present wherever it sees nothing. A few hundred steps of training do not move them, because the weights make
        up for them in the image as a whole; the cells of a label map then hold 0.5 for every class that is not there.
        """
        raise NotImplementedError

    def add_classes(self, classes: Sequence[str], names: Sequence[str]) -> None:
        """Give the trained head further classes by their names, whose logits come last.

        Args:
            classes: the names of the classes that it has.
            names: those of the new ones.

        Raises:
            InputError: a head that reads no names, which is the default.
        """
        raise InputError(
            f"extra_labels: {type(self).__name__} has its own {len(classes)} classes only; a head that compares with "
            "names (head.name=text) can be given more"
        )

    def save_assets(self, folder: Path, classes: Sequence[str]) -> None:
        """Store in a new run folder what the head was built from; nothing by default."""


class Joint(NamedTuple):
    """An image, its patches and the labels in one space.

    Attributes:
        image: `[B, D]`, of length 1.
        patches: `[B, N, D]`, rows of the map one after the other.
        labels: `[C, D]`, of length 1.
        grid: (h, w) of the patches.
    """

    image: Float[Tensor, "B D"]
    patches: Float[Tensor, "B N D"]
    labels: Float[Tensor, "C D"]
    grid: tuple[int, int]


class JointHead(Head):
    """A head that compares an image and its patches with its labels in one space, as transport between them needs it.

    Attributes:
        label_embeddings: `[C, D]`, of any length.
        log_tau: logarithm of the temperature; it requires a gradient if anything trains it.
    """

    label_embeddings: Tensor
    log_tau: nn.Parameter

    @property
    def tau(self) -> Float[Tensor, ""]:
        """The temperature of the plan."""
        return self.log_tau.exp().clamp(*TAU_RANGE)

    def join(self, features: Features) -> Joint:
        """What the head compares."""
        raise NotImplementedError

    def logits(self, joint: Joint) -> Float[Tensor, "B C"]:
        """The logits of what `join` returned."""
        raise NotImplementedError

    def cosines(self, joint: Joint) -> Float[Tensor, "B N C"]:
        """Of each patch and each label."""
        return F.normalize(joint.patches, dim=-1) @ joint.labels.T

    def plan(self, joint: Joint) -> Float[Tensor, "B N C"]:
        """The way back from each label to the patches; columns sum to 1."""
        return (self.cosines(joint) / self.tau).softmax(1)


def set_bias(bias: Tensor, logits: Float[Tensor, " C"]) -> None:
    """Write logits into a parameter, whatever its dtype and device."""
    with torch.no_grad():
        bias.copy_(logits)
