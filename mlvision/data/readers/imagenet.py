"""ImageNet's class folders, and the reassessed labels (ReaL) of its validation images."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from mlvision.data.folder import FolderSearch, find_images, kind_of, list_folder
from mlvision.data.images import SUFFIXES
from mlvision.data.manifest import Manifest
from mlvision.data.readers.base import DataConfig, check_root
from mlvision.data.records import LabelLists, Records
from mlvision.errors import InputError, printable, shown
from mlvision.text_files import read_json, read_names

_VALIDATION_NAME = "ILSVRC2012_val_{:08d}.JPEG"
_VALIDATION_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclass(frozen=True)
class ImagenetConfig(DataConfig):
    """A folder for each split, in it a folder for each class; the split with ReaL labels may also be one flat folder."""

    name: Annotated[str, "which reader: a key of DATASETS"] = "imagenet"
    test: Annotated[str, "name of the split that only eval.py reads"] = "val"
    images: Annotated[str, "folder of a split under root; {split} is the split's name"] = "{split}"
    classes: Annotated[
        str, "class names under root in the order of the sorted class folders: JSON or text; empty: folders"
    ] = ""
    real: Annotated[str, "ReaL labels under root, such as real.json; empty: each image has the label of its folder"] = (
        ""
    )
    real_split: Annotated[str, "the split that has ReaL labels"] = "val"

    def read(self, split: str) -> Manifest:
        """Reads one split; images are sorted by path.

        Classes are the sorted folders of the training split, in every split (with WordNet ids as folders, that is the
        standard order 0 to 999). With ReaL labels an image has all labels that its list names, whatever its folder is;
        images with an empty list, to which no label fits, are left out, as their authors ask. They are found by their
        number, in `ILSVRC2012_val_00000001.JPEG`, which is the row of the file.

        Raises:
            InputError: a folder is missing or empty, a folder is of no class, an image has no ReaL list, or a list is not
                of the classes; the message names the folder, image or entry.

        Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015; Beyer et al., "Are we
        done with ImageNet?", 2020 (ReaL; github.com/google-research/reassessed-imagenet).
        """
        root = check_root(self)
        has_real = bool(self.real) and split == self.real_split
        folders, classes = _read_classes(self, root, needs_folders=not has_real or self.check_files)
        folder = self.images.replace("{split}", split)
        if has_real:
            source = os.path.join(root, self.real)
            lists = _read_real(source, len(classes))
            if self.check_files or os.path.isdir(os.path.join(root, folder)):
                search, _ = _search(root, folder, folders, flat=True)
                names = search.images
            else:
                search, names = FolderSearch(), [_VALIDATION_NAME.format(number) for number in range(1, len(lists) + 1)]
            keys = [f"{folder}/{name}" for name in names]
            labels = LabelLists(_look_up(keys, lists, source))
            records = Records.under(root, keys, labels)
            records = records.take(np.flatnonzero(records.labels_per_image()).tolist())
            note = f"ReaL labels ({self.real}), {len(names) - len(records):,} images with an empty list left out"
        else:
            search, labels = _search(root, folder, folders, flat=False)
            records = Records.under(
                root, [f"{folder}/{name}" for name in search.images], LabelLists((c,) for c in labels)
            )
            note = "one label an image, that of its folder"
        protocol = f"{folder}, {len(records):,} images of {len(classes):,} classes, {note}"
        if search.others:
            protocol += f"; {search.note()}"
        return Manifest(classes, records, split, protocol, real_lists=has_real)


def _class_folders(path: str) -> tuple[str, ...]:
    return tuple(entry.name for entry in list_folder(path) if kind_of(entry) == "folder")


def _read_classes(config: ImagenetConfig, root: str, needs_folders: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The class folders and the class names, in one order; without folders where only names are needed."""
    path = os.path.join(root, config.images.replace("{split}", config.train))
    folders = _class_folders(path) if os.path.isdir(path) else ()
    if not folders and (needs_folders or not config.classes):
        raise InputError(
            f"{path}: no class folders there; the classes are the folders of the training split (data.train={config.train})"
        )
    if not config.classes:
        return folders, tuple(printable(name) for name in folders)
    source = os.path.join(root, config.classes)
    names = _read_json_names(source) if source.endswith(".json") else read_names(source, "class")
    if folders and len(names) != len(folders):
        raise InputError(f"{source}: names {len(names):,} classes, {path} has {len(folders):,} class folders")
    return folders, tuple(names)


def _read_json_names(source: str) -> list[str]:
    names = read_json(source)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{source}: expected a list of class names")
    return names


def _search(root: str, folder: str, folders: tuple[str, ...], flat: bool) -> tuple[FolderSearch, list[int]]:
    """The images below a split's folder and the class of each; -1 for those in the folder itself, where `flat`."""
    path = os.path.join(root, folder)
    if not os.path.isdir(path):
        raise InputError(f"{path}: no such folder")
    class_of = {name: c for c, name in enumerate(folders)}
    for name in _class_folders(path):
        if name not in class_of:
            raise InputError(f"{path}/{name}: a folder of no class of the training split ({len(folders):,} classes)")
    search = find_images(path)
    if not search.images:
        raise InputError(f"{path}: no image there (looked for {', '.join(sorted(SUFFIXES))})")
    outside = [name for name in search.images if "/" not in name]
    if outside and not flat:
        raise InputError(
            f"{path}/{outside[0]}: an image outside the class folders; only a split with ReaL labels may be flat"
        )
    return search, [class_of.get(name.partition("/")[0], -1) for name in search.images]


def _read_real(source: str, num_classes: int) -> list[tuple[int, ...]]:
    """The list of each validation image, in the order of their numbers."""
    document: Any = read_json(source)
    if not isinstance(document, list) or not document:
        raise InputError(f"{source}: expected a list with a list of class numbers for each validation image")
    lists = []
    for row, labels in enumerate(document):
        if not isinstance(labels, list) or not all(type(c) is int and 0 <= c < num_classes for c in labels):
            raise InputError(
                f"{source}: entry {row}, counted from 0, is {shown(labels)}, expected classes 0 to {num_classes - 1}"
            )
        lists.append(tuple(sorted(set(labels))))
    return lists


def _look_up(keys: Sequence[str], lists: list[tuple[int, ...]], source: str) -> list[tuple[int, ...]]:
    """The list of each image, by the number in its name."""
    chosen = []
    for key in keys:
        match = _VALIDATION_FILE.fullmatch(key.rpartition("/")[2])
        if match is None:
            raise InputError(
                f"{key}: expected a name such as ILSVRC2012_val_00000001.JPEG, whose number is the row of {source}"
            )
        number = int(match[1])
        if not 1 <= number <= len(lists):
            raise InputError(f"{key}: {source} has {len(lists):,} lists, none for number {number:,}")
        chosen.append(lists[number - 1])
    return chosen
