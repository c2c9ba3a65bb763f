"""The plain classifier: one sigmoid a class with BCE or the asymmetric loss, a softmax over all or each group, or a
ranking."""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from mlvision.errors import check_fields
from mlvision.losses import BceConfig, LossConfig, smooth_labels
from mlvision.methods.base import Method, MethodConfig
from mlvision.models import Classifier
from mlvision.parts import Context, LabelStatistics
from mlvision.types import Batch, StepOutput


@dataclass(frozen=True)
class BaselineConfig(MethodConfig):
    """A classifier trained with a loss on the labels of whole images."""

    name: Annotated[str, "which method: a key of METHODS"] = "baseline"
    loss: LossConfig = field(default_factory=BceConfig)
    smoothing: Annotated[
        float, "label smoothing: this share of each label is spread evenly over all classes, or those of its group"
    ] = 0.0
    class_weights: Annotated[str, "none, or inverse_sqrt: 1 / sqrt(positives in the training split), mean 1"] = "none"

    def __post_init__(self) -> None:
        rules = (
            ("class_weights", self.class_weights in ("none", "inverse_sqrt"), "none or inverse_sqrt"),
            ("smoothing", 0 <= self.smoothing < 1, "a share in [0, 1)"),
        )
        check_fields(self, "method.", rules)

    def build(self, context: Context, classifier: Classifier) -> "Baseline":
        return Baseline(self, context, classifier)


class Baseline(Method):
    """Independent sigmoids, softmaxes or a ranking of the classes, over one image-level feature.

    decoupled_softmax and soft_top_k leave a constant of each image's logits open. They rank the classes of an image: see
    `precision_at_k` and `ndcg_at_k`. Sigmoids of the logits are no probabilities, and average precision, which ranks images,
    compares logits that the loss does not.

    Source: for asl, Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021; for decoupled_softmax and
    soft_top_k, Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification", ICLR 2024.
    """

    class_weights: Tensor

    def __init__(self, config: BaselineConfig, context: Context, classifier: Classifier):
        super().__init__(classifier, config.loss.space(context.space))
        self.smoothing = config.smoothing
        self.loss = config.loss.build(context)
        self.weigh_classes = config.class_weights == "inverse_sqrt"
        self.register_buffer("class_weights", torch.ones(classifier.num_classes))

    def prepare(self, statistics: LabelStatistics) -> None:
        super().prepare(statistics)
        if self.weigh_classes:
            positives = torch.tensor(statistics.positives).clamp(min=1)
            weights = positives.to(self.class_weights).rsqrt()
            self.class_weights.copy_(weights / weights.mean())

    def forward(self, batch: Batch) -> StepOutput:
        targets = smooth_labels(batch.targets, self.smoothing, self.space.groups)
        return StepOutput(self.loss(self.predict(batch.images), targets, class_weights=self.class_weights))
