"""Records: images and what is known of them, kept as columns.

A tuple of objects would cost kilobytes per image, in every loader process again: reading an object writes its reference
count, which copies the page that the processes shared. Arrays are shared for good, and give their objects on demand.
"""

import copy
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, Literal, overload

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped

from mlvision.data.bands import BandStack
from mlvision.errors import UNWRITABLE, printable

# Images whose labels are looked up at once: for those of a million images, the pairs would take gigabytes.
_CHUNK = 2**16


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
        key: path relative to the data set's root, with `/`: the image's name everywhere. A character that would break a
            line of a table is written as its escape (`\\n`); `path` has the character itself.
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

    def __post_init__(self) -> None:
        if UNWRITABLE.search(self.key):
            object.__setattr__(self, "key", printable(self.key))


@dataclass(frozen=True)
class Outlines:
    """The segmentation of M objects, as `Boxes.segmentation` has it.

    Attributes:
        points: `[K, 2]` the points of all polygons, one polygon after the other.
        polygon_ends: `[Q]` where each polygon ends in `points`.
        object_ends: `[M]` where each object's polygons end in `polygon_ends`; an object without polygons has none.
        masks: the RLE dict of each object that has one, by the object's number.
    """

    points: Float32[np.ndarray, "K 2"]
    polygon_ends: Int64[np.ndarray, " Q"]
    object_ends: Int64[np.ndarray, " M"]
    masks: Mapping[int, Mapping[str, Any]]

    @classmethod
    def of(cls, segmentations: Iterable[Any]) -> "Outlines":
        points, lengths, numbers, masks = [], [], [], {}
        for i, segmentation in enumerate(segmentations):
            polygons = [] if segmentation is None or isinstance(segmentation, dict) else segmentation
            if isinstance(segmentation, dict):
                masks[i] = segmentation
            points += polygons
            lengths += [len(polygon) for polygon in polygons]
            numbers.append(len(polygons))
        joined = np.concatenate([np.zeros((0, 2), np.float32), *points]).astype(np.float32)
        return cls(joined, _ends(lengths), _ends(numbers), masks)

    def between(self, start: int, stop: int) -> tuple[list[np.ndarray] | dict[str, Any] | None, ...]:
        """What the objects from `start` on, without `stop`, are segmented by."""
        first, ends = _start(self.object_ends, start), self.object_ends[start:stop].tolist()
        polygons, point = [], _start(self.polygon_ends, first)
        for end in self.polygon_ends[first : ends[-1] if ends else first].tolist():
            polygons.append(self.points[point:end])
            point = end
        bounds = pairwise(end - first for end in (first, *ends))
        return tuple(
            dict(self.masks[i]) if i in self.masks else polygons[a:b] or None for i, (a, b) in enumerate(bounds, start)
        )


@dataclass(frozen=True)
class Objects:
    """The boxes of N images as columns of M objects, one image after the other.

    Attributes:
        ends: `[N]` where each image's objects end.
        exists: `[N]` False for an image of whose objects nothing is stated, which has no `Boxes`.
        xyxy, labels, crowd, difficult: `[M]` as in `Boxes`.
        outlines: the objects' segmentation.
    """

    ends: Int64[np.ndarray, " N"]
    exists: Bool[np.ndarray, " N"]
    xyxy: Float32[np.ndarray, "M 4"]
    labels: Shaped[np.ndarray, " M"]
    crowd: Bool[np.ndarray, " M"]
    difficult: Bool[np.ndarray, " M"]
    outlines: Outlines

    @classmethod
    def of(cls, boxes: Sequence[Boxes | None]) -> "Objects":
        stated = [one for one in boxes if one is not None]

        def column(name: str, empty: np.ndarray) -> np.ndarray:
            return np.concatenate([empty, *(getattr(one, name) for one in stated)])

        return cls(
            ends=_ends(0 if one is None else len(one) for one in boxes),
            exists=np.array([one is not None for one in boxes], dtype=bool),
            xyxy=column("xyxy", np.zeros((0, 4), np.float32)),
            labels=column("labels", np.zeros(0, np.int64)).astype(np.int32),
            crowd=column("crowd", np.zeros(0, bool)),
            difficult=column("difficult", np.zeros(0, bool)),
            outlines=Outlines.of(shape for one in stated for shape in one.segmentation),
        )

    def __getitem__(self, row: int) -> Boxes | None:
        if not self.exists[row]:
            return None
        start, stop = _start(self.ends, row), int(self.ends[row])
        return Boxes(
            self.xyxy[start:stop],
            self.labels[start:stop].astype(np.int64),
            self.crowd[start:stop],
            self.difficult[start:stop],
            self.outlines.between(start, stop),
        )


