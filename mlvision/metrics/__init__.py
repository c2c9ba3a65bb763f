"""Metrics: pure functions of scores and targets, never of a model."""

from mlvision.metrics.average_precision import average_precision, average_precisions, mean_average_precision
from mlvision.metrics.f_measures import ClassMeasures, FMeasures, class_measures, decide, f_measures
from mlvision.metrics.figures import draw_precision_recall
from mlvision.metrics.summary import multilabel_summary, per_class_table

__all__ = [
    "ClassMeasures",
    "FMeasures",
    "average_precision",
    "average_precisions",
    "class_measures",
    "decide",
    "draw_precision_recall",
    "f_measures",
    "mean_average_precision",
    "multilabel_summary",
    "per_class_table",
]
