"""What the readers of all data sets have in common: the options, and the checks of folders and files."""

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from mlvision.data.edits import EditConfig
from mlvision.data.limits import MAX_PIXELS, MOST_PIXELS
from mlvision.data.manifest import Manifest
from mlvision.data.records import Records
from mlvision.errors import InputError, check_fields, printable
from mlvision.options import INERT, Selectable


@dataclass(frozen=True)
class DataConfig(Selectable):
    """The options that every data set has; each reader's own Config adds to them."""

    name: Annotated[str, "which reader: a key of DATASETS"]
    root: Annotated[str, "folder of the data set", INERT] = ""
    train: Annotated[str, "name of the split to train on"] = "train"
    val: Annotated[str, "name of the split that chooses the checkpoint; empty: carved from the training split"] = ""
    test: Annotated[str, "name of the split that only eval.py reads"] = "test"
    val_fraction: Annotated[float, "share of the training images carved out where `val` is empty"] = 0.1
    val_seed: Annotated[int, "seed of that carving: apart from `seed`, so that all seeds of a sweep share it"] = 0
    edits: Annotated[list[EditConfig], "what changes the labels of the training images, one edit after the other"] = (
        field(default_factory=list)
    )
    val_labels: Annotated[
        str, "as_train: the edits change the validation images too, whose labels are then as poor; full: they do not"
    ] = "as_train"
    on_bad_image: Annotated[str, "error: stop at a file that cannot be decoded; skip: leave it out and list it"] = (
        "error"
    )
    check_files: Annotated[bool, "look whether every image file is there; false: only labels are read", INERT] = True
    outside_root: Annotated[bool, "read images too whose names lead out of `root`: absolute ones, or by `..`"] = False
    max_pixels: Annotated[int, "width times height that an image may have, looked up before it is decoded"] = MAX_PIXELS

    def __post_init__(self) -> None:
        rules = (
            ("on_bad_image", self.on_bad_image in ("error", "skip"), "error or skip"),
            ("val_seed", self.val_seed >= 0, "0 or more"),
            ("val_labels", self.val_labels in ("as_train", "full"), "as_train or full"),
            ("max_pixels", 1 <= self.max_pixels <= MOST_PIXELS, f"1 to {MOST_PIXELS}"),
        )
        check_fields(self, "data.", rules)

    def read(self, split: str) -> Manifest:
        """The images of one split and their labels. `read_split` calls it and checks what all data sets have in common.

        Raises:
            InputError: data that cannot be used; the message names the file.
        """
        raise NotImplementedError


def check_root(config: DataConfig, hint: str = "") -> str:
    """The data set's folder, which must exist; `hint` tells a user without one what to do."""
    if not config.root:
        raise InputError(f"data.root is not set: give the folder of the data set{hint}")
    if not os.path.isdir(config.root):
        raise InputError(f"data.root={config.root} is not a folder{hint}")
    return config.root


def check_inside(config: DataConfig, manifest: Manifest) -> None:
    """Refuses images whose names lead out of `root`, unless `config` allows it.

    Only names are looked at: a link inside `root` was made by whoever owns the folder and may lead anywhere.
    """
    for key in manifest.keys:
        leaves = posixpath.isabs(key) or (".." in key and posixpath.normpath(key).partition("/")[0] == "..")
        if leaves and not config.outside_root:
            raise InputError(
                f"split {manifest.split!r}: the image {key} lies outside data.root={config.root}; "
                "data.outside_root=true reads it all the same"
            )


def check_files(config: DataConfig, records: Records, source: str) -> None:
    """Refuses records whose image file is missing, unless `config` leaves that out; `source` is the file that names them."""
    if not config.check_files:
        return
    is_there = _on_disk(records.paths)
    missing = [path for path, there in zip(records.paths, is_there, strict=True) if not there]
    if missing:
        raise InputError(
            f"{source}: {len(missing):,} of its {len(records):,} image files are missing, the first is "
            f"{printable(missing[0])}"
        )


def on_disk(records: Records) -> Records:
    """The records whose image file is there."""
    return records.take(row for row, there in enumerate(_on_disk(records.paths)) if there)


def _on_disk(paths: Sequence[str]) -> list[bool]:
    """Whether each file is there.

    Each folder is listed once: asking the file system for one file at a time takes minutes on network storage.
    """
    listings: dict[str, set[str]] = {}
    is_there = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        is_there.append(name in listings[folder])
    return is_there
