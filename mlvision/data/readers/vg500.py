"""Visual Genome 500: the lists of the multi-label papers, with the 500 most frequent object categories."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from mlvision.data.manifest import Manifest, image_key
from mlvision.data.readers.base import DataConfig, check_files, check_root
from mlvision.data.records import LabelLists, Records
from mlvision.errors import InputError, shown
from mlvision.text_files import check_distinct, find_split_file, read_json, read_names

MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Vg500Config(DataConfig):
    """Two lists of images, one JSON file of labels, and the image folders of Visual Genome."""

    name: Annotated[str, "which reader: a key of DATASETS"] = "vg500"
    lists: Annotated[str, "list of image names under root; {split} is the split's name"] = "{split}_list_500.txt"
    labels: Annotated[str, "JSON under root: image name to class numbers"] = "vg_category_500_labels_index.json"
    images: Annotated[list[str], "folders under root that hold the images: the first that has one counts"] = field(
        default_factory=lambda: ["VG_100K", "VG_100K_2"]
    )
    classes: Annotated[str, "file of class names under root, a line for each number; empty: class 0, class 1, ..."] = ""
    num_classes: Annotated[int, "number of classes"] = 500

    def read(self, split: str) -> Manifest:
        """Reads one split.

        The published files number the classes and do not name them: give a file that does, if you have one.

        Raises:
            InputError: a file is missing or malformed, an image has no labels in the JSON file or is in no image folder, or
                a class number is out of range; the message names file, line or image.

        Source: Chen et al., "Learning Semantic-Specific Graph Representation for Multi-Label Image Recognition" (SSGRL),
        ICCV 2019; github.com/HCPLab-SYSU/SSGRL (82,904 training and 10,000 test images).
        """
        if not 1 <= self.num_classes <= MOST_CLASSES:
            raise InputError(f"data.num_classes={self.num_classes}: expected 1 to {MOST_CLASSES:,}")
        if not self.images:
            raise InputError("data.images is empty: expected at least one folder")
        root = check_root(self, hint=": the folder with the lists, the label file and the image folders")
        source = find_split_file(root, self.lists, split, "list")
        names = read_names(source, "image")
        classes = _read_classes(self, root)
        label_file = os.path.join(root, self.labels)
        labels_of = read_json(label_file)
        if not isinstance(labels_of, dict):
            raise InputError(f"{label_file}: expected an object, image name to class numbers")
        folder_of = _find_folders(root, self.images)
        labels = _read_labels(names, labels_of, label_file, len(classes), source)
        keys = [image_key(folder_of.get(name, self.images[0]), name) for name in names]
        records = Records.under(root, keys, labels)
        check_distinct(records.keys, source, "image", "line")
        check_files(self, records, source)
        protocol = (
            f"Visual Genome, {os.path.basename(source)}, {len(records):,} images, "
            f"{len(classes)} classes ({self.labels})"
        )
        return Manifest(classes, records, split, protocol)


def _read_classes(config: Vg500Config, root: str) -> tuple[str, ...]:
    if not config.classes:
        return tuple(f"class {c}" for c in range(config.num_classes))
    source = os.path.join(root, config.classes)
    names = read_names(source, "class")
    if len(names) != config.num_classes:
        raise InputError(f"{source}: names {len(names)} classes, data.num_classes is {config.num_classes}")
    return tuple(names)


def _find_folders(root: str, folders: Sequence[str]) -> dict[str, str]:
    """The folder of each file that is in one; each folder is listed once."""
    folder_of: dict[str, str] = {}
    for folder in reversed(folders):  # the first one that has a name is written last
        path = os.path.join(root, folder)
        folder_of |= dict.fromkeys(os.listdir(path) if os.path.isdir(path) else [], folder)
    return folder_of


def _read_labels(
    names: Sequence[str], labels_of: Mapping[str, Any], label_file: str, num_classes: int, source: str
) -> LabelLists:
    """The classes of each image that the list `source` names."""
    rows = []
    for line, name in enumerate(names, start=1):
        if name not in labels_of:
            raise InputError(f"{source}, line {line}: image {shown(name)} has no labels in {label_file}")
        labels = labels_of[name]
        if not isinstance(labels, list) or not all(type(c) is int and 0 <= c < num_classes for c in labels):
            raise InputError(
                f"{label_file}: {shown(name)} has {shown(labels)}, expected a list of classes 0 to {num_classes - 1}"
            )
        rows.append(tuple(sorted(set(labels))))
    return LabelLists(rows)
