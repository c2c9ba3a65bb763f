"""The Manifest: what every reader returns, and the operations on it that need no image."""

import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64

from mlvision.data.limits import MAX_PIXELS
from mlvision.data.records import Boxes, Record, Records
from mlvision.errors import UNWRITABLE, InputError, listed, printable, shown
from mlvision.parts import LabelStatistics
from mlvision.space import Groups, LabelSpace, has_groups

# Pixels of the longest side that an annotation may state: more is a number in the wrong place.
LONGEST_SIDE = 1_000_000
# The longest class name: a longer one is a whole text that a wrong column or separator made a name.
LONGEST_NAME = 500


@dataclass(frozen=True)
class Manifest:
    """The images of one split, their labels, and how they were read.

    Attributes:
        classes: class names in a fixed order; column c of every target and score is `classes[c]`.
        records: one entry per image, in a fixed order; `Batch.index` counts these. Any sequence of records is kept as
            `Records`.
        split: the split's name.
        protocol: how images and labels were chosen, in words; printed beside every metric.
        max_pixels: width times height that an image may have.
        real_lists: each image's labels are its ReaL list: all classes that fit it, of which any is right.
        groups: sizes of groups of consecutive classes of which each image shows exactly one, see `LabelSpace.exclusive`. ():
            each class for itself.
    """

    classes: tuple[str, ...]
    records: Sequence[Record]
    split: str
    protocol: str = ""
    max_pixels: int = MAX_PIXELS
    real_lists: bool = False
    groups: Groups = ()

    def __post_init__(self) -> None:
        LabelSpace(self.classes, exclusive=self.groups)  # refuses groups of other classes
        if len(set(self.classes)) != len(self.classes):
            twice = sorted(name for name, number in Counter(self.classes).items() if number > 1)
            raise InputError(f"class names must differ from each other; these occur twice: {listed(twice)}")
        for c, name in enumerate(self.classes):
            if not name.strip() or UNWRITABLE.search(name):
                raise InputError(
                    f"split {self.split!r}: class {c} is called {shown(name)}: expected a name in one line, without "
                    "control characters; rename it in the data set"
                )
            if len(name) > LONGEST_NAME:
                raise InputError(
                    f"split {self.split!r}: class {c} has a name of {len(name):,} characters, {shown(name)}: expected at "
                    f"most {LONGEST_NAME}"
                )
        if not isinstance(self.records, Records):
            object.__setattr__(self, "records", Records(self.records))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def keys(self) -> list[str]:
        """The key of every record."""
        return self._columns.keys

    @property
    def paths(self) -> list[str]:
        """The path of every record."""
        return self._columns.paths

    @property
    def _columns(self) -> Records:
        assert isinstance(self.records, Records)
        return self.records

    @property
    def space(self) -> LabelSpace:
        """The classes, and which of them exclude each other. What makes scores of logits is up to a loss."""
        return LabelSpace(self.classes, exclusive=self.groups)

    @property
    def num_channels(self) -> int:
        """Channels of every image: 3, unless a reader puts its images together from other bands."""
        bands = self.records[0].bands if self.records else None
        return 3 if bands is None else len(bands)

    @cached_property
    def targets(self) -> Float32[np.ndarray, "N C"]:
        """`[N, C]` float32: 1 present, 0 absent, NaN unknown."""
        table = np.zeros((len(self), len(self.classes)), dtype=np.float32)
        for records, labels in self._columns.pairs("labels"):
            table[records, labels] = 1
        for records, labels in self._columns.pairs("unknown"):
            table[records, labels] = np.nan
        return table

    def label_counts(self) -> tuple[Int64[np.ndarray, " C"], Int64[np.ndarray, " C"]]:
        """In how many images each class is present, and in how many it is known, without making the table."""
        return self._count("labels"), len(self) - self._count("unknown")

    def statistics(self) -> LabelStatistics:
        """What parts of a run can know of its training split."""
        positives, known = (tuple(counts.tolist()) for counts in self.label_counts())
        return LabelStatistics(positives, known, len(self))

    def difficult_counts(self) -> Int64[np.ndarray, " C"]:
        """How many images show each class by difficult objects only."""
        return self._count("difficult")

    def labels_per_image(self) -> Int64[np.ndarray, " N"]:
        """How many classes are present in each image."""
        return self._columns.labels_per_image()

    def boxes(self) -> tuple[Int64[np.ndarray, " M"], Boxes]:
        """The objects of all images, without their segmentation; and the index of each one's image."""
        return self._columns.boxes()

    @property
    def num_unknown(self) -> int:
        """How many labels are unknown."""
        return int(self._count("unknown").sum())

    def _count(self, column: Literal["labels", "unknown", "difficult"]) -> Int64[np.ndarray, " C"]:
        counts = np.zeros(len(self.classes), dtype=np.int64)
        for _, labels in self._columns.pairs(column):
            counts += np.bincount(labels, minlength=len(counts))
        return counts

    def target(self, index: int) -> Float32[np.ndarray, " C"]:
        """One row of `targets`, without making the table: it would be gigabytes for millions of images."""
        row = np.zeros(len(self.classes), dtype=np.float32)
        row[self._columns.labels(index)] = 1
        row[self._columns.unknown(index)] = np.nan
        return row

    @cached_property
    def object_areas(self) -> Float32[np.ndarray, "N C"] | None:
        """`[N, C]`, in pixels of the annotated image: of each class's largest box that is no crowd; NaN where there is none.

        None where the data set has no boxes, or does not state how large its images are.

        DEVIATION: COCO measures segments, which not every data set has; a box is larger.
        """
        if not any(record.boxes is not None and record.size is not None for record in self.records):
            return None
        areas = np.full((len(self), len(self.classes)), np.nan, dtype=np.float32)
        for row, record in enumerate(self.records):
            if record.boxes is None or record.size is None:
                continue
            x1, y1, x2, y2 = record.boxes.xyxy.T
            pixels = (x2 - x1) * (y2 - y1) * record.size[0] * record.size[1]
            for label, area, crowd in zip(
                record.boxes.labels.tolist(), pixels.tolist(), record.boxes.crowd, strict=True
            ):
                if not crowd:
                    areas[row, label] = np.fmax(areas[row, label], area)
        return areas

    def label_lists(self) -> Iterator[tuple[list[int], list[int]]]:
        """The classes that are present, and those that are unknown, of one image after the other; both ascending."""
        return self._columns.lists()

    def relabel(self, labels: Sequence[tuple[int, ...]], unknown: Sequence[tuple[int, ...]], note: str) -> "Manifest":
        """The same images with other labels, and why in the protocol.

        Args:
            labels: the classes that are present, for each image, ascending.
            unknown: the classes of which nothing is known, for each image, ascending; none of `labels`.
        """
        return replace(self, records=self._columns.relabel(labels, unknown)).noted(note)

    def noted(self, note: str) -> "Manifest":
        """The same images and labels, with a phrase more in the protocol."""
        return replace(self, protocol=f"{self.protocol}; {note}" if self.protocol else note)

    @cached_property
    def hash(self) -> str:
        """sha256 of the record list (keys, labels, unknowns): the same images, labels and order."""
        digest = hashlib.sha256()
        for key, (labels, unknown) in zip(self.keys, self._columns.lists(), strict=True):
            digest.update(f"[{json.dumps(key)}, {labels}, {unknown}]\n".encode())
        return digest.hexdigest()

    @cached_property
    def class_hash(self) -> str:
        """sha256 of the class names in their order, and of their groups if there are any."""
        content = [self.classes, self.groups] if has_groups(self.groups) else self.classes
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def select(self, indices: Iterable[int], split: str | None = None) -> "Manifest":
        """The records at `indices`, in that order."""
        return replace(self, records=self._columns.take(indices), split=self.split if split is None else split)


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
    draw = [hashlib.sha256(f"{seed} {key}".encode()).digest() for key in manifest.keys]
    permutation = sorted(range(len(manifest)), key=draw.__getitem__)
    manifest = manifest.noted(f"{num_val:,} of {len(manifest):,} images carved out for validation (seed {seed})")
    train = manifest.select(sorted(permutation[num_val:]))
    val = manifest.select(sorted(permutation[:num_val]), split=f"{manifest.split}-val")
    return train, val


