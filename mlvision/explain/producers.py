"""Label maps that are there anyway, read as explanations: the dense reading of a model's own head, and stored maps."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from mlvision.errors import InputError
from mlvision.explain.subject import Subject, check_batch
from mlvision.label_maps import LabelMapStore
from mlvision.models import DenseTeacher
from mlvision.types import LabelMap


@dataclass(frozen=True)
class DenseHead:
    """What the model's head says of each cell: its own maps where it gives them, else a linear head read cell by cell."""

    def maps(
        self, model: Any, images: Shaped[Tensor, "B in_chans H W"], indices: Int64[Tensor, " B"] | None = None
    ) -> LabelMap:
        """Of all classes: logits, or what the head's own maps are (queries' attention and transport plans are mass).

        Raises:
            InputError: a model without a backbone of timm's, or a head that cannot take a single cell.
        """
        check_batch(images)
        subject = Subject(model, (images.shape[1], images.shape[2], images.shape[3]))
        if subject.classifier is None:
            raise InputError(f"dense_head: no head of its own could be read cell by cell: {subject.lacks}")
        with torch.no_grad():
            pixels = subject.pixels(images)
            values, kind = subject.classifier(subject.normalise(pixels)).maps, "logit"
            if values is None:
                values = DenseTeacher(subject.classifier, subject.mean, subject.std).maps(pixels)
            else:
                kind = subject.classifier.head.map_kind or kind
        return LabelMap(values, kind=kind, groups=subject.space(values.shape[1]).groups)


@dataclass(frozen=True)
class OwnMaps:
    """What a method itself says of each cell: PatchCT's way from a label to the patches, Token Labeling's cells."""

    def maps(
        self, model: Any, images: Shaped[Tensor, "B in_chans H W"], indices: Int64[Tensor, " B"] | None = None
    ) -> LabelMap:
        """Of all classes, of the kind that the method makes.

        Raises:
            InputError: a model without maps of its own.
        """
        if not hasattr(model, "label_maps"):
            raise InputError(
                f"own_maps: {type(model).__name__} has no label maps of its own (take dense_head or grad_cam)"
            )
        with torch.no_grad():
            return model.label_maps(images)


class StoredMaps:
    """The maps of a store, whoever made them: a teacher, the annotated areas, an import."""

    def __init__(self, store: LabelMapStore):
        self.store = store

    def maps(
        self, model: Any, images: Shaped[Tensor, "B in_chans H W"], indices: Int64[Tensor, " B"] | None = None
    ) -> LabelMap:
        """As stored; they cover the whole images.

        Raises:
            InputError: no indices, or rows that the store does not have.
        """
        if indices is None:
            raise InputError(
                f"stored maps: {self.store.path} has a map for each row of a manifest; give the images' rows (indices=)"
            )
        return self.store.read(indices.cpu())
