"""Label maps that are there anyway, read as explanations: the dense reading of a model's own head, and stored maps."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from mlvision.errors import InputError
from mlvision.explain.subject import Subject
from mlvision.labels import LabelMapStore
from mlvision.models import build_teacher
from mlvision.types import LabelMap


@dataclass(frozen=True)
class DenseHead:
    """What the model's head says of each cell: its own maps where it gives them, else a linear head read cell by cell."""

    def maps(
        self, model: Any, images: Shaped[Tensor, "B in_chans H W"], indices: Int64[Tensor, " B"] | None = None
    ) -> LabelMap:
        """Logits of all classes.

        Raises:
            InputError: a model without a backbone of timm's, or a head that cannot take a single cell.
        """
        subject = Subject(model)
        if subject.classifier is None:
            raise InputError("dense_head: this network has no head of its own that could be read cell by cell")
        with torch.no_grad():
            pixels = subject.pixels(images)
            values = subject.classifier(subject.normalise(pixels)).maps
            if values is None:
                values = build_teacher(model).maps(pixels)
        return LabelMap(values, kind="logit", activation=getattr(model, "activation", "sigmoid"))


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
