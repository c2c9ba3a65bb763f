"""Whether what is given a score p is there in a share p of the cases."""

from dataclasses import dataclass
from typing import Annotated

from mlvision.data.manifest import Manifest
from mlvision.evaluators.base import Evaluator, EvaluatorConfig
from mlvision.metrics import expected_calibration_error
from mlvision.parts import Context
from mlvision.types import Predictions


@dataclass(frozen=True)
class CalibrationConfig(EvaluatorConfig):
    """Expected calibration error (ECE), less of which is better."""

    name: Annotated[str, "which evaluator: a key of EVALUATORS"] = "calibration"

    def build(self, context: Context) -> Evaluator:
        return Calibration()


class Calibration(Evaluator):
    """`expected_calibration_error`."""

    def measure(self, predictions: Predictions, manifest: Manifest) -> dict[str, float]:
        return {"ECE": expected_calibration_error(predictions.space.scores(predictions.logits), predictions.targets)}
