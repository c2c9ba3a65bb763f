"""The Manifest: what every reader returns, and the operations on it that need no image."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from mlvision.data.bands import BandStack
from mlvision.errors import InputError


@dataclass(frozen=True)
class DataConfig:
    """The options that every data set has; each reader's own Config adds to them."""

    name: Annotated[str, "which reader: a key of DATASETS"]
    root: Annotated[str, "folder of the data set"] = ""
    train: Annotated[str, "name of the split to train on"] = "train"
    val: Annotated[str, "name of the split that chooses the checkpoint; empty: carved from the training split"] = ""
    test: Annotated[str, "name of the split that only eval.py reads"] = "test"
    split: Annotated[str, "which of the three eval.py reads: train, val or test"] = "test"
    val_fraction: Annotated[float, "share of the training images carved out where `val` is empty"] = 0.1
    val_seed: Annotated[int, "seed of that carving: apart from `seed`, so that all seeds of a sweep share it"] = 0
    known_labels: Annotated[
        float, "partial labels: share of the training images' labels, present and absent alike, that stay known"
    ] = 1.0
    known_seed: Annotated[int, "seed of which they are: apart from `seed`, so that all seeds of a sweep share them"] = 0
    on_bad_image: Annotated[str, "error: stop at a file that cannot be decoded; skip: leave it out and list it"] = (
        "error"
    )
    check_files: Annotated[bool, "look whether every image file is there; false: labels alone are read"] = True


@dataclass(frozen=True)
class Boxes:
    """The annotated objects of one image, as columns of n rows.

    Attributes:
        xyxy: `[n, 4]` in [0, 1] of the image, divided by the width and height that the annotation states, x first.
        labels: `[n]` class indices.
        crowd: `[n]`, True for a region that stands for many objects.
        difficult: `[n]`, True where the annotators marked the object as hard to see.
        segmentation: n entries: None, a list of polygons (each `[m, 2]` x, y in [0, 1] of the image), or a COCO RLE
            dict `{"size": [height, width], "counts": ...}` on the annotation's pixel grid.
    """

    xyxy: Float32[np.ndarray, "n 4"]
    labels: Int64[np.ndarray, " n"]
    crowd: Bool[np.ndarray, " n"]
    difficult: Bool[np.ndarray, " n"]
    segmentation: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Record:
    """One image and what is known of it.

    Attributes:
        key: path relative to the data set's root, with `/`: the image's name everywhere.
        path: path of the file.
        labels: class indices that are present, ascending.
        unknown: class indices of which nothing is known, ascending.
        difficult: class indices that only difficult objects show, ascending.
        boxes: annotated objects, where the data set has them.
        size: (width, height) that the annotation states, or None.
        bands: how the image is put together, where it is not one picture file at `path`.
    """

    key: str
    path: str
    labels: tuple[int, ...]
    unknown: tuple[int, ...] = ()
    difficult: tuple[int, ...] = ()
    boxes: Boxes | None = None
    size: tuple[int, int] | None = None
    bands: BandStack | None = None


