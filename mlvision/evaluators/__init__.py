"""Evaluators: what is measured of the predictions of a split, and the options that build them.

A new one is a file and a line here.
"""

from mlvision.evaluators.base import Evaluator, EvaluatorConfig, check_each_once, measure
from mlvision.evaluators.bootstrap import BootstrapConfig
from mlvision.evaluators.by_size import BySizeConfig
from mlvision.evaluators.calibration import CalibrationConfig
from mlvision.evaluators.label_ranking import LabelRankingConfig
from mlvision.evaluators.multilabel import MultilabelConfig
from mlvision.evaluators.real import RealConfig

EVALUATORS: dict[str, type[EvaluatorConfig]] = {
    "multilabel": MultilabelConfig,
    "calibration": CalibrationConfig,
    "by_size": BySizeConfig,
    "real": RealConfig,
    "bootstrap": BootstrapConfig,
    "label_ranking": LabelRankingConfig,
}
EvaluatorConfig.choices = EVALUATORS

__all__ = [
    "EVALUATORS",
    "BootstrapConfig",
    "BySizeConfig",
    "CalibrationConfig",
    "Evaluator",
    "EvaluatorConfig",
    "LabelRankingConfig",
    "MultilabelConfig",
    "RealConfig",
    "check_each_once",
    "measure",
]
