"""Label maps: where on an image which label is supported. They are stored, pooled by what a view shows, and mixed."""

from mlvision.labels.pool import OPERATORS, pool_label_map

__all__ = ["OPERATORS", "pool_label_map"]
