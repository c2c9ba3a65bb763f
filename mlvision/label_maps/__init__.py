"""Label maps: where on an image which label is supported. They are stored, pooled by what a view shows, and mixed."""

from mlvision.label_maps.pool import OPERATORS, Pooling, pool_label_map, pool_probabilities
from mlvision.label_maps.store import LabelMapStore

__all__ = ["OPERATORS", "LabelMapStore", "Pooling", "pool_label_map", "pool_probabilities"]
