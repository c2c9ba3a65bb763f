"""Edits: what changes the labels of training images, or which images these are, and the options of each.

A new one is a file and a line here.
"""

from mlvision.data.edits.base import EditConfig, apply_edits
from mlvision.data.edits.known_labels import KnownLabelsConfig

EDITS: dict[str, type[EditConfig]] = {
    "known_labels": KnownLabelsConfig,
}
EditConfig.choices = EDITS

__all__ = ["EDITS", "EditConfig", "KnownLabelsConfig", "apply_edits"]
