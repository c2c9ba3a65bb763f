"""The plain classifier: one sigmoid a class with BCE or the asymmetric loss, one softmax over all, or a ranking."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mlvision.data.manifest import Manifest
from mlvision.errors import check_fields
from mlvision.losses import LOSSES, build_loss, smooth_labels
from mlvision.methods.base import Method, MethodConfig
from mlvision.models import Classifier, Preprocessing
from mlvision.types import Batch, StepOutput


@dataclass(frozen=True)
class BaselineConfig(MethodConfig):
    name: Annotated[str, "which method: a key of METHODS"] = "baseline"
    loss: Annotated[
        str,
        "bce, asl (asymmetric loss), focal, softmax (classes that exclude each other); decoupled_softmax or soft_top_k: "
        "only the order of an image's classes is learnt, no threshold means anything",
    ] = "bce"
    gamma_neg: Annotated[float, "asl: focusing exponent of absent labels"] = 4.0
    gamma_pos: Annotated[float, "asl: focusing exponent of present labels"] = 0.0
    clip: Annotated[float, "asl: probability margin below which an absent label costs nothing"] = 0.05
    gamma: Annotated[float, "focal: focusing exponent of all labels"] = 2.0
    k: Annotated[int, "soft_top_k: first ranks that the labels are to hold; 0: as many as the image has labels"] = 0
    alpha: Annotated[float, "soft_top_k: how sharply the k best are told from the rest"] = 2.0
    smoothing: Annotated[float, "label smoothing: this share of each label is spread evenly over all classes"] = 0.0
    class_weights: Annotated[str, "none, or inverse_sqrt: 1 / sqrt(positives in the training split), mean 1"] = "none"


class Baseline(Method):
    """Independent sigmoids, one softmax or a ranking of the classes, over one image-level feature.

    decoupled_softmax and soft_top_k leave a constant of each image's logits open. They rank the classes of an image: see
    `precision_at_k` and `ndcg_at_k`. Sigmoids of the logits are no probabilities, and average precision, which ranks images,
    compares logits that the loss does not.

    Source: for asl, Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021; for decoupled_softmax and
    soft_top_k, Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification", ICLR 2024.
    """

    class_weights: Tensor

    def __init__(self, config: BaselineConfig, classifier: Classifier, preprocessing: Preprocessing):
        super().__init__(classifier, preprocessing)
        rules = (
            ("loss", config.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
            ("class_weights", config.class_weights in ("none", "inverse_sqrt"), "none or inverse_sqrt"),
            ("smoothing", 0 <= config.smoothing < 1, "a share in [0, 1)"),
            ("k", 0 <= config.k < classifier.num_classes, f"0, or less than the {classifier.num_classes} classes"),
            ("alpha", config.alpha > 0, "more than 0"),
        )
        check_fields(config, "method.", rules)
        self.smoothing = config.smoothing
        self.activation = "softmax" if config.loss == "softmax" else "sigmoid"
        gammas = {"gamma_neg": config.gamma_neg, "gamma_pos": config.gamma_pos, "gamma": config.gamma}
        self.loss = build_loss(config.loss, **gammas, clip=config.clip, k=config.k or None, alpha=config.alpha)
        self.weigh_classes = config.class_weights == "inverse_sqrt"
        self.register_buffer("class_weights", torch.ones(classifier.num_classes))

    def prepare(self, manifest: Manifest) -> None:
        super().prepare(manifest)
        if self.weigh_classes:
            positives = torch.from_numpy(manifest.label_counts()[0]).clamp(min=1)
            weights = positives.to(self.class_weights).rsqrt()
            self.class_weights.copy_(weights / weights.mean())

    def forward(self, batch: Batch) -> StepOutput:
        targets = smooth_labels(batch.targets, self.smoothing)
        return StepOutput(self.loss(self.predict(batch.images), targets, class_weights=self.class_weights))
