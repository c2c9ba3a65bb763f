"""Whether the class that an image scores highest is among all those that fit it, where the split lists them."""

from dataclasses import dataclass
from typing import Annotated

from mlvision.data.manifest import Manifest
from mlvision.evaluators.base import Evaluator, EvaluatorConfig
from mlvision.metrics import real_accuracy
from mlvision.parts import Context
from mlvision.types import Predictions


@dataclass(frozen=True)
class RealConfig(EvaluatorConfig):
    """ReaL accuracy (real_accuracy), where the split has ReaL lists."""

    name: Annotated[str, "which evaluator: a key of EVALUATORS"] = "real"

    def build(self, context: Context) -> Evaluator:
        return Real()


class Real(Evaluator):
    """`real_accuracy`; an image whose highest class is unknown cannot be judged and is left out."""

    def metrics(self, manifest: Manifest) -> tuple[str, ...]:
        return ("real_accuracy",) if manifest.real_lists else ()

    def measure(self, predictions: Predictions, manifest: Manifest) -> dict[str, float]:
        if not manifest.real_lists:
            return {}
        logits = predictions.logits
        is_highest = logits == logits.amax(dim=1, keepdim=True)
        is_judged = ~(is_highest & predictions.targets.isnan()).any(dim=1)
        lists = [manifest.records[row].labels for row in predictions.index[is_judged].tolist()]
        return {"real_accuracy": real_accuracy(logits[is_judged], lists)}
