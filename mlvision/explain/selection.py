"""Which labels of which images are explained."""

import logging
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mlvision.errors import InputError
from mlvision.space import LabelSpace

SELECTIONS = ("all", "predicted", "ground_truth", "errors", "relevant")
OUTCOMES = ("TP", "FP", "FN", "TN")
# Before a class that has the name of a rule, on a command line.
CLASS_PREFIX = "class:"

_log = logging.getLogger(__name__)

Label = int | str
Contrast = tuple[Label, Label]


class EmptySelectionError(InputError):
    """No image has a label of those that were asked for."""


@dataclass
class Selection:
    """The scores that are explained: of each image, L logits or differences of two logits.

    Attributes:
        labels: `[B, L]` class indices; -1 where an image has fewer than the others.
        against: `[B, L]`: the class whose logit is taken off; -1 where none is. None: none anywhere.
    """

    labels: Int64[Tensor, "B L"]
    against: Int64[Tensor, "B L"] | None = None

    @property
    def valid(self) -> Bool[Tensor, "B L"]:
        return self.labels >= 0

    @property
    def rivals(self) -> Int64[Tensor, "B L"]:
        """`against`, -1 everywhere where there are no contrasts."""
        return torch.full_like(self.labels, -1) if self.against is None else self.against

    def to(self, device: torch.device | str) -> "Selection":
        return Selection(self.labels.to(device), None if self.against is None else self.against.to(device))

    def rows(self, chosen: slice | Tensor) -> "Selection":
        """The selection of some images."""
        return Selection(self.labels[chosen], None if self.against is None else self.against[chosen])

    def each(self, image: Int64[Tensor, " P"], place: Int64[Tensor, " P"]) -> "Selection":
        """The one score at some places of some images, as P rows of one."""
        against = None if self.against is None else self.against[image, place][:, None]
        return Selection(self.labels[image, place][:, None], against)

    def scores(self, logits: Float[Tensor, "B ... C"]) -> Float[Tensor, "B ... L"]:
        """The explained scores of logits; 0 in empty places."""
        taken = _gather(logits, self.labels)
        return taken if self.against is None else taken - _gather(logits, self.against)

    def directions(self, num_classes: int) -> Float[Tensor, "B L C"]:
        """What each explained score is of the logits: 1 for its class, -1 for the one it is set against."""
        return self.scores(torch.eye(num_classes, device=self.labels.device).expand(len(self.labels), -1, -1)).mT


Choice = Label | Contrast
Labels = str | int | np.integer | Tensor | np.ndarray | Selection | Sequence[Choice] | Sequence[Sequence[Choice]]


def _gather(logits: Float[Tensor, "B ... C"], labels: Int64[Tensor, "B L"]) -> Float[Tensor, "B ... L"]:
    index = labels.clamp(min=0).view(len(labels), *[1] * (logits.ndim - 2), -1)
    taken = logits.gather(-1, index.expand(*logits.shape[:-1], -1))
    return taken * (labels >= 0).view(index.shape)


