"""What the field reports of an evaluation: mean average precisions and F-measures."""

from dataclasses import dataclass
from typing import Annotated

import torch

from mlvision.data.manifest import Manifest
from mlvision.evaluators.base import Evaluator, EvaluatorConfig
from mlvision.metrics import multilabel_summary
from mlvision.parts import Context
from mlvision.types import Predictions


@dataclass(frozen=True)
class MultilabelConfig(EvaluatorConfig):
    """mAP in its three flavours, F-measures by three rules, and counts of images, classes and unknown labels."""

    name: Annotated[str, "which evaluator: a key of EVALUATORS"] = "multilabel"

    def build(self, context: Context) -> Evaluator:
        return Multilabel()


class Multilabel(Evaluator):
    """`multilabel_summary`, at the thresholds of the predictions."""

    def metrics(self, manifest: Manifest) -> tuple[str, ...]:
        summary = multilabel_summary(torch.zeros(1, 1), torch.ones(1, 1))
        return tuple(name for name in summary if name != "threshold" and not name.startswith("num_"))

    def measure(self, predictions: Predictions, manifest: Manifest) -> dict[str, float]:
        return multilabel_summary(
            predictions.logits, predictions.targets, threshold=predictions.thresholds, space=predictions.space
        )
