"""Whether each image ranks its labels above the classes that it does not show."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Int64

from mlvision.data.manifest import Manifest
from mlvision.evaluators.base import Evaluator, EvaluatorConfig
from mlvision.parts import Context
from mlvision.types import Predictions


@dataclass(frozen=True)
class LabelRankingConfig(EvaluatorConfig):
    """Label ranking average precision (LRAP), coverage error and ranking loss; less of the last two is better."""

    name: Annotated[str, "which evaluator: a key of EVALUATORS"] = "label_ranking"

    def build(self, context: Context) -> Evaluator:
        return LabelRanking()


class LabelRanking(Evaluator):
    """What each image makes of its own ranking of the classes; means over images.

    - `LRAP`, in (0, 1]: of the classes that are ranked at a label's place or above, the share of labels; mean over labels.
    - `coverage_error`, 0 to C: how many classes of the ranking have to be taken to have all labels.
    - `ranking_loss`, in [0, 1]: share of pairs of a label and another class that are in the wrong order.

    A tie counts against the image: equal scores are all at the last of their places, and a tied pair is in the wrong order.
    Unknown classes are left out of the ranking, and so are images of which nothing is known. Images with no label, or with
    nothing else, have an LRAP of 1 and a ranking loss of 0, those without a label a coverage error of 0.

    Source: Tsoumakas et al., "Mining Multi-label Data", Data Mining and Knowledge Discovery Handbook, 2010; the cases at the
    borders as scikit-learn's `label_ranking_average_precision_score`, `coverage_error` and `label_ranking_loss` have them.
    """

    def metrics(self, manifest: Manifest) -> tuple[str, ...]:
        return ("LRAP",)

    def measure(self, predictions: Predictions, manifest: Manifest) -> dict[str, float]:
        odds, targets = predictions.space.log_odds(predictions.logits).numpy(), predictions.targets.numpy()
        known = (targets == targets).any(axis=1)
        if not known.any():
            return dict.fromkeys(("LRAP", "coverage_error", "ranking_loss"), float("nan"))
        is_label, place, labels_above = _ranking(odds[known], targets[known])
        num_labels = is_label.sum(axis=1)
        num_others = (targets[known] == 0).sum(axis=1)
        share = np.where(is_label, labels_above / place, 0).sum(axis=1)
        wrong = np.where(is_label, place - labels_above, 0).sum(axis=1)
        means = {
            "LRAP": np.where((num_labels > 0) & (num_others > 0), share / np.maximum(num_labels, 1), 1.0),
            "coverage_error": np.where(is_label, place, 0).max(axis=1),
            "ranking_loss": wrong / np.maximum(num_labels * num_others, 1),
        }
        return {name: float(values.mean()) for name, values in means.items()}


def _ranking(
    scores: Float[np.ndarray, "N C"], targets: Float[np.ndarray, "N C"]
) -> tuple[Bool[np.ndarray, "N C"], Int64[np.ndarray, "N C"], Int64[np.ndarray, "N C"]]:
    """Each image's classes from the best to the worst, unknown ones last: whether each is a label, the last place of its
    ties, counted from 1, and how many labels are at that place or above.
    """
    ranked = np.where(targets == targets, -scores, np.inf)
    order = ranked.argsort(axis=1)
    ranked, is_label = np.take_along_axis(ranked, order, axis=1), np.take_along_axis(targets == 1, order, axis=1)
    is_last = np.pad(ranked[:, 1:] != ranked[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    places = np.where(is_last, np.arange(1, ranked.shape[1] + 1), ranked.shape[1])
    place = np.minimum.accumulate(places[:, ::-1], axis=1)[:, ::-1]
    return is_label, place, np.take_along_axis(is_label.cumsum(axis=1), place - 1, axis=1)