@dataclass(frozen=True)
class Manifest:
    """The images of one split, their labels, and how they were read.

    Attributes:
        classes: class names in a fixed order; column c of every target and score is `classes[c]`.
        records: one entry an image, in a fixed order; `Batch.index` counts these.
        split: the split's name.
        protocol: how images and labels were chosen, in words; printed beside every metric.
    """

    classes: tuple[str, ...]
    records: tuple[Record, ...]
    split: str
    protocol: str = ""

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise InputError(f"class names must differ from each other; these occur twice: {', '.join(twice)}")

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_channels(self) -> int:
        """Channels of every image: 3, unless a reader puts its images together from other bands."""
        bands = self.records[0].bands if self.records else None
        return 3 if bands is None else len(bands)

    @cached_property
    def targets(self) -> Float32[np.ndarray, "N C"]:
        """`[N, C]` float32: 1 present, 0 absent, NaN unknown."""
        rows = [self.target(index) for index in range(len(self))]
        return np.stack(rows) if rows else np.zeros((0, len(self.classes)), dtype=np.float32)

    def label_counts(self) -> tuple[Int64[np.ndarray, " C"], Int64[np.ndarray, " C"]]:
        """In how many images each class is present, and in how many it is known, without making the table."""
        present, unknown = (
            np.bincount(np.fromiter(itertools.chain.from_iterable(column), np.int64), minlength=len(self.classes))
            for column in ((r.labels for r in self.records), (r.unknown for r in self.records))
        )
        return present, len(self) - unknown

    def target(self, index: int) -> Float32[np.ndarray, " C"]:
        """One row of `targets`, without making the table: it would be gigabytes for millions of images."""
        row = np.zeros(len(self.classes), dtype=np.float32)
        row[list(self.records[index].labels)] = 1
        row[list(self.records[index].unknown)] = np.nan
        return row

    @cached_property
    def hash(self) -> str:
        """sha256 of the record list (keys, labels, unknowns): the same images, labels and order."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(json.dumps([record.key, record.labels, record.unknown]).encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def class_hash(self) -> str:
        """sha256 of the class names in their order."""
        return hashlib.sha256(json.dumps(self.classes).encode()).hexdigest()

    def select(self, indices: Iterable[int], split: str | None = None) -> "Manifest":
        """The records at `indices`, in that order."""
        records = tuple(self.records[i] for i in indices)
        return replace(self, records=records, split=self.split if split is None else split)


def object_areas(manifest: Manifest) -> Float32[np.ndarray, "N C"] | None:
    """`[N, C]`, in pixels of the annotated image: of each class's largest box that is no crowd; NaN where there is none.

    None where the data set has no boxes, or does not state how large its images are.

    DEVIATION: COCO measures segments, which not every data set has; a box is larger.
    """
    if not any(record.boxes is not None and record.size is not None for record in manifest.records):
        return None
    areas = np.full((len(manifest), len(manifest.classes)), np.nan, dtype=np.float32)
    for row, record in enumerate(manifest.records):
        if record.boxes is None or record.size is None:
            continue
        x1, y1, x2, y2 = record.boxes.xyxy.T
        pixels = (x2 - x1) * (y2 - y1) * record.size[0] * record.size[1]
        for label, area, crowd in zip(record.boxes.labels.tolist(), pixels.tolist(), record.boxes.crowd, strict=True):
            if not crowd:
                areas[row, label] = np.fmax(areas[row, label], area)
    return areas


def carve_validation(manifest: Manifest, fraction: float, seed: int) -> tuple[Manifest, Manifest]:
    """Splits off a validation part: (the rest, the part), both in the manifest's order.

    The images are drawn by a hash of seed and key, not by a random generator: the choice depends neither on the order
    of the records nor on a library's version, and adding images to the data set moves almost no other image.

    Raises:
        InputError: one of the two parts would be empty.
    """
    num_val = round(fraction * len(manifest))
    if not 0 < num_val < len(manifest):
        raise InputError(
            f"data.val_fraction: {fraction} of the {len(manifest)} images of split {manifest.split!r} gives {num_val} "
            "images to validation: both parts need at least one"
        )
    draw = [hashlib.sha256(f"{seed} {record.key}".encode()).digest() for record in manifest.records]
    permutation = sorted(range(len(manifest)), key=draw.__getitem__)
    note = f"{num_val:,} of {len(manifest):,} images carved out for validation (seed {seed})"
    manifest = replace(manifest, protocol=f"{manifest.protocol}; {note}" if manifest.protocol else note)
    train = manifest.select(sorted(permutation[num_val:]))
    val = manifest.select(sorted(permutation[:num_val]), split=f"{manifest.split}-val")
    return train, val


def hide_labels(manifest: Manifest, known: float, seed: int) -> Manifest:
    """The same images of which less is known: each label, present or absent, stays known with probability `known`.

    What stays is drawn by seed and key, so that it depends neither on the order of the records nor on their number, and
    what stays at a smaller share stays at a larger one.

    Source: the protocol of Durand et al., "Learning a Deep ConvNet for Multi-label Classification with Partial Labels",
    CVPR 2019, and of the papers after it.

    Raises:
        InputError: a share of 0, or above 1.
    """
    if not 0 < known <= 1:
        raise InputError(f"data.known_labels: expected a share above 0, at most 1, got {known}")
    if known == 1:
        return manifest
    records = []
    for record in manifest.records:
        digest = hashlib.shake_256(f"{seed} {record.key}".encode()).digest(4 * len(manifest.classes))
        draw = np.frombuffer(digest, dtype="<u4") / 2**32
        unknown = set(np.flatnonzero(draw >= known).tolist())
        labels = tuple(label for label in record.labels if label not in unknown)
        records.append(replace(record, labels=labels, unknown=tuple(sorted(unknown.union(record.unknown)))))
    note = f"each label known with probability {known:g} (seed {seed})"
    protocol = f"{manifest.protocol}; {note}" if manifest.protocol else note
    return replace(manifest, records=tuple(records), protocol=protocol)


def check_disjoint(a: Manifest, b: Manifest) -> None:
    """Refuses two manifests that share an image, by its key or by the path of its file."""
    keys = {record.key for record in a.records}
    paths = {os.path.abspath(record.path) for record in a.records}
    shared = [r.key for r in b.records if r.key in keys or os.path.abspath(r.path) in paths]
    if shared:
        names = ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else "")
        raise InputError(f"splits {a.split!r} and {b.split!r} share {len(shared):,} images: {names}")


def check_same_classes(a: Manifest, b: Manifest) -> None:
    """Refuses two manifests whose class lists differ, naming the first difference."""
    for i in range(max(len(a.classes), len(b.classes))):
        names = [repr(m.classes[i]) if i < len(m.classes) else "missing" for m in (a, b)]
        if names[0] != names[1]:
            raise InputError(
                f"splits {a.split!r} ({len(a.classes)} classes) and {b.split!r} ({len(b.classes)} classes) need the "
                f"same class list: class {i} is {names[0]} in the first and {names[1]} in the second"
            )


def check_root(config: DataConfig, hint: str = "") -> str:
    """The data set's folder, which must exist; `hint` tells a user without one what to do."""
    if not config.root:
        raise InputError(f"data.root is not set: give the folder of the data set{hint}")
    if not os.path.isdir(config.root):
        raise InputError(f"data.root={config.root} is not a folder{hint}")
    return config.root


def check_files(config: DataConfig, records: Sequence[Record], source: str) -> None:
    """Refuses records whose image file is missing, unless `config` leaves that out; `source` is the file that names them."""
    if not config.check_files:
        return
    there = {record.path for record in on_disk(records)}
    missing = [record.path for record in records if record.path not in there]
    if missing:
        raise InputError(
            f"{source}: {len(missing):,} of its {len(records):,} image files are missing, the first is {missing[0]}"
        )


def on_disk(records: Sequence[Record]) -> list[Record]:
    """The records whose image file is there.

    Each folder is listed once: asking the file system for one file at a time takes minutes on network storage.
    """
    folders = {os.path.dirname(record.path) for record in records}
    listings = {folder: set(os.listdir(folder)) if os.path.isdir(folder) else set() for folder in folders}
    return [r for r in records if os.path.basename(r.path) in listings[os.path.dirname(r.path)]]
