"""Which classes there are, what makes scores of their logits, and which of them are decided to be present.

Groups are given by their sizes and hold consecutive classes: (5, 5, 1) are two groups of five and one class for itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mlvision.errors import InputError

ArrayT = TypeVar("ArrayT", np.ndarray, Tensor)
Groups = tuple[int, ...]


@dataclass(frozen=True)
class LabelSpace:
    """The classes of a data set, and how a model's logits answer for them.

    A loss decides which classes share a softmax, a data set which of them exclude each other. The two differ where a softmax
    is trained on images that show several classes of it, or sigmoids on classes that exclude each other.

    Attributes:
        classes: class names; column c of every logit, score and target is `classes[c]`.
        groups: groups whose classes share a softmax; a class for itself has a sigmoid. (): each class for itself.
        exclusive: groups of which each image shows exactly one class; a class for itself is present or absent. (): each
            class for itself.

    Raises:
        InputError: sizes of groups that do not add up to the number of classes.
    """

    classes: tuple[str, ...]
    groups: Groups = ()
    exclusive: Groups = ()

    def __post_init__(self) -> None:
        for name in ("groups", "exclusive"):
            sizes = getattr(self, name) or (1,) * len(self.classes)
            if any(size < 1 for size in sizes) or sum(sizes) != len(self.classes):
                raise InputError(
                    f"groups of classes: expected sizes of 1 or more that add up to the {len(self.classes)} classes, got "
                    f"{list(sizes)}"
                )
            object.__setattr__(self, name, sizes)

    @classmethod
    def of(cls, space: "LabelSpace | None", num_classes: int) -> "LabelSpace":
        """The space of logits of so many classes; each class for itself, called by its number, if none is given.

        Raises:
            InputError: a space of another number of classes.
        """
        space = cls(tuple(map(str, range(num_classes)))) if space is None else space
        if len(space.classes) != num_classes:
            raise InputError(f"space: has {len(space.classes)} classes, the logits have {num_classes}")
        return space

    def with_sigmoids(self) -> "LabelSpace":
        """The same classes as a loss of sigmoids trains them."""
        return replace(self, groups=())

    def with_softmax(self) -> "LabelSpace":
        """The same classes as a loss of softmaxes trains them: one in each exclusive group; if there is none, one of all."""
        of_all = (len(self.classes),) if self.classes else ()
        return replace(self, groups=self.exclusive if has_groups(self.exclusive) else of_all)

    def extended(self, names: Sequence[str]) -> "LabelSpace":
        """With further classes, which come last. They join the softmax of all, if there is one; else each is for itself."""
        one_softmax = self.groups == (len(self.classes),) and has_groups(self.groups)
        classes, more = (*self.classes, *names), (1,) * len(names)
        groups = (len(classes),) if one_softmax else (*self.groups, *more)
        return LabelSpace(classes, groups, (*self.exclusive, *more))

    def scores(self, logits: Float[ArrayT, "... C"]) -> Float[ArrayT, "... C"]:
        """What is taken for probabilities, in [0, 1].

        >>> LabelSpace(("a", "b", "c"), groups=(2, 1)).scores(torch.zeros(1, 3))
        tensor([[0.5000, 0.5000, 0.5000]])
        """
        return _like(logits, to_scores(_tensor(logits), self.groups, dim=-1))

    def log_odds(self, logits: Float[ArrayT, "... C"]) -> Float[ArrayT, "... C"]:
        """log(p / (1 - p)) of each score p: what a threshold is compared with, without rounding p near 1.

        That of a sigmoid is the logit. In a softmax it is the logit less the logarithm of what the others of its group add
        up to. float64 if there is any softmax, else the logits as they are.
        """
        if not has_groups(self.groups):
            return logits
        return _like(logits, map_groups(_log_odds, _tensor(logits).double(), self.groups, dim=-1))

    def decide(
        self, scores: Float[ArrayT, "... C"], threshold: float | Shaped[np.ndarray | Tensor, "..."] = 0.5
    ) -> Bool[ArrayT, "... C"]:
        """Which classes are present: of an exclusive group the one of the highest score, whatever the threshold; of the
        others those whose score reaches it.

        >>> scores = torch.tensor([[0.2, 0.3, 0.4]])
        >>> LabelSpace(("a", "b", "c"), exclusive=(2, 1)).decide(scores, 0.5)
        tensor([[False,  True, False]])

        Args:
            scores: or whatever else orders the classes, such as log-odds, in the unit of the threshold. Of equal ones in an
                exclusive group the first counts.
            threshold: one, or one per class; acts in the dtype of the scores, see `reaches`.
        """
        reached = reaches(scores, threshold)
        if not has_groups(self.exclusive):
            return reached
        pairs = zip(*(split_groups(_tensor(table), self.exclusive, -1) for table in (scores, reached)), strict=True)
        return _like(scores, join_groups([own if own.shape[-1] == 1 else _is_best(s) for s, own in pairs], -1))


def reaches(
    scores: Shaped[ArrayT, "... C"], threshold: float | Shaped[np.ndarray | Tensor, "..."]
) -> Bool[ArrayT, "... C"]:
    """Whether each score is at least its threshold, one or one per class.

    The threshold acts in the dtype of the scores: a score that was computed as 0.7 and rounded to half precision, or to
    float32, is below the double 0.7, and still reaches it.
    """
    if isinstance(scores, Tensor):
        dtype = scores.dtype if scores.is_floating_point() else None
        return scores >= torch.as_tensor(threshold, dtype=dtype, device=scores.device)
    dtype = scores.dtype if np.issubdtype(scores.dtype, np.floating) else None
    return scores >= np.asarray(threshold, dtype=dtype)


def to_scores(logits: Float[Tensor, "..."], groups: Groups, dim: int = 1) -> Float[Tensor, "..."]:
    """Logits to probabilities along the classes of `dim`: a softmax over each group, a sigmoid of a class for itself."""
    return map_groups(torch.softmax, logits, groups, torch.sigmoid, dim)


def has_groups(groups: Groups) -> bool:
    """Whether there is a group of several classes."""
    return max(groups, default=1) > 1


def split_groups(table: Shaped[Tensor, "..."], groups: Groups, dim: int = 1) -> list[Shaped[Tensor, "..."]]:
    """Views of `table`, one of each run of equally large groups; there `dim` is two dimensions, groups and their classes.

    So a board of 64 groups takes one step, as one group or classes for themselves do. No `groups`: each class for itself.
    """
    dim %= table.ndim
    runs = _runs(groups or (1,) * table.shape[dim])
    parts = table.split([number * size for number, size in runs], dim)
    return [part.unflatten(dim, run) for part, run in zip(parts, runs, strict=True)]


def join_groups(parts: Sequence[Shaped[Tensor, "..."]], dim: int = 1) -> Shaped[Tensor, "..."]:
    """One table of what `split_groups` gave with that `dim`."""
    dim %= parts[0].ndim - 1
    columns = [part.flatten(dim, dim + 1) for part in parts]
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim)


def map_groups(
    several: Callable[[Tensor, int], Tensor],
    table: Shaped[Tensor, "..."],
    groups: Groups,
    single: Callable[[Tensor], Tensor] = lambda values: values,
    dim: int = 1,
) -> Shaped[Tensor, "..."]:
    """`several` of the groups' values and the dimension of their classes, `single` of the classes for themselves."""
    dim %= table.ndim
    parts = split_groups(table, groups, dim)
    return join_groups([single(part) if part.shape[dim + 1] == 1 else several(part, dim + 1) for part in parts], dim)


