"""Partial labels: a share of the labels stays known."""

import hashlib
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from mlvision.data.edits.base import EditConfig
from mlvision.data.manifest import Manifest
from mlvision.errors import check_fields


@dataclass(frozen=True)
class KnownLabelsConfig(EditConfig):
    """Each label, present or absent, stays known with a probability; the others become unknown.

    Source: the protocol of Durand et al., "Learning a Deep ConvNet for Multi-label Classification with Partial Labels",
    CVPR 2019, and of the papers after it.
    """

    name: Annotated[str, "which edit: a key of EDITS"] = "known_labels"
    share: Annotated[float, "probability that a label stays known"] = 0.1
    seed: Annotated[int, "seed of which they are: apart from the run's, so that all seeds of a sweep share them"] = 0

    def __post_init__(self) -> None:
        rules = (
            ("share", 0 < self.share <= 1, "a share above 0, at most 1"),
            ("seed", self.seed >= 0, "0 or more"),
        )
        check_fields(self, "data.edits.known_labels.", rules)

    def apply(self, manifest: Manifest) -> Manifest:
        """The same images of which less is known; what stays known at a smaller share stays so at a larger one."""
        labels, unknown = [], []
        for key, (present, not_known) in zip(manifest.keys, manifest.label_lists(), strict=True):
            digest = hashlib.shake_256(f"{self.seed} {key}".encode()).digest(4 * len(manifest.classes))
            draw = np.frombuffer(digest, dtype="<u4") / 2**32
            hidden = set(np.flatnonzero(draw >= self.share).tolist())
            labels.append(tuple(label for label in present if label not in hidden))
            unknown.append(tuple(sorted(hidden.union(not_known))))
        return manifest.relabel(labels, unknown, f"each label known with probability {self.share:g} (seed {self.seed})")