def check_disjoint(a: Manifest, b: Manifest) -> None:
    """Refuses two manifests that share an image, by its key or by its file."""
    keys, files = set(a.keys), set(true_paths(a.paths))
    shared = [key for key, file in zip(b.keys, true_paths(b.paths), strict=True) if key in keys or file in files]
    if shared:
        raise InputError(f"splits {a.split!r} and {b.split!r} share {len(shared):,} images: {listed(shared, most=5)}")


def check_same_classes(a: Manifest, b: Manifest) -> None:
    """Refuses two manifests whose class lists differ, naming the first difference."""
    for i in range(max(len(a.classes), len(b.classes))):
        names = [repr(m.classes[i]) if i < len(m.classes) else "missing" for m in (a, b)]
        if names[0] != names[1]:
            raise InputError(
                f"splits {a.split!r} ({len(a.classes)} classes) and {b.split!r} ({len(b.classes)} classes) need the "
                f"same class list: class {i} is {names[0]} in the first and {names[1]} in the second"
            )


def check_groups(manifest: Manifest, source: str) -> None:
    """Refuses images that do not show exactly one class of each group; `source` is the file that labels them.

    An image of which some class of a group is unknown may show none of it.
    """
    if not has_groups(manifest.groups):
        return
    sizes = np.array(manifest.groups)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    present, unknown = np.zeros((2, len(manifest), len(sizes)), dtype=np.int64)
    pairs = manifest._columns.pairs
    for counts, column in ((present, pairs("labels")), (unknown, pairs("unknown"))):
        for records, labels in column:
            np.add.at(counts, (records, group_of[labels]), 1)
    wrong = (sizes > 1) & ((present > 1) | ((present == 0) & (unknown == 0)))
    if wrong.any():
        row, group = np.argwhere(wrong)[0].tolist()
        names = [name for name, of in zip(manifest.classes, group_of, strict=True) if of == group]
        raise InputError(
            f"{source}: image {manifest.keys[row]} shows {present[row, group]} classes of a group of which each image "
            f"shows exactly one: {listed(names)}"
        )


