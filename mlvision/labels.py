"""Deprecated: the name of `mlvision.label_maps` in version 0.1, with its files. It goes with version 0.3."""

import importlib
import sys
import warnings

from mlvision.label_maps import OPERATORS, LabelMapStore, Pooling, pool_label_map, pool_probabilities

__all__ = ["OPERATORS", "LabelMapStore", "Pooling", "pool_label_map", "pool_probabilities"]

warnings.warn("mlvision.labels is now mlvision.label_maps", DeprecationWarning, stacklevel=2)

# The same modules, not copies of them: a class that both names give has to be one class.
for _name in ("annotate", "geometry", "importers", "mix", "oracle", "pool", "store"):
    sys.modules[f"{__name__}.{_name}"] = importlib.import_module(f"mlvision.label_maps.{_name}")
