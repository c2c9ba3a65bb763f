"""Metrics: pure functions of scores and targets, never of a model."""

from mlvision.metrics.average_precision import average_precision, average_precisions, mean_average_precision
from mlvision.metrics.calibration import Reliability, expected_calibration_error, reliability_table
from mlvision.metrics.f_measures import ClassMeasures, FMeasures, class_measures, decide, f_measures
from mlvision.metrics.figures import draw_precision_recall
from mlvision.metrics.localisation import MassInBox, mass_in_box, pointing_game
from mlvision.metrics.summary import multilabel_summary, per_class_table

__all__ = [
    "ClassMeasures",
    "FMeasures",
    "MassInBox",
    "Reliability",
    "average_precision",
    "average_precisions",
    "class_measures",
    "decide",
    "draw_precision_recall",
    "expected_calibration_error",
    "f_measures",
    "mass_in_box",
    "mean_average_precision",
    "multilabel_summary",
    "per_class_table",
    "pointing_game",
    "reliability_table",
]
