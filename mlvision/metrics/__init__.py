"""Metrics: pure functions of scores and targets, never of a model. Pictures of them: `figures`, which needs matplotlib."""

from mlvision.metrics.average_precision import average_precision, average_precisions, mean_average_precision
from mlvision.metrics.bootstrap import Interval, bootstrap_interval
from mlvision.metrics.by_size import average_precision_by_size
from mlvision.metrics.calibration import Reliability, expected_calibration_error, reliability_table
from mlvision.metrics.f_measures import ClassMeasures, FMeasures, class_measures, decide, f_measures
from mlvision.metrics.faithfulness import (
    CrossLabelMatrix,
    DeletionMeasures,
    cross_label_drops,
    cross_label_matrix,
    deletion_measures,
    patch_order,
    specificity,
)
from mlvision.metrics.localisation import (
    MassInBox,
    RankAccuracy,
    mass_in_box,
    mass_in_mask,
    pointing_game,
    pointing_in_mask,
    rank_accuracy,
)
from mlvision.metrics.map_shape import entropy, gini, map_discrimination, max_sensitivity, png_bytes, spearman
from mlvision.metrics.ranking import ndcg_at_k, precision_at_k
from mlvision.metrics.real import real_accuracy
from mlvision.metrics.summary import multilabel_summary, per_class_table

__all__ = [
    "ClassMeasures",
    "CrossLabelMatrix",
    "DeletionMeasures",
    "FMeasures",
    "Interval",
    "MassInBox",
    "RankAccuracy",
    "Reliability",
    "average_precision",
    "average_precision_by_size",
    "average_precisions",
    "bootstrap_interval",
    "class_measures",
    "cross_label_drops",
    "cross_label_matrix",
    "decide",
    "deletion_measures",
    "entropy",
    "expected_calibration_error",
    "f_measures",
    "gini",
    "map_discrimination",
    "mass_in_box",
    "mass_in_mask",
    "max_sensitivity",
    "mean_average_precision",
    "multilabel_summary",
    "ndcg_at_k",
    "patch_order",
    "per_class_table",
    "png_bytes",
    "pointing_game",
    "pointing_in_mask",
    "precision_at_k",
    "rank_accuracy",
    "real_accuracy",
    "reliability_table",
    "spearman",
    "specificity",
]
