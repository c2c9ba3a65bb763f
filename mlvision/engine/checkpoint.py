"""Checkpoints: written whole or not at all, read with clear errors."""

import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from mlvision.errors import InputError, check_fields

FORMAT = "mlvision checkpoint 1"


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: Annotated[int, "also save every so many steps within an epoch; 0: after each epoch only"] = 0
    select: Annotated[
        str,
        "validation metric whose highest value chooses checkpoints/best.pt; last: the last epoch, whatever it gives",
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
        InputError: the file could not be written; names it and says that the earlier one is whole.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a short write as RuntimeError
        temporary.unlink(missing_ok=True)
        kept = "the previous one is kept" if path.exists() else "there is no earlier one"
        raise InputError(f"{path}: the checkpoint could not be written ({_one_line(error)}); {kept}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `save_checkpoint` wrote.

    Raises:
        InputError: the file is missing, truncated, or was written by something else.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    if not zipfile.is_zipfile(path):  # the index of torch's format is at the file's end: cut off first
        raise InputError(f"{path}: not a checkpoint, or a truncated one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise InputError(f"{path}: the checkpoint cannot be read ({_one_line(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: expected '{FORMAT}'; weights of other projects are given by model.checkpoint=")
    return state


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


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
