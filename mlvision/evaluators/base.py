"""What an evaluator is: it measures the predictions of a split, after each epoch and in eval.py alike."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from mlvision.data.manifest import Manifest
from mlvision.errors import InputError, check_fields
from mlvision.parts import Context, PartConfig
from mlvision.types import Predictions


class Evaluator:
    """Measures predictions. What it gives has names that no other evaluator gives."""

    def metrics(self, manifest: Manifest) -> tuple[str, ...]:
        """Names of what `measure` gives of a split, of those that are better the higher they are.

        Training can choose its best epoch by them.
        """
        return ()

    def measure(self, predictions: Predictions, manifest: Manifest) -> dict[str, float]:
        """Metrics by name; NaN where one is not defined, none where the split does not state what they need.

        Args:
            predictions: of images of the manifest.
            manifest: the split, whose rows `predictions.index` counts.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class EvaluatorConfig(PartConfig):
    """The options of an evaluator, which each evaluator's own class adds to."""

    name: Annotated[str, "which evaluator: a key of EVALUATORS"]

    def __post_init__(self) -> None:
        check_fields(self, f"evaluators.{self.name}.")

    def build(self, context: Context) -> Evaluator:
        raise NotImplementedError


def measure(evaluators: Iterable[Evaluator], predictions: Predictions, manifest: Manifest) -> dict[str, float]:
    """What all the evaluators give, in their order."""
    metrics: dict[str, float] = {}
    for evaluator in evaluators:
        metrics |= evaluator.measure(predictions, manifest)
    return metrics


def check_each_once(configs: Iterable[EvaluatorConfig]) -> None:
    """Refuse a list that names an evaluator twice: the metrics of one would replace those of the other.

    Raises:
        InputError: names it.
    """
    names: set[str] = set()
    for config in configs:
        if config.name in names:
            raise InputError(f"evaluators: expected each one once, got {config.name} twice")
        names.add(config.name)
