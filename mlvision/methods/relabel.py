"""ReLabel: a student learns what a teacher's label map says of the part of the image that it sees."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from mlvision.errors import InputError, check_fields
from mlvision.label_maps import Pooling, pool_probabilities
from mlvision.label_maps.geometry import whole_images
from mlvision.label_maps.mix import Mix, MixConfig, draw_mix
from mlvision.label_maps.oracle import oracle_targets, split_oracle
from mlvision.losses import BceConfig, LossConfig, softmax_cross_entropy
from mlvision.methods.base import Method, MethodConfig
from mlvision.models import Classifier
from mlvision.parts import Context
from mlvision.space import has_groups, map_groups
from mlvision.types import Batch, CropBox, LabelMap, StepOutput

# With each one's own operator; oracle pools nothing.
TARGETS = {"softmax": "mean_logit", "multilabel": "max", "gated": "max", "oracle": "max"}
FUSIONS = ("none", "convex", "gate")
REGIONS = ("crop", "image", "swapped")
FILLS = ("stored", "zero")
_TINY = 1e-12  # no sum of probabilities that are there is below it


@dataclass(frozen=True)
class RelabelConfig(MethodConfig):
    """ReLabel: targets pooled from a teacher's label map by the crop that the student sees."""

    name: Annotated[str, "which method: a key of METHODS"] = "relabel"
    target: Annotated[
        str,
        "softmax: one distribution over the classes, or each group of them (the paper); multilabel: one probability a "
        "class; gated: the annotated labels, where the view shows them; oracle: maps of annotated areas",
    ] = "multilabel"
    operator: Annotated[
        str,
        "how the cells of a view become one value: mean_logit, mean_probability, max, log_sum_exp or top_q; empty: "
        "mean_logit for softmax, max for multilabel and gated",
    ] = ""
    sharpness: Annotated[float, "log_sum_exp: its r; small is the mean, large the maximum"] = 10.0
    top_share: Annotated[float, "top_q: share of the cells that count"] = 0.25
    temperature: Annotated[float, "divides the teacher's logits"] = 1.0
    calibration: Annotated[
        str,
        "what makes probabilities of maps that hold mass or attributions: relative_to_peak; empty: such maps are refused",
    ] = ""
    loss: LossConfig = field(default_factory=BceConfig)  # target=softmax has its cross-entropy
    fusion: Annotated[
        str, "with the annotated labels. none: maps alone; convex: a weighted mean; gate: maps times annotation"
    ] = "none"
    annotation_weight: Annotated[float, "convex: weight of the annotated labels"] = 0.5
    gate_low: Annotated[float, "gated: a label is absent where the view shows at most this share of its peak"] = 0.1
    gate_high: Annotated[float, "gated: it is present from this share on; between the two it is unknown"] = 0.5
    visible: Annotated[float, "oracle: a label is present where the view shows this share of its area"] = 0.25
    region: Annotated[
        str,
        "what is pooled. crop: what the view shows; image: all (no localisation); swapped: the crop with x and y exchanged, "
        "an error of published loaders, to measure its cost",
    ] = "crop"
    mix: MixConfig = field(default_factory=MixConfig)
    fill: Annotated[
        str, "what unstored classes are worth. stored: what the store says; zero: a logit of 0, as published"
    ] = "stored"

    def __post_init__(self) -> None:
        share = "a number from 0 to 1"
        rules = (
            ("target", self.target in TARGETS, f"one of {', '.join(TARGETS)}"),
            ("fusion", self.fusion in FUSIONS, f"one of {', '.join(FUSIONS)}"),
            ("region", self.region in REGIONS, f"one of {', '.join(REGIONS)}"),
            ("fill", self.fill in FILLS, f"one of {', '.join(FILLS)}"),
            ("annotation_weight", 0 <= self.annotation_weight <= 1, share),
            ("visible", 0 < self.visible <= 1, "a number above 0, at most 1"),
            ("gate_low", 0 <= self.gate_low < self.gate_high, "0 or more and below gate_high"),
        )
        check_fields(self, "method.", rules)
        if self.fusion != "none" and self.target in ("gated", "oracle"):
            raise InputError(f"method.fusion: target={self.target} takes the annotation in already; expected none")
        try:
            self.pooling()
        except InputError as error:
            raise InputError(f"method.{error}") from None

    def pooling(self) -> Pooling:
        """How the cells of a view become its targets."""
        operator = self.operator or TARGETS[self.target]
        return Pooling(operator, self.sharpness, self.top_share, self.temperature, self.calibration)

    def build(self, context: Context, classifier: Classifier) -> "Relabel":
        return Relabel(self, context, classifier)