def select(
    labels: Labels,
    logits: Float[Tensor, "B C"],
    *,
    targets: Float[Tensor, "B C"] | None = None,
    threshold: float | Float[Tensor, " C"] = 0.5,
    classes: Sequence[str] | None = None,
    space: LabelSpace | None = None,
) -> Selection:
    """The labels that were asked for, of each image.

    Args:
        labels: `all`; `predicted` (score at least the threshold, or the best of its exclusive group); `ground_truth` (target
            1); `errors` (false positives and missed labels); `relevant` (present or predicted, and not unknown); `top<k>`
            (the k highest logits); one class index, or one list of class indices or names, for every image, in which a pair
            `(a, b)` explains logit a - logit b; a list of such lists, one per image; a tensor or array `[B, L]`, -1 for
            none; or a Selection. A name in a list is always a class, also one that is called like a rule.
        targets: 1 present, 0 absent, NaN unknown: `ground_truth`, `errors` and `relevant` need them.
        threshold: of the scores in [0, 1], one or one a class.
        classes: the names, where labels are given by name.
        space: what makes scores of the logits and how these decide; None: a sigmoid of each class.

    Raises:
        InputError: a label that does not exist, lists that are not one an image, or a selection that needs targets.
        EmptySelectionError: no image has such a label.
    """
    num_images, num_classes = logits.shape
    if isinstance(labels, np.ndarray):
        labels = torch.from_numpy(labels) if labels.ndim == 2 and labels.dtype.kind in "iu" else labels.tolist()
    if isinstance(labels, str):
        if classes is not None and labels in classes and not _is_rule(labels):
            raise InputError(f"labels: '{labels}' is a class; a list explains it: ['{labels}']")
        chosen = _by_rule(labels, logits, targets, threshold, LabelSpace.of(space, num_classes))
        what = f"labels={labels}"
    elif isinstance(labels, Selection):
        if len(labels.labels) != num_images:
            raise InputError(f"labels: a selection of {len(labels.labels)} images for {num_images}")
        chosen, what = labels, "labels"
        for column in (labels.labels, labels.against):
            if column is not None and column.numel() and int(column.max()) >= num_classes:
                raise InputError(f"labels: {int(column.max())} is beyond the {num_classes} classes")
    elif isinstance(labels, Tensor):
        if (
            labels.ndim != 2
            or len(labels) != num_images
            or labels.dtype.is_floating_point
            or labels.dtype == torch.bool
        ):
            raise InputError(
                f"labels: expected class indices [{num_images}, L], got {tuple(labels.shape)} of {labels.dtype}"
            )
        if labels.numel() and int(labels.max()) >= num_classes:
            raise InputError(f"labels: {int(labels.max())} is beyond the {num_classes} classes")
        chosen, what = Selection(labels.long().cpu()), "labels"
    elif not isinstance(labels, Sequence):
        index = class_index(labels, num_classes, classes)
        chosen, what = Selection(torch.full((num_images, 1), index)), "labels"
    else:
        per_image = [isinstance(entry, Sequence) and not isinstance(entry, str | tuple) for entry in labels]
        if any(per_image) and (not all(per_image) or len(labels) != num_images):
            raise InputError(f"labels: expected one list for all, or one for each of {num_images} images, got {labels}")
        lists = list(labels) if any(per_image) else [labels] * num_images
        chosen = _by_list(lists, num_classes, classes)  # pyright: ignore[reportArgumentType]
        what = "labels"
    if not chosen.labels.numel() or not bool(chosen.valid.any()):
        raise EmptySelectionError(
            f"{what}: none of the {num_images} images has such a label; there is nothing to explain"
        )
    return chosen.to(logits.device)


def _is_rule(word: str) -> bool:
    return word in SELECTIONS or re.fullmatch(r"top\d+", word) is not None


def outcomes(predicted: Bool[Tensor, "B C"], targets: Float[Tensor, "B C"]) -> Int64[Tensor, "B C"]:
    """The place in OUTCOMES of each decision; -1 where the target is unknown."""
    true = targets == 1
    outcome = torch.where(predicted, torch.where(true, 0, 1), torch.where(true, 2, 3))
    return outcome.where(targets.isfinite(), -1)


def _by_rule(
    rule: str,
    logits: Float[Tensor, "B C"],
    targets: Float[Tensor, "B C"] | None,
    threshold: float | Float[Tensor, " C"],
    space: LabelSpace,
) -> Selection:
    num_images, num_classes = logits.shape
    if rule == "all":
        return Selection(torch.arange(num_classes).expand(num_images, -1))
    if top := re.fullmatch(r"top(\d+)", rule):
        k = int(top[1])
        if not 1 <= k <= num_classes:
            raise InputError(f"labels: expected top1 to top{num_classes}, got {rule}")
        return Selection(logits.topk(k, dim=1).indices.cpu())
    if rule not in SELECTIONS:
        raise InputError(
            f"labels: expected {', '.join(SELECTIONS)}, top<k> or a list of labels, got '{rule}'"
            + _nearest(rule, SELECTIONS)
        )
    predicted = space.decide(space.scores(logits), threshold)
    if rule == "predicted":
        return from_mask(predicted)
    if targets is None:
        raise InputError(f"labels: {rule} needs the images' labels, and none were given (targets=)")
    targets = targets.to(logits.device)
    if targets.shape != logits.shape:
        raise InputError(f"targets: expected {tuple(logits.shape)}, got {tuple(targets.shape)}")
    wrong = targets != predicted.to(targets)
    masks = {"ground_truth": targets == 1, "errors": wrong, "relevant": wrong | (targets == 1)}
    return from_mask(masks[rule] & targets.isfinite())


