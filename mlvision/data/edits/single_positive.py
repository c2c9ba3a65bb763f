"""Single positive labels: of each image one label that is present stays known."""

import hashlib
from dataclasses import dataclass
from typing import Annotated

from mlvision.data.edits.base import EditConfig
from mlvision.data.manifest import Manifest
from mlvision.errors import check_fields

OTHERS = ("unknown", "absent")


@dataclass(frozen=True)
class SinglePositiveConfig(EditConfig):
    """One present label of each image stays, drawn evenly; all other labels become unknown, or count as absent.

    Source: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021.
    """

    name: Annotated[str, "which edit: a key of EDITS"] = "single_positive"
    others: Annotated[str, "what the other labels become: unknown, or absent (assume negative)"] = "unknown"
    seed: Annotated[int, "seed of the draw: apart from the run's, so that all seeds of a sweep share it"] = 0

    def __post_init__(self) -> None:
        rules = (
            ("others", self.others in OTHERS, f"one of {', '.join(OTHERS)}"),
            ("seed", self.seed >= 0, "0 or more"),
        )
        check_fields(self, "data.edits.single_positive.", rules)

    def apply(self, manifest: Manifest) -> Manifest:
        """The same images; one without a present label shows none."""
        labels, unknown = [], []
        every = set(range(len(manifest.classes)))
        for key, (present, not_known) in zip(manifest.keys, manifest.label_lists(), strict=True):
            draw = hashlib.sha256(f"{self.seed} {key}".encode()).digest()
            kept = {present[int.from_bytes(draw[:8], "little") % len(present)]} if present else set()
            labels.append(tuple(kept))
            unknown.append(tuple(sorted(every - kept if self.others == "unknown" else not_known)))
        return manifest.relabel(labels, unknown, f"one present label known, others {self.others} (seed {self.seed})")
