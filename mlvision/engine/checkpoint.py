"""Checkpoints: written whole or not at all, read with clear errors."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from mlvision.errors import InputError, check_fields
from mlvision.files import read_torch, whole_file
from mlvision.options import INERT

FORMAT = "mlvision checkpoint 1"


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: Annotated[int, "also save every so many steps within an epoch; 0: after each epoch only", INERT] = 0
    select: Annotated[
        str,
        "metric of the evaluators whose highest value in validation chooses checkpoints/best.pt; last: the last epoch",
    ] = "mAP"
    patience: Annotated[int, "training ends after so many epochs without a better value; 0: never early"] = 0

    def __post_init__(self) -> None:
        patient = self.patience == 0 or (self.patience > 0 and self.select != "last")
        rules = (
            ("every_steps", self.every_steps >= 0, "0 or more"),
            ("patience", patient, "0 or more, and 0 with checkpoint.select=last"),
        )
        check_fields(self, "checkpoint.", rules)

    def ends(self, epoch: int, epochs: int, best_epoch: int) -> bool:
        """Whether training is over after `epoch` of at most `epochs` epochs, the best of which was number `best_epoch`."""
        return epoch >= epochs or bool(self.patience and epoch > best_epoch + self.patience)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically: a crash or a full disk leaves what was there before.

    Raises:
        InputError: the file could not be written; names it, the cause, and whether an earlier one is kept.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: could not be written ({error.strerror})") from error
    with whole_file(path, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)


def load_checkpoint(path: Path, *, to_resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint that `save_checkpoint` wrote of a run.

    Args:
        to_resume: it must also hold what training goes on from, as `last.pt` does.

    Raises:
        InputError: the file is missing, damaged, was written by something else, or lacks an entry of a run.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    state = read_torch(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: expected '{FORMAT}'; weights of other projects are given by model.checkpoint=")
    entries = _ENTRIES | (_ENTRIES_TO_RESUME if to_resume else {})
    entries |= {name: fits for name, fits in _NEWER_ENTRIES_TO_RESUME.items() if to_resume and name in state}
    for name, fits in entries.items():
        if name not in state or not fits(state[name]):
            what = "is not as a run writes it" if name in state else "is missing"
            raise InputError(f"{path}: its entry '{name}' {what}; expected a checkpoint that train.py wrote")
    if not _is_groups(state.get("groups", []), len(state["classes"])):  # older ones have none
        raise InputError(f"{path}: its entry 'groups' is not as a run writes it; expected groups of its classes")
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _is_classes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _is_groups(value: Any, num_classes: int) -> bool:
    is_sizes = isinstance(value, list) and all(type(size) is int and size > 0 for size in value)
    return is_sizes and sum(value) in (0, num_classes)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_window(value: Any) -> bool:
    """Sums of logged scalars and the steps in each; older checkpoints hold one number of steps for all."""
    if not _is_dict(value) or not _is_state(value.get("sums")):
        return False
    counts = value.get("counts", dict.fromkeys(value["sums"], value.get("count")))
    return _is_dict(counts) and counts.keys() == value["sums"].keys() and all(map(_is_count, counts.values()))


def _is_plan(value: Any) -> bool:
    """The fields of an EpochPlan."""
    if not _is_dict(value) or value.keys() != {"order", "targets", "extra"}:
        return False
    return _is_state(value["extra"]) and all(
        v is None or isinstance(v, Tensor) for v in (value["order"], value["targets"])
    )


# What evaluation and prediction need of a run, and what a bit-exact resume needs besides.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "method": _is_state,
    "ema": lambda value: value is None or _is_state(value),
    "epoch": _is_count,
    "step": _is_count,
    "classes": _is_classes,
}
_ENTRIES_TO_RESUME: dict[str, Callable[[Any], bool]] = {
    "best": lambda value: value is None or isinstance(value, float | int),
    "data_hashes": lambda value: _is_dict(value) and all(isinstance(digest, str) for digest in value.values()),
    "optimizer": lambda value: _is_dict(value) and {"state", "param_groups"} <= value.keys(),
    "scaler": _is_dict,
    "rng": _is_dict,
    "window": _is_window,
    "log_position": _is_count,
}
# Checkpoints of older versions lack these.
_NEWER_ENTRIES_TO_RESUME: dict[str, Callable[[Any], bool]] = {
    "helpers": lambda value: _is_dict(value) and all(map(_is_state, value.values())),
    "plan": lambda value: value is None or _is_plan(value),
}


def check_classes(path: Path, saved: list[str], classes: tuple[str, ...]) -> None:
    """Refuse a checkpoint trained on another class list.

    Raises:
        InputError: names both sides of the first difference.
    """
    if list(classes) == list(saved):
        return
    if len(saved) != len(classes):
        raise InputError(f"{path}: trained on {len(saved)} classes, but the data has {len(classes)}")
    column = next(c for c, pair in enumerate(zip(saved, classes, strict=True)) if pair[0] != pair[1])
    raise InputError(f"{path}: class {column} is '{saved[column]}' in the checkpoint, '{classes[column]}' in the data")
