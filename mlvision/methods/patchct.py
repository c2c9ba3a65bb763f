"""PatchCT: transport between an image's patches and the names of its labels, beside a classifier that compares the two."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mlvision.errors import InputError, check_fields
from mlvision.label_maps.geometry import resample
from mlvision.losses import AslConfig, LossConfig, Transport, conditional_transport
from mlvision.losses.transport import PLANS
from mlvision.methods.base import Method, MethodConfig
from mlvision.models import Classifier, JointHead
from mlvision.models.backbone import ClassAttention
from mlvision.models.heads.base import Joint
from mlvision.parts import Context
from mlvision.types import Batch, LabelMap, StepOutput


class LinearNavigator(nn.Module):
    """d = -cos(f(patch), f(label)) / tau, f one linear map that starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.project.weight)

    def forward(
        self, patches: Float[Tensor, "B N D"], labels: Float[Tensor, "*B C D"], tau: Float[Tensor, ""]
    ) -> Float[Tensor, "B N C"]:
        one, other = (F.normalize(self.project(x), dim=-1) for x in (patches, labels))
        return -(one @ other.mT) / tau


class MlpNavigator(nn.Module):
    """d = a network of the squared differences of patch and label; the first layer needs no table of differences.

    sum_d W[k, d] (e[d] - t[d])^2 = W e^2 + W t^2 - 2 sum_d W[k, d] e[d] t[d].

    Source: Zheng & Zhou, NeurIPS 2021, appendix (a navigator of two hidden layers).

    DEVIATION: one hidden layer, and the lengths of patch and label are taken off first.
    """

    def __init__(self, width: int, hidden: int = 64):
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.last = nn.Linear(hidden, 1, bias=False)  # what is added to all distances changes no plan

    def forward(
        self, patches: Float[Tensor, "B N D"], labels: Float[Tensor, "*B C D"], tau: Float[Tensor, ""]
    ) -> Float[Tensor, "B N C"]:
        one, other = F.normalize(patches, dim=-1), F.normalize(labels, dim=-1)
        weight = self.first.weight
        both = torch.einsum("bnd,kd,bcd->bnck", one, weight, other.expand(len(one), -1, -1))
        hidden = (
            self.first(one.square())[:, :, None] + F.linear(other.square(), weight).expand(len(one), -1, -1)[:, None]
        )
        return self.last(F.leaky_relu(hidden - 2 * both)).squeeze(-1) / tau


# How far apart patch and label are for the navigators; cosine has no network of its own.
NAVIGATORS = {"linear": LinearNavigator, "mlp": MlpNavigator}


@dataclass(frozen=True)
class PatchCTConfig(MethodConfig):
    """PatchCT: conditional transport between the patches of an image and the text of its labels."""

    name: Annotated[str, "which method: a key of METHODS"] = "patchct"
    alpha: Annotated[float, "weight of the transport; 0: the classifier alone (published configs: 0.1)"] = 0.0
    loss: LossConfig = field(default_factory=AslConfig)  # of the classifier
    plan: Annotated[str, "ct (conditional transport), or sinkhorn (one plan that keeps both marginals)"] = "ct"
    rho: Annotated[float, "share of the way from patches to labels, 0 to 1"] = 0.5
    levels: Annotated[int, "how many of the backbone's last maps are aligned, each by a projection of its own"] = 1
    navigator: Annotated[str, "what says how near patch and label are: cosine, linear or mlp"] = "cosine"
    patch_weights: Annotated[str, "uniform, or attention: of the class token in a ViT's last block"] = "uniform"
    sink: Annotated[float, "share of the labels' mass in a learnt prototype of the background, below 1; 0: none"] = 0.0

    def __post_init__(self) -> None:
        rules = (
            ("alpha", self.alpha >= 0, "0 or more"),
            ("plan", self.plan in PLANS, f"one of {', '.join(PLANS)}"),
            ("rho", 0 <= self.rho <= 1, "0 to 1"),
            ("levels", self.levels >= 1, "1 or more"),
            ("navigator", self.navigator in ("cosine", *NAVIGATORS), f"one of cosine, {', '.join(NAVIGATORS)}"),
            ("patch_weights", self.patch_weights in ("uniform", "attention"), "uniform or attention"),
            ("sink", 0 <= self.sink < 1, "at least 0, less than 1"),
        )
        check_fields(self, "method.", rules)

    def build(self, context: Context, classifier: Classifier) -> "PatchCT":
        return PatchCT(self, context, classifier)


