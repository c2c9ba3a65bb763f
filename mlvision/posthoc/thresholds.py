"""A threshold of its own for each class, in place of 0.5 for all."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mlvision.errors import InputError, check_fields
from mlvision.metrics.inputs import check_scores, check_targets, to_array
from mlvision.parts import Context
from mlvision.posthoc.base import PosthocConfig, Step
from mlvision.types import Predictions

DEFAULT = 0.5


@dataclass(frozen=True)
class ThresholdsConfig(PosthocConfig):
    """For each class the score threshold of the highest F1.

    Source: Yang, "A Study of Thresholding Strategies for Text Categorization", SIGIR 2001 (SCut).
    """

    name: Annotated[str, "which step: a key of POSTHOC"] = "thresholds"
    # SCut overfits rare categories (Yang 2001, section 3): one positive fits any threshold right below its score.
    min_positives: Annotated[int, "a class that is known to be present in fewer images keeps 0.5"] = 5

    def __post_init__(self) -> None:
        check_fields(self, "posthoc.thresholds.", (("min_positives", self.min_positives >= 1, "1 or more"),))

    def fit(self, predictions: Predictions, context: Context) -> Step:
        """Classes of an exclusive group keep 0.5 as well: of them the best is decided, whatever the threshold.

        Raises:
            InputError: no class that can be fitted, or scores that are not finite.
        """
        check_scores(to_array(predictions.logits))
        check_targets(to_array(predictions.targets), tuple(predictions.logits.shape))
        space = predictions.space
        alone = torch.tensor([size == 1 for size in space.exclusive for _ in range(size)])
        fitted = alone & ((predictions.targets == 1).sum(0) >= self.min_positives)
        if not fitted.any():
            raise InputError(
                f"posthoc.thresholds: expected a class that is present in {self.min_positives} of the "
                f"{len(predictions.logits)} validation images or more (min_positives) and excludes no other, got none among "
                f"{len(fitted)}"
            )
        best = best_thresholds(space.scores(predictions.logits), predictions.targets)
        return Thresholds(best.where(fitted, DEFAULT), int(fitted.sum()))

    def load(self, state: dict[str, Any], context: Context) -> Step:
        values, num_classes = state.get("thresholds"), len(context.space.classes)
        is_list = isinstance(values, list) and len(values) == num_classes and all(type(t) is float for t in values)
        thresholds = torch.tensor(values if is_list else [], dtype=torch.float32)
        fits = is_list and bool(((thresholds > 0) & (thresholds < 1)).all())
        if not fits or type(state.get("num_fitted")) is not int:
            raise InputError(
                f"thresholds: expected one between 0 and 1 for each of {num_classes} classes, as they were written; the "
                "file is damaged"
            )
        return Thresholds(thresholds, state["num_fitted"])


class Thresholds(Step):
    """Puts its thresholds in the place of those that predictions have.

    Attributes:
        thresholds: `[C]` float32 in (0, 1), of scores.
        num_fitted: of them; the others are 0.5.
    """

    def __init__(self, thresholds: Float[Tensor, " C"], num_fitted: int):
        self.thresholds, self.num_fitted = thresholds, num_fitted

    @property
    def phrase(self) -> str:
        num_classes = len(self.thresholds)
        kept = f" ({num_classes - self.num_fitted} keep 0.5)" if self.num_fitted < num_classes else ""
        return f"thresholds of the highest F1 for {self.num_fitted} of {num_classes} classes{kept}"

    def state(self) -> dict[str, Any]:
        return {"thresholds": self.thresholds.tolist(), "num_fitted": self.num_fitted}

    def apply(self, predictions: Predictions) -> Predictions:
        return replace(predictions, thresholds=self.thresholds)


def best_thresholds(scores: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]) -> Float[Tensor, " C"]:
    """Of each class the threshold of the highest F1, which all cuts between two neighbouring scores are compared by.

    A threshold lies in the middle of two distinct scores, or of the lowest one and 0, and strictly between 0 and 1, where
    its log-odds are finite. Of equal F1 the threshold nearest 0.5 counts, of two equally near the higher one. A class that
    no threshold finds gets 0.5.

    Args:
        scores: float32 in [0, 1].
        targets: 1 present, 0 absent, NaN unknown: left out.
    """
    by_class = scores.where(~targets.isnan(), -1).T.contiguous()  # half the time of sorting along columns
    ordered, order = by_class.sort(dim=1, descending=True)  # unknown ones last
    hits = (targets == 1).T.gather(1, order).cumsum(1)
    below = torch.nn.functional.pad(ordered[:, 1:], (0, 1)).clamp(min=0)
    middle = ((ordered.double() + below) / 2).float()
    cuts = middle.where(middle > below, ordered)  # between neighbours of float32 the middle may be rounded down
    num_predicted = torch.arange(1, len(scores) + 1)
    f1 = 2 * hits.double() / (num_predicted + hits[:, -1:])
    f1 = f1.where((ordered > below) & (cuts > 0) & (cuts < 1), 0)
    best = f1.amax(1, keepdim=True)
    far = (cuts - DEFAULT).abs().where(f1 == best, torch.inf)
    chosen = cuts.gather(1, far.argmin(1, keepdim=True))
    return chosen.where(best > 0, DEFAULT).squeeze(1)