class Relabel(Method):
    """Training on pooled label maps; prediction is the plain classifier's.

    Source: Yun et al., "Re-labeling ImageNet: from Single to Multi-Labels, from Global to Localized Labels", CVPR 2021.
    With target=softmax this is the paper's: the mean logit of the crop, softmax, cross-entropy.

    DEVIATION: multilabel turns each cell into probabilities first and pools these, by default their maximum: an object that
    fills few of the crop's cells is there all the same, while the mean logit lets only the largest object win. Fill and
    coordinates: see `mlvision.label_maps.pool`.
    """

    needs_label_map = True

    def __init__(self, config: RelabelConfig, context: Context, classifier: Classifier):
        softmax = config.target == "softmax"
        super().__init__(classifier, context.space.with_softmax() if softmax else config.loss.space(context.space))
        if has_groups(self.space.groups) and not softmax:
            raise InputError(
                f"method.loss: target={config.target} gives one probability per class; expected a loss of sigmoids, got "
                f"{config.loss.name}"
            )
        self.config = config
        self.pooling = config.pooling()
        self.loss = partial(softmax_cross_entropy, groups=self.space.groups) if softmax else config.loss.build(context)

    def forward(self, batch: Batch) -> StepOutput:
        config, size = self.config.mix, (batch.images.shape[2], batch.images.shape[3])
        mix = draw_mix(config, size) if config.until_epoch == 0 or self.epoch < config.until_epoch else None
        targets = self.targets(batch, mix)
        known = targets.isfinite()
        logs = {"target_sum": targets.where(known, 0).sum(1).mean(), "unknown_share": 1 - known.float().mean()}
        images = mix.images(batch.images) if mix else batch.images
        return StepOutput(self.loss(self.predict(images), targets), logs)

    def check_label_map(self, label_map: LabelMap) -> None:
        unknown = torch.full((len(label_map.values), self.classifier.num_classes), torch.nan)
        self._targets(label_map, unknown, CropBox(whole_images(unknown)), None)

    @torch.no_grad()
    def targets(self, batch: Batch, mix: Mix | None = None) -> Float[Tensor, "B C"]:
        """What the student is to say of each view; NaN where that is unknown."""
        assert batch.label_map is not None
        label_map = batch.label_map

        def pool(view: CropBox, hole: Tensor | None) -> Tensor:
            return self._targets(label_map, batch.targets, view, hole)

        if mix is None:
            return pool(batch.view, None)
        return mix.targets(pool, batch.view, (batch.images.shape[2], batch.images.shape[3]), self.space.groups)

    def _targets(
        self, label_map: LabelMap, annotated: Float[Tensor, "B C"], view: CropBox, hole: Float[Tensor, "B 4"] | None
    ) -> Float[Tensor, "B C"]:
        """Targets of views of which `hole` is covered."""
        config = self.config
        view, hole = _region(config.region, view, hole)
        if config.target == "oracle":
            cover, crowd = split_oracle(label_map, self.classifier.num_classes)
            shown = oracle_targets(cover, crowd, view, self.classifier.num_classes, tau=config.visible, hole=hole)
            return shown.where(annotated.isfinite(), torch.nan)
        pooled = self._pool(label_map, view, hole)
        if config.target == "gated":
            return self._gate(label_map, annotated, pooled)
        if config.fusion == "none":
            return pooled
        if config.fusion == "gate":
            gated = pooled * annotated
            return self._shared(gated, lambda group, dim: group.nansum(dim, keepdim=True).clamp(min=_TINY))
        annotated = self._shared(annotated, lambda group, dim: group.nansum(dim, keepdim=True).clamp(min=1))
        mixed = (1 - config.annotation_weight) * pooled + config.annotation_weight * annotated
        return mixed.where(annotated.isfinite(), pooled)

    def _pool(
        self, label_map: LabelMap, view: CropBox, hole: Float[Tensor, "B 4"] | None = None
    ) -> Float[Tensor, "B C"]:
        """Probabilities of each view; a distribution over the classes of each group where a softmax learns them."""
        config = self.config
        if config.fill == "zero":
            label_map = zero_fill(label_map, exactly=self.pooling.is_mean)
        pooled = pool_probabilities(label_map, view, self.classifier.num_classes, self.pooling, hole=hole)
        return self._shared(pooled, lambda group, dim: group.sum(dim, keepdim=True))

    def _shared(self, values: Float[Tensor, "B C"], total: Callable[[Tensor, int], Tensor]) -> Float[Tensor, "B C"]:
        """Values of classes that share a softmax as shares of their group's total; the others as they are."""
        return map_groups(lambda group, dim: group / total(group, dim), values, self.space.groups)

    def _gate(
        self, label_map: LabelMap, annotated: Float[Tensor, "B C"], pooled: Float[Tensor, "B C"]
    ) -> Float[Tensor, "B C"]:
        """Annotated labels that the view shows, by the share of the label's value in the whole image."""
        whole = self._pool(label_map, CropBox(whole_images(annotated)))
        shown = pooled / whole.clamp(min=torch.finfo(pooled.dtype).tiny)
        gate = torch.where(shown >= self.config.gate_high, 1.0, torch.nan)
        gate = torch.where(shown <= self.config.gate_low, 0.0, gate)
        gate = gate.where(whole > 0, torch.nan)  # a map that shows the label nowhere cannot tell where it is
        return torch.where(annotated == 1, gate, annotated)


def _region(
    region: str, view: CropBox, hole: Float[Tensor, "B 4"] | None
) -> tuple[CropBox, Float[Tensor, "B 4"] | None]:
    """The part of the image whose cells are pooled, and what is covered of it."""
    if region == "image":
        return CropBox(whole_images(view.boxes)), None
    if region == "swapped":
        return CropBox(view.boxes[:, [1, 0, 3, 2]]), None if hole is None else hole[:, [1, 0, 3, 2]]
    return view, hole


def zero_fill(label_map: LabelMap, exactly: bool) -> LabelMap:
    """The published fill: a logit of 0 for every class that is not stored; the ablation of it.

    Not `exactly`: the least stored logit of a cell where that is less. What looks for the highest cell needs a fill that
    ranks no class above a stored one (see LabelMap).
    """
    if label_map.kind != "logit":
        raise InputError(f"method.fill: zero is a logit, the label maps hold values of kind {label_map.kind}")
    if exactly or label_map.ids is None:
        return replace(label_map, fill=0.0)
    return replace(label_map, fill=label_map.values.float().amin(1).clamp(max=0))
