"""Label maps: where on an image which label is supported. They are stored, pooled by what a view shows, and mixed."""

from mlvision.labels.pool import OPERATORS, Pooling, pool_label_map, pool_probabilities
from mlvision.labels.store import LabelMapStore

__all__ = ["OPERATORS", "LabelMapStore", "Pooling", "pool_label_map", "pool_probabilities"]