def from_mask(mask: Bool[Tensor, "B C"]) -> Selection:
    """The labels where the mask is true, in the order of the classes."""
    mask = mask.cpu()
    most = int(mask.sum(1).max()) if len(mask) else 0
    order = (~mask).long().argsort(dim=1, stable=True)[:, :most]
    return Selection(order.where(mask.gather(1, order), -1))


def _by_list(lists: Sequence[Sequence[Any]], num_classes: int, classes: Sequence[str] | None) -> Selection:
    pairs = [
        [(entry if isinstance(entry, tuple) else (entry, None)) for entry in entries]  # one logit, or a difference
        for entries in lists
    ]
    most = max(map(len, pairs), default=0)
    labels = torch.full((2, len(pairs), most), -1)
    for row, entries in enumerate(pairs):
        for column, pair in enumerate(entries):
            if len(pair) != 2:
                raise InputError(f"labels: a contrast is a pair of labels, got {pair}")
            for side, label in enumerate(pair):
                if label is not None:
                    labels[side, row, column] = class_index(label, num_classes, classes)
    chosen = Selection(labels[0], labels[1])
    return replace(chosen, against=None) if bool((labels[1] < 0).all()) else chosen


def parse_labels(words: Sequence[str], classes: Sequence[str], known: bool = True) -> str | list[Label | Contrast]:
    """A command line's words as `select` takes them: one rule's name, or class names and contrasts `a - b`.

    A single word that is both a rule and a class is the rule; `class:<name>` is the class.

    Args:
        known: whether the images' labels are known, which some rules need.

    Raises:
        InputError: a rule next to other words, one that needs labels where none are known, or an unknown class.
    """
    rules = [word for word in words if _is_rule(word) and (len(words) == 1 or word not in classes)]
    if rules and len(words) > 1:
        raise InputError(f"labels: '{rules[0]}' stands alone, or classes are listed; got {', '.join(words)}")
    if rules:
        if rules[0] in classes:
            _log.warning(
                "labels: '%s' is taken as the rule; the class of that name is %s%s", rules[0], CLASS_PREFIX, rules[0]
            )
        if rules[0] in ("ground_truth", "errors", "relevant") and not known:
            raise InputError(f"labels: {rules[0]} needs the images' labels, and a folder has none; leave images= empty")
        return rules[0]
    labels: list[Label | Contrast] = []
    for word in words:
        if word not in classes and word.startswith(CLASS_PREFIX):
            word = word.removeprefix(CLASS_PREFIX)
        a, minus, b = word.partition(" - ")
        contrast = bool(minus) and word not in classes
        if word not in classes and (rule := get_close_matches(word, SELECTIONS, n=1, cutoff=0.8)):
            raise InputError(f"labels: no class '{word}'; did you mean the rule {rule[0]}?")
        labels.append((a, b) if contrast else word)
        for name in (a, b) if contrast else (word,):
            class_index(name, len(classes), classes)
    return labels


def class_index(label: Any, num_classes: int, classes: Sequence[str] | None) -> int:
    """The index of a label given by name or index.

    Raises:
        InputError: no such label; the nearest names are given.
    """
    if isinstance(label, str):
        if classes is None:
            raise InputError(f"labels: '{label}' is a name, and the classes' names were not given (classes=)")
        if label not in classes:
            raise InputError(f"labels: no class '{label}'{_nearest(label, classes)}")
        return list(classes).index(label)
    try:
        index = num_classes if isinstance(label, bool) else operator.index(label)
    except TypeError:  # a part of a number, or no number
        index = num_classes
    if not 0 <= index < num_classes:
        raise InputError(f"labels: expected 0 to {num_classes - 1}, got {label!r}")
    return index


def _nearest(word: str, words: Sequence[str]) -> str:
    near = get_close_matches(word, words, n=3, cutoff=0.4)
    return f"; nearest: {', '.join(near)}" if near else f"; expected one of {', '.join(words)}"