class _Texts:
    """One text for each image, as bytes of UTF-8 one after the other."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode() for text in texts]
        self._bytes = b"".join(encoded)
        self._ends = array("q", accumulate(map(len, encoded)))

    def of(self, rows: Sequence[int]) -> Iterator[str]:
        for row in rows:
            yield self._bytes[self._ends[row - 1] if row else 0 : self._ends[row]].decode()


class _Paths:
    """One path for each image. Nearly all are a folder and the key: the folder is stored once."""

    def __init__(self, paths: Iterable[str], keys: Iterable[str]) -> None:
        self._parts, self._which = _distinct(
            (path.removesuffix(key), path.endswith(key)) for path, key in zip(paths, keys, strict=True)
        )

    def of(self, rows: Sequence[int], keys: Iterable[str]) -> Iterator[str]:
        for row, key in zip(rows, keys, strict=True):
            text, is_joined = self._parts[self._which[row]]
            yield text + key if is_joined else text


class LabelLists:
    """The class indices of each image, ascending; equal tuples are stored once."""

    def __init__(self, rows: Iterable[tuple[int, ...]]) -> None:
        tuples, self._which = _distinct(rows)
        self._values = array("i", chain.from_iterable(tuples))
        self._ends = array("q", accumulate(map(len, tuples)))

    @classmethod
    def of_pairs(
        cls, images: Int64[np.ndarray, " m"], labels: Int64[np.ndarray, " m"], num_images: int
    ) -> "LabelLists":
        """From pairs of an image and a class in any order; one that occurs twice counts once."""
        num_classes = int(labels.max(initial=0)) + 1
        images, labels = np.divmod(np.unique(images * num_classes + labels), num_classes)
        lists = cls(())
        lists._which = array("i", range(num_images))
        lists._values = array("i", labels.astype(np.int32).tobytes())
        lists._ends = array("q", np.cumsum(np.bincount(images, minlength=num_images), dtype=np.int64).tobytes())
        return lists

    def __getitem__(self, row: int) -> list[int]:
        return next(self.of((row,)))

    def of(self, rows: Sequence[int]) -> Iterator[list[int]]:
        for row in rows:
            which = self._which[row]
            yield self._values[self._ends[which - 1] if which else 0 : self._ends[which]].tolist()

    def lengths(self, rows: Sequence[int]) -> Int64[np.ndarray, " n"]:
        """How many classes each image has."""
        return np.diff(np.asarray(self._ends).view(np.int64), prepend=0)[np.asarray(self._which)[np.asarray(rows)]]

    def pairs(self, rows: Sequence[int]) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
        """The place in `rows`, and the class, of each label."""
        which = np.asarray(self._which)[np.asarray(rows)]
        images, places = _members(np.asarray(self._ends).view(np.int64), which)
        return images, np.asarray(self._values)[places].astype(np.int64)


class Records(Sequence[Record]):
    """The records of a manifest; each object is made when it is asked for.

    Columns that are read one place at a time are arrays of the standard library, which are quicker at that than numpy's.

    Args:
        records: any records; what they hold is copied into columns.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        keys, paths, labels, unknown, difficult, boxes, sizes, bands = [], [], [], [], [], [], [], []
        for record in records:
            keys.append(record.key)
            paths.append(record.path)
            labels.append(record.labels)
            unknown.append(record.unknown)
            difficult.append(record.difficult)
            boxes.append(record.boxes)
            sizes.append(record.size or (0, 0))
            bands.append(record.bands)
        self._keys, self._paths = _Texts(keys), _Paths(paths, keys)
        self._labels, self._unknown, self._difficult = LabelLists(labels), LabelLists(unknown), LabelLists(difficult)
        self._objects = Objects.of(boxes) if any(one is not None for one in boxes) else None
        self._sizes = array("i", chain.from_iterable(sizes))
        self._bands, self._which_bands = _distinct(bands)
        self._rows = array("q", range(len(keys)))

    @classmethod
    def under(
        cls,
        root: str,
        keys: Sequence[str],
        labels: LabelLists,
        unknown: LabelLists | None = None,
        difficult: LabelLists | None = None,
        objects: Objects | None = None,
        sizes: Int64[np.ndarray, "N 2"] | None = None,
    ) -> "Records":
        """The images at `root`/key, from columns: an object for each image would take more time than all else.

        Args:
            root: folder of the data set.
            keys: N keys, as `Record` has them or not yet escaped.
            labels, unknown, difficult: the classes of each image; None: no image has one.
            objects: the boxes of these images.
            sizes: width, height in pixels that the annotation states; 0 where it states none.
        """
        number, none = len(keys), LabelLists([()] * len(keys))
        escaped = [printable(key) if UNWRITABLE.search(key) else key for key in keys]
        records = cls(())
        records._keys = _Texts(escaped)
        records._paths = _Paths((os.path.join(root, key) for key in keys), escaped)
        records._labels, records._unknown, records._difficult = labels, unknown or none, difficult or none
        records._objects = objects
        sizes = np.zeros((number, 2), dtype=np.int64) if sizes is None else sizes
        records._sizes = array("i", sizes.astype(np.int32).tobytes())
        records._bands, records._which_bands = _distinct([None] * number)
        records._rows = array("q", range(number))
        return records

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return next(self._made((self._rows[index],)))

    def __iter__(self) -> Iterator[Record]:
        return self._made(self._rows)

    def _made(self, rows: Sequence[int]) -> Iterator[Record]:
        """The records of these rows of the columns."""
        paths = self._paths.of(rows, self._keys.of(rows))
        lists = (column.of(rows) for column in (self._labels, self._unknown, self._difficult))
        columns = zip(rows, self._keys.of(rows), paths, *lists, strict=True)
        for row, key, path, labels, unknown, difficult in columns:
            width, height = self._sizes[2 * row : 2 * row + 2]
            yield Record(
                key,
                path,
                tuple(labels),
                tuple(unknown),
                tuple(difficult),
                self._objects[row] if self._objects else None,
                (width, height) if width else None,
                self._bands[self._which_bands[row]],
            )

    def take(self, indices: Iterable[int]) -> "Records":
        """The records at `indices`, in that order; the columns are shared."""
        part = copy.copy(self)
        part._rows = array("q", (self._rows[i] for i in indices))
        return part

    def relabel(self, labels: Sequence[tuple[int, ...]], unknown: Sequence[tuple[int, ...]]) -> "Records":
        """The same images of which something else is known; the other columns are shared."""
        part = copy.copy(self)
        part._labels, part._unknown = (self._stored(column) for column in (labels, unknown))
        return part

    def _stored(self, column: Sequence[tuple[int, ...]]) -> LabelLists:
        """A column in the order of what is stored; images that are none of these records have nothing in it."""
        stored: list[tuple[int, ...]] = [()] * (len(self._sizes) // 2)
        for row, labels in zip(self._rows, column, strict=True):
            stored[row] = labels
        return LabelLists(stored)

    @property
    def keys(self) -> list[str]:
        """The key of every record; without making the records."""
        return list(self._keys.of(self._rows))

    @property
    def paths(self) -> list[str]:
        """The path of every record; without making the records."""
        return list(self._paths.of(self._rows, self._keys.of(self._rows)))

    def labels(self, index: int) -> list[int]:
        """`labels` of one record; without making it."""
        return self._labels[self._rows[index]]

    def unknown(self, index: int) -> list[int]:
        """`unknown` of one record; without making it."""
        return self._unknown[self._rows[index]]

    def lists(self) -> Iterator[tuple[list[int], list[int]]]:
        """`labels` and `unknown` of one record after the other; without making them."""
        return zip(self._labels.of(self._rows), self._unknown.of(self._rows), strict=True)

    def labels_per_image(self) -> Int64[np.ndarray, " N"]:
        """How many `labels` each record has."""
        return self._labels.lengths(self._rows)

    def pairs(
        self, column: Literal["labels", "unknown", "difficult"]
    ) -> Iterator[tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]]:
        """The index of the record, and the class, of each label of a column; a few thousand records at a time."""
        lists: LabelLists = {"labels": self._labels, "unknown": self._unknown, "difficult": self._difficult}[column]
        for start in range(0, len(self), _CHUNK):
            records, labels = lists.pairs(self._rows[start : start + _CHUNK])
            yield records + start, labels

    def boxes(self) -> tuple[Int64[np.ndarray, " M"], Boxes]:
        """The objects of all records, without their segmentation; and the index of each one's record."""
        if self._objects is None:
            nothing = np.zeros(0, dtype=np.int64)
            return nothing, Boxes(np.zeros((0, 4), np.float32), nothing, nothing > 0, nothing > 0, ())
        records, places = _members(self._objects.ends, np.asarray(self._rows))
        columns = (
            self._objects.xyxy,
            self._objects.labels.astype(np.int64),
            self._objects.crowd,
            self._objects.difficult,
        )
        return records, Boxes(*(column[places] for column in columns), segmentation=(None,) * len(places))


def _ends(lengths: Iterable[int]) -> Int64[np.ndarray, " n"]:
    """Where pieces of these lengths end, one after the other."""
    return np.cumsum(np.fromiter(lengths, dtype=np.int64), dtype=np.int64)


def _start(ends: Int64[np.ndarray, " n"], i: int) -> int:
    return int(ends[i - 1]) if i else 0


def _members(
    ends: Int64[np.ndarray, " n"], pieces: Shaped[np.ndarray, " k"]
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    """What stands in the `pieces`, of which each ends where `ends` says: which of the pieces, and the place, of each."""
    lengths = np.diff(ends, prepend=0)[pieces]
    first = ends[pieces] - lengths - (np.cumsum(lengths) - lengths)  # the place, less the number of places before it
    return np.repeat(np.arange(len(pieces)), lengths), np.arange(lengths.sum()) + np.repeat(first, lengths)


def _distinct(values: Iterable[Any]) -> tuple[list[Any], array]:
    """The values that differ from each other, and which of them each value is."""
    place: dict[Any, int] = {}
    which = array("i", (place.setdefault(value, len(place)) for value in values))
    return list(place), which
