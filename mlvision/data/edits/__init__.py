"""Edits: what changes the labels of training images, or which images these are, and the options of each.

A new one is a file and a line here.
"""

from mlvision.data.edits.base import EditConfig, apply_edits
from mlvision.data.edits.known_labels import KnownLabelsConfig
from mlvision.data.edits.single_positive import SinglePositiveConfig

EDITS: dict[str, type[EditConfig]] = {
    "known_labels": KnownLabelsConfig,
    "single_positive": SinglePositiveConfig,
}
EditConfig.choices = EDITS

__all__ = ["EDITS", "EditConfig", "KnownLabelsConfig", "SinglePositiveConfig", "apply_edits"]
