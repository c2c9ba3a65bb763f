"""What an explanation is, and what an explainer has to be."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mlvision.explain.selection import Selection
from mlvision.explain.subject import Subject
from mlvision.space import Groups
from mlvision.types import LabelMap


@dataclass
class Explanation:
    """Where in each image a model found evidence for (positive) and against (negative) some labels.

    Attributes:
        maps: `[B, L, h, w]` float32 of the method's own resolution, rows first; they cover the images that were given.
        labels: `[B, L]` class indices; -1 in empty places, whose maps are 0.
        logits: `[B, C]` of the images as they are.
        method: the explainer's name.
        against: `[B, L]`: the class that a contrast is set against, -1 where there is none; None: none anywhere.
        label_specific: False where the maps of all labels of an image are the same by construction.
        kind: what the values are, as in `LabelMap.kind`.
        groups: what makes probabilities of maps of logits, as in `LabelMap.groups`.
    """

    maps: Float[Tensor, "B L h w"]
    labels: Int64[Tensor, "B L"]
    logits: Float[Tensor, "B C"]
    method: str = ""
    against: Int64[Tensor, "B L"] | None = None
    label_specific: bool = True
    kind: str = "attribution"
    groups: Groups = ()

    @property
    def flat(self) -> Bool[Tensor, "B L"]:
        """Where a map says nothing: it is the same everywhere."""
        return (self.maps.amax((2, 3)) == self.maps.amin((2, 3))) & (self.labels >= 0)

    def as_label_map(self) -> LabelMap:
        """The same maps, for whatever takes label maps; what was not explained is worth nothing."""
        fill = -torch.inf if self.kind == "logit" else 0.0
        return LabelMap(self.maps, self.labels, self.kind, fill, groups=self.groups)


@runtime_checkable
class Explainer(Protocol):
    """What the table EXPLAINERS holds: a frozen dataclass of its options.

    `label_specific` is False where an image has one map whatever the label. Where negative values mean as much as positive
    ones, `signed = True` has them drawn too.
    """

    label_specific: bool

    def explain(
        self, subject: Subject, pixels: Float[Tensor, "B in_chans H W"], selection: Selection
    ) -> Float[Tensor, "B L h w"]:
        """Maps of the selected scores; `subject` is in eval mode, its parameters require no gradient, random numbers are
        seeded. Values of empty places do not matter.

        Raises:
            InputError: the model cannot carry the method; says why.
        """
        ...


@runtime_checkable
class MapProducer(Protocol):
    """Anything else that has label maps of images: stored maps (which need the indices), a transport plan, a dense head."""

    def maps(self, model: Any, images: Tensor, indices: Tensor | None) -> LabelMap: ...
