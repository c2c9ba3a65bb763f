"""How far mAP would move with other images of the same kind."""

from dataclasses import dataclass
from typing import Annotated

from mlvision.data.manifest import Manifest
from mlvision.errors import check_fields
from mlvision.evaluators.base import Evaluator, EvaluatorConfig
from mlvision.metrics import bootstrap_interval
from mlvision.parts import Context
from mlvision.types import Predictions


@dataclass(frozen=True)
class BootstrapConfig(EvaluatorConfig):
    """95 % interval of mAP over the choice of images (mAP_low, mAP_high)."""

    name: Annotated[str, "which evaluator: a key of EVALUATORS"] = "bootstrap"
    num_samples: Annotated[int, "resamplings of the images; each costs one mAP"] = 1000

    def __post_init__(self) -> None:
        rules = (("num_samples", 2 <= self.num_samples <= 1_000_000, "2 to a million resamplings"),)
        check_fields(self, "evaluators.bootstrap.", rules)

    def build(self, context: Context) -> Evaluator:
        return Bootstrap(self.num_samples)


class Bootstrap(Evaluator):
    """`bootstrap_interval` of the plain mAP."""

    def __init__(self, num_samples: int):
        self.num_samples = num_samples

    def metrics(self, manifest: Manifest) -> tuple[str, ...]:
        return "mAP_low", "mAP_high"

    def measure(self, predictions: Predictions, manifest: Manifest) -> dict[str, float]:
        interval = bootstrap_interval(predictions.logits, predictions.targets, num_samples=self.num_samples)
        return {"mAP_low": interval.low, "mAP_high": interval.high}