def image_key(folder: str, name: str) -> str:
    """The key of the image that a list calls `name`: one key for all the ways to write one path, `\\` for `/` as well."""
    return posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))


def check_distinct_images(manifest: Manifest) -> None:
    """Refuses two records of one file, and two files of one key.

    Raises:
        InputError: names both.
    """
    pair = first_repeat(true_paths(manifest.paths))
    if pair is not None:
        a, b = (manifest.records[i] for i in pair)
        raise InputError(
            f"split {manifest.split!r}: the images {a.key} and {b.key} are one file, {printable(a.path)}: expected each "
            "image once, by one name"
        )
    pair = first_repeat(manifest.keys)
    if pair is not None:
        a, b = (manifest.records[i] for i in pair)
        raise InputError(
            f"split {manifest.split!r}: the files {a.path!r} and {b.path!r} are both called {a.key} in tables and logs: "
            "rename one"
        )


def first_repeat(names: Sequence[str]) -> tuple[int, int] | None:
    """The places of the first name that repeats an earlier one, (earlier, later); None if all differ."""
    if len(set(names)) == len(names):
        return None
    first: dict[str, int] = {}
    return next((first[name], i) for i, name in enumerate(names) if first.setdefault(name, i) != i)


def true_paths(paths: Iterable[str]) -> list[str]:
    """The paths as the file system has them: two are equal if they lead through whatever folders to one file.

    Each folder is looked up once, no file is: a link to a file is an image of its own.
    """
    true_folders: dict[str, str] = {}
    files = []
    for path in paths:
        folder, slash, name = os.path.normpath(path).rpartition("/")
        folder += slash
        if folder not in true_folders:
            try:
                true_folders[folder] = os.path.realpath(folder)
            except ValueError:  # a zero byte, or half of a surrogate pair: there is no such folder
                true_folders[folder] = os.path.abspath(folder)
        files.append(os.path.join(true_folders[folder], name))
    return files
