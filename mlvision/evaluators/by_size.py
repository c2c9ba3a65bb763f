"""mAP of small, medium and large objects, where the data set states how large they are."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from mlvision.data.manifest import Manifest
from mlvision.evaluators.base import Evaluator, EvaluatorConfig
from mlvision.metrics import average_precision_by_size, mean_average_precision
from mlvision.metrics.by_size import COCO_AREAS
from mlvision.parts import Context
from mlvision.types import Predictions

_METRICS = ("mAP_small", "mAP_medium", "mAP_large")


@dataclass(frozen=True)
class BySizeConfig(EvaluatorConfig):
    """mAP of small, medium and large objects (mAP_small, mAP_medium, mAP_large), where the data set has boxes."""

    name: Annotated[str, "which evaluator: a key of EVALUATORS"] = "by_size"

    def build(self, context: Context) -> Evaluator:
        return BySize()


class BySize(Evaluator):
    """`average_precision_by_size` with COCO's limits; a size that no object of the split has is not reported."""

    def metrics(self, manifest: Manifest) -> tuple[str, ...]:
        areas = manifest.object_areas
        if areas is None:
            return ()
        sizes = np.digitize(areas[(manifest.targets == 1) & ~np.isnan(areas)], COCO_AREAS)
        return tuple(name for size, name in enumerate(_METRICS) if (sizes == size).any())

    def measure(self, predictions: Predictions, manifest: Manifest) -> dict[str, float]:
        areas = manifest.object_areas
        if areas is None:
            return {}
        by_size = average_precision_by_size(
            predictions.logits, predictions.targets, areas[predictions.index.numpy()], COCO_AREAS
        )
        means = zip(_METRICS, map(mean_average_precision, by_size), strict=True)
        return {name: mean for name, (mean, num_skipped) in means if num_skipped < len(manifest.classes)}