class PatchCT(Method):
    """Classification by the names of the labels, and the cost of transport between patches and the labels that are there.

        loss = L(logits, y) + alpha * mean over levels of CT(patches, labels | y)

    The labels' own maps are the plan back from a label to the patches, which needs no ground truth. The transport says
    nothing about absent labels; unknown ones are in neither term.

    Source: Li et al., "PatchCT: Aligning Patch Set and Label Set with Conditional Transport for Multi-Label Image
    Classification", ICCV 2023. There is no published code.

    DEVIATION: L is a mean over images as the transport is, so that alpha does not depend on the batch. Levels are the maps
    that timm gives of any network; earlier ones are projected linearly, and all meet the same label embeddings.
    """

    def __init__(self, config: PatchCTConfig, context: Context, classifier: Classifier):
        super().__init__(classifier, config.loss.space(context.space))
        if not isinstance(classifier.head, JointHead):
            raise InputError("method.name: patchct compares patches with the names of labels; it needs head.name=text")
        self.config, self.text = config, classifier.head
        self.loss = config.loss.build(context)
        width = self.text.label_embeddings.shape[1]
        learns = config.alpha > 0
        if learns:
            self.text.log_tau.requires_grad_(True)
        earlier = classifier.backbone.level_widths(config.levels)[:-1] if learns else []
        self.earlier = nn.ModuleList(nn.Linear(level, width, bias=False) for level in earlier)
        self.navigator = NAVIGATORS[config.navigator](width) if learns and config.navigator in NAVIGATORS else None
        self.sink = nn.Parameter(torch.randn(width)) if learns and config.sink else None
        self.attention = ClassAttention(classifier.backbone) if learns and config.patch_weights == "attention" else None

    def forward(self, batch: Batch) -> StepOutput:
        levels, patch_weights = self._join(batch.images)
        with torch.autocast(batch.images.device.type, enabled=False):
            class_loss = self.loss(self.text.logits(levels[-1]), batch.targets)
            if not self.config.alpha:
                return StepOutput(class_loss)
            costs = [self._transport(level, batch.targets, patch_weights).cost.mean() for level in levels]
            cost = torch.stack(costs).mean()
            logs = {"class_loss": class_loss.detach(), "transport": cost.detach(), "tau": self.text.tau.detach()}
            return StepOutput(class_loss + self.config.alpha * cost, logs)

    def label_maps(self, images: Shaped[Tensor, "B in_chans H W"]) -> LabelMap:
        """Where each label goes: the plan back to the patches, of every label; sums to 1 over space.

        As the cost is, it is the mean over levels, on the finest grid of them.
        """
        levels, patch_weights = self._join(images)
        with torch.autocast(images.device.type, enabled=False):
            every = levels[-1].patches.new_ones(len(images), len(levels[-1].labels))
            plans = [
                self._transport(level, every, patch_weights).backward_plan.mT.unflatten(2, level.grid)
                for level in levels
            ]
            height, width = max(level.grid for level in levels)
            densities = [resample(plan * plan[0, 0].numel(), (height, width)) for plan in plans]
            return LabelMap(torch.stack(densities).mean(0) / (height * width), None, "mass")

    def _join(self, images: Shaped[Tensor, "B in_chans H W"]) -> tuple[list[Joint], Float[Tensor, "B N"] | None]:
        """Image, patches and labels in one space, with the patches of each level, the last one last; what a patch weighs."""
        backbone, normalised = self.classifier.backbone, self.normalise(images)
        with self.attention.watching() if self.attention else nullcontext():
            features, maps = backbone.with_levels(normalised, len(self.earlier) + 1)
        weights = self.attention.weights() if self.attention else None
        with torch.autocast(images.device.type, enabled=False):
            joint = self.text.join(features)
            dtype = joint.patches.dtype
            earlier = [
                joint._replace(patches=project(level.flatten(2).mT.to(dtype)), grid=(level.shape[2], level.shape[3]))
                for project, level in zip(self.earlier, maps, strict=True)
            ]
        return [*earlier, joint], weights

    def _transport(
        self,
        joint: Joint,
        label_weights: Float[Tensor, "B C"],
        patch_weights: Float[Tensor, "B N"] | None,
    ) -> Transport:
        config, tau = self.config, self.text.tau
        navigator = None if self.navigator is None else partial(self.navigator, tau=tau)
        return conditional_transport(
            joint.patches,
            joint.labels,
            label_weights,
            patch_weights,
            plan=config.plan,
            tau=tau,
            rho=config.rho,
            navigator=navigator,
            sink=self.sink,
            sink_mass=config.sink,
        )
