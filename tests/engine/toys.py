"""Four toy methods, each with one of the things that can change while a method trains."""

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from mlvision.losses import binary_cross_entropy
from mlvision.methods.base import Method, MethodConfig
from mlvision.types import EpochPlan, StepOutput


@dataclass(frozen=True)
class TeacherConfig(MethodConfig):
    name: Annotated[str, "which method: a key of METHODS"] = "toy_teacher"
    teacher: Annotated[str, "weights of the teacher when training begins"] = ""

    def build(self, context, classifier):
        method = Teacher(classifier, context.space)
        if context.training:
            teacher = copy.deepcopy(classifier)
            teacher.load_state_dict(torch.load(self.teacher, weights_only=True))
            method.add_helper("teacher", teacher)
        return method


class Teacher(Method):
    """A teacher that follows the student by a moving average; the student is to agree with it."""

    def forward(self, batch):
        with torch.no_grad():
            agreed = self.helpers["teacher"](self.normalise(batch.images)).logits.sigmoid()
        logits = self.predict(batch.images)
        gap = F.mse_loss(logits.sigmoid(), agreed)
        return StepOutput(binary_cross_entropy(logits, batch.targets) + 50 * gap, {"gap": gap.detach()})

    def after_step(self, rows):
        for ours, own in zip(
            self.helpers["teacher"].state_dict().values(), self.classifier.state_dict().values(), strict=True
        ):
            ours.lerp_(own, 0.2)


@dataclass(frozen=True)
class BankConfig(MethodConfig):
    name: Annotated[str, "which method: a key of METHODS"] = "toy_bank"

    def build(self, context, classifier):
        return Bank(context, classifier, context.statistics.num_images if context.statistics else 1)


class Bank(Method):
    """The features that each image had when it was last seen; those of an image are to stay near the mean of all."""

    def __init__(self, context, classifier, num_images):
        super().__init__(classifier, context.space)
        self.add_local_state("bank", torch.zeros(num_images, classifier.backbone.num_features))

    def forward(self, batch):
        features = self.features(batch.images)
        distance = (features.pooled - self.bank.mean(0)).square().mean()
        loss = binary_cross_entropy(self.classifier.head(features).logits, batch.targets) + distance
        return StepOutput(loss, rows={"index": batch.index, "features": features.pooled.detach()})

    def after_step(self, rows):
        self.bank[rows["index"]] = rows["features"]


@dataclass(frozen=True)
class CounterConfig(MethodConfig):
    name: Annotated[str, "which method: a key of METHODS"] = "toy_counter"
    broken: Annotated[bool, "count in forward, where each process sees its own part only"] = False

    def build(self, context, classifier):
        return Counter(context, classifier, self.broken)


class Counter(Method):
    """How often each class was seen; seldom ones weigh more."""

    def __init__(self, context, classifier, broken):
        super().__init__(classifier, context.space)
        self.broken = broken
        self.add_local_state("seen", torch.zeros(classifier.num_classes, dtype=torch.int64))

    def forward(self, batch):
        weights = 1 / (1 + self.seen.double()).sqrt().float()
        if self.broken:
            self.seen += batch.targets.sum(0).long()
        loss = binary_cross_entropy(self.predict(batch.images), batch.targets, class_weights=weights)
        return StepOutput(loss, {"rarest": weights.max()}, {"targets": batch.targets})

    def after_step(self, rows):
        if not self.broken:
            self.seen += rows["targets"].sum(0).long()


@dataclass(frozen=True)
class PlannerConfig(MethodConfig):
    name: Annotated[str, "which method: a key of METHODS"] = "toy_planner"

    def build(self, context, classifier):
        return Planner(classifier, context.space)


class Planner(Method):
    """An order of its own, targets that are half the predictions of the epoch's beginning, and a weight per row."""

    has_order = True

    def begin_epoch(self, epoch):
        predictions = epoch.predict("train")
        order = torch.randperm(len(epoch.train), generator=torch.Generator().manual_seed(epoch.seed % 2**63))
        targets = (torch.from_numpy(epoch.train.targets) + predictions.space.scores(predictions.logits)) / 2
        return EpochPlan(order, targets, {"weight": torch.linspace(0.5, 1.5, len(order)), "row": order.clone()})

    def forward(self, batch):
        assert torch.equal(batch.extra["row"], batch.index)
        losses = binary_cross_entropy(self.predict(batch.images), batch.targets, reduction="none").sum(1)
        return StepOutput((losses * batch.extra["weight"]).mean())


TOYS = {config.name: config for config in (TeacherConfig, BankConfig, CounterConfig, PlannerConfig)}
