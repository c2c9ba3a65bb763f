"""NUS-WIDE: parallel text files, one list of images and one column of 0 and 1 for each of 81 concepts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from jaxtyping import Bool

from mlvision.data.manifest import Manifest, image_key
from mlvision.data.readers.base import DataConfig, check_files, check_root, on_disk
from mlvision.data.records import LabelLists, Records
from mlvision.errors import InputError, shown
from mlvision.text_files import check_distinct, find_split_file, read_names, read_text

PROTOCOLS = ("all", "annotated")
LABEL_FILES = ("all", "split")
MISSING = ("error", "skip")

# Numbers of images by which papers tell their variant, (split, images): what it is.
VARIANTS = {
    ("Train", 161_789): "the official training images",
    ("Test", 107_859): "the official test images",
    ("Train", 125_449): "the official training images with at least one label",
    ("Test", 83_898): "the official test images with at least one label",
}


@dataclass(frozen=True)
class NuswideConfig(DataConfig):
    """The folder with ImageList, Groundtruth and ConceptsList as the official archives unpack, and the images."""

    name: Annotated[str, "which reader: a key of DATASETS"] = "nuswide"
    train: Annotated[str, "name of the split to train on"] = "Train"
    test: Annotated[str, "name of the split that only eval.py reads"] = "Test"
    images: Annotated[str, "folder under root to which the list's names are relative"] = "Flickr"
    labels: Annotated[str, "all: Groundtruth/AllLabels, in Imagelist's rows; split: Groundtruth/TrainTestLabels"] = (
        "all"
    )
    concepts: Annotated[str, "file of concept names under root: the class list in order"] = (
        "ConceptsList/Concepts81.txt"
    )
    protocol: Annotated[str, "all: every image; annotated: only images with at least one label"] = "all"
    missing: Annotated[str, "image files that are not there: error, or skip (Flickr has lost some)"] = "error"

    def read(self, split: str) -> Manifest:
        """Reads one split: the images of ImageList/{split}Imagelist.txt.

        Row i of a label file belongs to row i of an image list. `labels=all` takes AllLabels, whose rows are those of
        Imagelist.txt, and finds each image of the split there by its name. `labels=split` takes TrainTestLabels, whose rows
        are those of the split's own list; the published Labels_lake_Train.txt holds -1130179 in line 78,372, which is
        refused. The protocol names the variant: numbers of images, what papers call it where that is known, and a hash of
        the records.

        Raises:
            InputError: a file is missing, numbers of rows differ, a value is not 0 or 1; the message names file and line.

        Source: Chua et al., "NUS-WIDE: A Real-World Web Image Database from National University of Singapore", CIVR 2009.
        """
        for option, known in (("protocol", PROTOCOLS), ("labels", LABEL_FILES), ("missing", MISSING)):
            if getattr(self, option) not in known:
                raise InputError(f"data.{option}={getattr(self, option)}: expected one of {', '.join(known)}")
        root = check_root(self, hint=": the folder with ImageList, Groundtruth and ConceptsList")
        source = find_split_file(root, "ImageList/{split}Imagelist.txt", split, "list")
        names = read_names(source, "image")
        classes = tuple(read_names(os.path.join(root, self.concepts), "concept"))
        folder = os.path.join(root, "Groundtruth")
        if self.labels == "all":
            whole = os.path.join(root, "ImageList", "Imagelist.txt")
            row_of = {name: row for row, name in enumerate(read_names(whole, "image"))}
            files = [os.path.join(folder, "AllLabels", f"Labels_{concept}.txt") for concept in classes]
            table = _read_columns(files, len(row_of), whole)[[_row(name, row_of, source, whole) for name in names]]
        else:
            files = [os.path.join(folder, "TrainTestLabels", f"Labels_{concept}_{split}.txt") for concept in classes]
            table = _read_columns(files, len(names), source)

        keys = [image_key(self.images, name) for name in names]
        check_distinct(keys, source, "image", "line")
        images, labels = np.nonzero(table)
        records = Records.under(root, keys, LabelLists.of_pairs(images, labels, len(keys)))
        if self.protocol != "all":
            records = records.take(np.flatnonzero(table.any(axis=1)).tolist())
        note = "every image" if self.protocol == "all" else "images with at least one label"
        if self.missing == "skip" and self.check_files:
            num_listed = len(records)
            records = on_disk(records)
            note += f", {num_listed - len(records):,} files missing and left out"
        check_files(self, records, source)
        if not records:
            raise InputError(f"{source}: split {split!r} is empty: none of its {len(names):,} images is left ({note})")
        manifest = Manifest(classes, records, split)
        protocol = (
            f"NUS-WIDE, {split}Imagelist.txt, {note} ({len(records):,} of {len(names):,}: "
            f"{VARIANTS.get((split, len(records)), 'not a variant known by its number of images')}), "
            f"{len(classes)} concepts, records sha256 {manifest.hash[:16]}"
        )
        return replace(manifest, protocol=protocol)


def _row(name: str, row_of: dict[str, int], source: str, whole: str) -> int:
    if name not in row_of:
        raise InputError(f"{source}: image {shown(name)} is not in {whole}, whose rows the files of AllLabels have")
    return row_of[name]


def _read_columns(files: Sequence[str], num_rows: int, list_file: str) -> Bool[np.ndarray, "N C"]:
    """A column for each file, which holds 0 or 1 in each of its `num_rows` lines."""
    table = np.zeros((num_rows, len(files)), dtype=bool)
    for c, path in enumerate(files):
        values = read_text(path).split()
        if len(values) != num_rows:
            raise InputError(f"{path}: has {len(values):,} rows, {list_file} names {num_rows:,} images")
        joined = "".join(values)
        if len(joined) != num_rows or joined.strip("01"):
            line, value = next((n, v) for n, v in enumerate(values, start=1) if v not in ("0", "1"))
            raise InputError(f"{path}, line {line}: {shown(value)}, expected 0 or 1")
        table[:, c] = np.frombuffer(joined.encode(), dtype=np.uint8) == ord("1")
    return table