@lru_cache
def _runs(groups: Groups) -> list[tuple[int, int]]:
    """(number, size) of equally large groups that follow each other."""
    return [(len(list(run)), size) for size, run in groupby(groups)]


def _log_odds(z: Float[Tensor, "... n"], dim: int) -> Float[Tensor, "... n"]:
    """Of a softmax over one dimension, exact also where one class leaves nothing to the others."""
    best = z.argmax(dim, keepdim=True)
    top, others = z.gather(dim, best), z.scatter(dim, best, -torch.inf)
    powers = (others - top).exp()
    # All classes but the best are set against the best, a 1 next to which the rounding of the others does not matter.
    against = top + (powers.sum(dim, keepdim=True) - powers).clamp(min=0).log1p()
    return z - against.scatter(dim, best, others.logsumexp(dim, keepdim=True))


def _is_best(scores: Shaped[Tensor, "... n"]) -> Bool[Tensor, "... n"]:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.argmax(-1, keepdim=True), True)


def _tensor(values: Shaped[np.ndarray | Tensor, "..."]) -> Shaped[Tensor, "..."]:
    return values if isinstance(values, Tensor) else torch.tensor(values)


def _like(given: ArrayT, values: Shaped[Tensor, "..."]) -> Shaped[ArrayT, "..."]:
    """A tensor or an array, as `given` is."""
    return values if isinstance(given, Tensor) else values.numpy()  # pyright: ignore[reportReturnType]
