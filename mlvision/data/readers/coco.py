"""COCO instances JSON: https://cocodataset.org/#format-data."""

import difflib
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeGuard

import numpy as np
from jaxtyping import Bool, Float32, Int64

from mlvision.data.images import read_size
from mlvision.data.manifest import LONGEST_SIDE, Manifest, image_key
from mlvision.data.readers.base import DataConfig, check_files, check_root
from mlvision.data.records import LabelLists, Objects, Outlines, Records
from mlvision.errors import InputError, listed, shown
from mlvision.text_files import find_split_file, read_json

PROTOCOLS = ("annotated", "all")
_SCENES_HINT = (
    "; the first lines of each YAML in configs/ say what must lie there, prepare_data.py scenes makes generated images"
)


@dataclass(frozen=True)
class CocoConfig(DataConfig):
    """A folder in COCO's layout. A split's name fills the two templates: `data.test=val2017` for COCO 2017."""

    name: Annotated[str, "which reader: a key of DATASETS"] = "coco"
    annotations: Annotated[str, "annotation file under root; {split} is the split's name"] = (
        "annotations/instances_{split}.json"
    )
    images: Annotated[str, "image folder under root; {split} is the split's name"] = "{split}"
    protocol: Annotated[str, "annotated: only images with at least one annotation; all: every image"] = "annotated"
    merge_classes: Annotated[dict[str, str], "category -> the class it counts as, such as bus: vehicle"] = field(
        default_factory=dict
    )
    drop_classes: Annotated[list[str], "classes, after merging, that are left out with their annotations"] = field(
        default_factory=list
    )
    classes: Annotated[
        list[str], "class list in order, after merging, the others left out; empty: all, by category id"
    ] = field(default_factory=list)

    def read(self, split: str) -> Manifest:
        """Reads one split.

        Classes are the categories by ascending id, so COCO's ids with holes (1 to 90) become 0 to 79; `merge_classes`,
        `drop_classes` and `classes` make other ones of them. An annotation of a class that is left out is as if it were not
        there. A crowd region makes its class present, as in every published COCO result, and is kept in the boxes with
        `crowd` set. Boxes are clipped to the image; a polygon of fewer than three points encloses nothing and is left out.

        Ids are whole numbers or texts; `1`, `1.0` and `"1"` are one id. The size of an image that does not state its width
        and height is read from its file; if files are not looked for (`check_files`), such an image has no boxes.

        Extension: `unknown_category_ids` of an image record lists categories of which nothing is known there.

        Raises:
            InputError: a folder, file or key is missing, or an entry contradicts another; the message names it.
        """
        if self.protocol not in PROTOCOLS:
            raise InputError(f"data.protocol={self.protocol}: expected one of {', '.join(PROTOCOLS)}")
        root = check_root(self, hint=_SCENES_HINT)
        source = find_split_file(root, self.annotations, split, "annotation file")
        document = _load(source)
        categories = _read_categories(_table(document, "categories", source), self)
        images = _read_images(_table(document, "images", source), self.images.replace("{split}", split))
        annotations = _read_annotations(_table(document, "annotations", source), images, categories)

        rows = np.arange(len(images.ids)) if self.protocol == "all" else np.flatnonzero(annotations.counts)
        if not len(rows):
            chosen = " of the chosen classes" if annotations.num_left_out else ""
            raise InputError(
                f"{source}: split {split!r} is empty: none of its {len(images.ids)} images has an annotation{chosen}"
            )
        sizes = _complete_sizes(self, images, annotations, root)
        objects, num_lines = _read_objects(annotations, rows, sizes)
        unknown = _read_unknown(images, annotations, categories)
        records = Records.under(
            root,
            [images.keys[row] for row in rows.tolist()],
            # `rows` ascends and holds the image of every annotation.
            LabelLists.of_pairs(np.searchsorted(rows, annotations.images), annotations.labels, len(rows)),
            LabelLists(unknown.get(row, ()) for row in rows.tolist()),
            objects=objects,
            sizes=sizes[rows],
        )
        check_files(self, records, source)
        chosen = "images with an annotation" if self.protocol == "annotated" else "all images"
        notes = [
            f"{os.path.basename(source)}, {chosen} ({len(rows):,} of {len(images.ids):,}), crowd counts as present",
            *(
                [f"merged: {', '.join(f'{a} -> {b}' for a, b in self.merge_classes.items())}"]
                if self.merge_classes
                else []
            ),
            *(
                [f"{annotations.num_left_out:,} annotations of other classes left out"]
                if annotations.num_left_out
                else []
            ),
            *([f"{num_lines:,} polygons of fewer than 3 points left out"] if num_lines else []),
        ]
        return Manifest(categories.classes, records, split, ", ".join(notes))


@dataclass(frozen=True)
class _Table:
    """The entries of one list of the file, read a column at a time; errors name the entry by its id."""

    rows: list[Any]
    name: str
    source: str

    def error(self, row: int, message: str) -> InputError:
        entry = self.rows[row]
        has_id = isinstance(entry, dict) and "id" in entry
        which = f"id {entry['id']}" if has_id and len(str(entry["id"])) < 80 else f"number {row}, counted from 0,"
        return InputError(f"{self.source}: {self.name}: the entry with {which} {message}")

    def column(self, key: str, *types: type, expected: str) -> list[Any]:
        """The value of `key` in every entry, each of one of `types`."""
        try:
            values = [row[key] for row in self.rows]
        except (KeyError, TypeError):
            bad = next(i for i, row in enumerate(self.rows) if not isinstance(row, dict) or key not in row)
            raise self.error(bad, f"has no {key!r}") from None
        for row, value in enumerate(values):
            if type(value) not in types:
                raise self.error(row, f"has {key!r}: {shown(value)}, expected {expected}")
        return values

    def ids(self, key: str) -> list[int | str]:
        """The id in every entry."""
        values = self.column(key, int, str, float, expected="a whole number or a text")
        for row, value in enumerate(values):
            if type(value) is not int:
                values[row] = _identity(value)
                if values[row] is None:
                    raise self.error(row, f"has {key!r}: {shown(value)}, expected a whole number or a text")
        return values

    def check_distinct(self, values: Sequence[Any], key: str) -> None:
        seen = set()
        for row, value in enumerate(values):
            if value in seen:
                raise self.error(row, f"repeats the {key} {shown(value)} of another entry")
            seen.add(value)


def _identity(value: Any) -> int | str | None:
    """An id as it is compared: a number that is written as a text or with a point is that number; None if it is no id."""
    if isinstance(value, str):
        return int(value) if value.isdecimal() and value.isascii() and str(int(value)) == value else value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if type(value) is int else None


@dataclass(frozen=True)
class _Categories:
    """The class of each category, -1 if it is left out; `number_of` counts the categories by their ids."""

    classes: tuple[str, ...]
    names: list[str]
    number_of: dict[int | str, int]
    class_of: Int64[np.ndarray, " K"]


@dataclass(frozen=True)
class _Images:
    """Columns of the image list; `sizes` is `[n, 2]` width, height in pixels of the annotation, 0 where none is stated."""

    table: _Table
    ids: list[int | str]
    keys: list[str]
    sizes: Int64[np.ndarray, "n 2"]


@dataclass(frozen=True)
class _Annotations:
    """The annotations of the chosen classes, sorted by image.

    Attributes:
        rows: `[M]` the row of each in the file's list.
        images: `[M]` the row of its image.
        categories, labels: `[M]` the number of its category, and its class.
        ends: `[n]` where those of each image end.
        num_left_out: how many others the file has, of classes that are left out.
    """

    table: _Table
    rows: Int64[np.ndarray, " M"]
    images: Int64[np.ndarray, " M"]
    categories: Int64[np.ndarray, " M"]
    labels: Int64[np.ndarray, " M"]
    ends: Int64[np.ndarray, " n"]
    num_left_out: int

    @property
    def counts(self) -> Int64[np.ndarray, " n"]:
        """How many annotations each image has."""
        return np.diff(self.ends, prepend=0)

    def of(self, image: int) -> slice:
        return slice(int(self.ends[image - 1]) if image else 0, int(self.ends[image]))


def _load(source: str) -> dict[str, Any]:
    document = read_json(source)
    if not isinstance(document, dict):
        raise InputError(f"{source}: expected an object with images, annotations and categories")
    return document


def _table(document: dict[str, Any], name: str, source: str) -> _Table:
    if not isinstance(document.get(name), list):
        raise InputError(f"{source}: has no list {name!r}; expected COCO's images, annotations and categories")
    return _Table(document[name], name, source)


def _read_categories(table: _Table, config: CocoConfig) -> _Categories:
    """The classes that the options make of the categories."""
    ids, names = table.ids("id"), table.column("name", str, expected="a text")
    table.check_distinct(ids, "id")
    table.check_distinct(names, "name")
    if not ids:
        raise InputError(f"{table.source}: has no categories")
    _check_named(table.source, "merge_classes", config.merge_classes, names, "category")
    order = sorted(range(len(ids)), key=lambda i: (isinstance(ids[i], str), ids[i]))
    merged: list[str] = [config.merge_classes.get(str(names[i]), str(names[i])) for i in order]
    _check_named(table.source, "drop_classes", config.drop_classes, merged, "class")
    _check_named(table.source, "classes", config.classes, merged, "class")
    chosen = config.classes or [name for name in dict.fromkeys(merged) if name not in config.drop_classes]
    if set(chosen) & set(config.drop_classes):
        raise InputError(
            f"data.classes and data.drop_classes both name {min(set(chosen) & set(config.drop_classes))!r}"
        )
    if not chosen:
        raise InputError(f"data.drop_classes: no class is left of {table.source}")
    index = {name: c for c, name in enumerate(chosen)}
    class_of = np.array([index.get(name, -1) for name in merged], dtype=np.int64)
    return _Categories(tuple(chosen), [names[i] for i in order], {ids[i]: k for k, i in enumerate(order)}, class_of)


def _check_named(source: str, option: str, chosen: Iterable[str], names: Sequence[str], what: str) -> None:
    """Refuses an option that names what is not there."""
    for name in chosen:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {listed(names)}"
            raise InputError(f"data.{option}: {source} has no {what} {shown(name)}; {hint}")


def _read_images(table: _Table, folder: str) -> _Images:
    ids, names = table.ids("id"), table.column("file_name", str, expected="a text")
    table.check_distinct(ids, "id")
    keys = [image_key(folder, name) for name in names]
    table.check_distinct(keys, "file_name")
    sizes = np.zeros((len(ids), 2), dtype=np.int64)
    for row, image in enumerate(table.rows):
        width, height = image.get("width"), image.get("height")
        if width is None and height is None:
            continue
        if not (_is_side(width) and _is_side(height)):
            raise table.error(
                row, f"has width {shown(width)} and height {shown(height)}: expected whole numbers of pixels above 0"
            )
        sizes[row] = width, height
    return _Images(table, ids, keys, sizes)


def _is_side(value: Any) -> TypeGuard[int | float]:
    """Whether this is a width or height in pixels."""
    return type(value) in (int, float) and 0 < value <= LONGEST_SIDE and value == int(value)


def _complete_sizes(
    config: CocoConfig, images: _Images, annotations: _Annotations, root: str
) -> Int64[np.ndarray, "n 2"]:
    """The sizes, read from the files of annotated images that state none; still 0 where files are not looked for."""
    sizes = images.sizes.copy()
    for row in np.unique(annotations.images[sizes[annotations.images, 0] == 0]).tolist() if config.check_files else ():
        try:
            sizes[row] = read_size(os.path.join(root, images.keys[int(row)]), config.max_pixels)
        except InputError as error:
            raise images.table.error(
                row, f"has no width and height, and its file does not give them: {error}"
            ) from error
    return sizes


def _read_unknown(images: _Images, annotations: _Annotations, categories: _Categories) -> dict[int, tuple[int, ...]]:
    """The classes that each image's `unknown_category_ids` make unknown there, by the image's row."""
    unknown = {}
    for row, image in enumerate(images.table.rows):
        ids = image.get("unknown_category_ids", [])
        if ids == []:
            continue
        identities = [_identity(value) for value in ids] if isinstance(ids, list) else [None]
        if not categories.number_of.keys() >= set(identities):
            raise images.table.error(
                row, f"has unknown_category_ids {shown(ids)}, expected a list of ids of the categories"
            )
        numbers = {categories.number_of[i] for i in identities if i is not None}
        contradiction = numbers & set(annotations.categories[annotations.of(row)].tolist())
        if contradiction:
            name = categories.names[min(contradiction)]
            raise images.table.error(
                row, f"has annotations of class {shown(name)} and lists it in unknown_category_ids"
            )
        # A class that is merged of several categories is known to be there if one of them is.
        present = {-1, *annotations.labels[annotations.of(row)].tolist()}
        unknown[row] = tuple(sorted({int(categories.class_of[k]) for k in numbers} - present))
    return unknown


def _read_annotations(table: _Table, images: _Images, categories: _Categories) -> _Annotations:
    """What each annotation belongs to."""
    image_row = {image_id: row for row, image_id in enumerate(images.ids)}
    of_image = _look_up(table, "image_id", image_row, "images")
    numbers = _look_up(table, "category_id", categories.number_of, "categories")
    labels = categories.class_of[numbers]
    # One sort groups the annotations by image; a dict of lists would cost an object for each of a million annotations.
    order = np.argsort(of_image, kind="stable")
    order = order[labels[order] >= 0]
    ends = np.searchsorted(of_image[order], np.arange(len(images.ids)), side="right")
    num_left_out = int((labels < 0).sum())
    return _Annotations(table, order, of_image[order], numbers[order], labels[order], ends, num_left_out)


def _look_up(table: _Table, key: str, index_of: Mapping[Any, int], others: str) -> Int64[np.ndarray, " n"]:
    """The index of what each entry refers to by `key`."""
    values = table.ids(key)
    try:
        return np.array([index_of[value] for value in values], dtype=np.int64)
    except KeyError:
        bad = next(i for i, value in enumerate(values) if value not in index_of)
        raise table.error(bad, f"names the {key} {shown(values[bad])}, which is not among the {others}") from None


def _read_objects(
    annotations: _Annotations, rows: Int64[np.ndarray, " N"], sizes: Int64[np.ndarray, "n 2"]
) -> tuple[Objects, int]:
    """The boxes of the images at `rows`, which hold all annotations; and the number of polygons that enclose nothing.

    An image whose size is not known has no boxes.
    """
    is_sized = sizes[:, 0] > 0
    chosen = is_sized[annotations.images]
    objects, of_image = annotations.rows[chosen], annotations.images[chosen]
    table = annotations.table
    xyxy = _read_boxes(table, objects, sizes[of_image])
    outlines, num_lines = _read_outlines(table, objects, sizes[of_image])
    columns = Objects(
        ends=np.searchsorted(of_image, rows, side="right"),
        exists=is_sized[rows] | (annotations.counts[rows] == 0),
        xyxy=xyxy,
        labels=annotations.labels[chosen].astype(np.int32),
        crowd=_read_crowd(table, objects),
        difficult=np.zeros(len(objects), dtype=bool),
        outlines=outlines,
    )
    return columns, num_lines


def _read_crowd(table: _Table, objects: Int64[np.ndarray, " M"]) -> Bool[np.ndarray, " M"]:
    crowd = np.zeros(len(objects), dtype=bool)
    for i, row in enumerate(objects.tolist()):
        flag = table.rows[row].get("iscrowd", 0)
        if type(flag) is not int or flag not in (0, 1):
            number = int(flag) if isinstance(flag, bool) else _identity(flag)
            if number not in (0, 1):
                raise table.error(row, f"has iscrowd {shown(flag)}, expected 0 or 1")
            flag = number
        crowd[i] = flag
    return crowd


def _read_boxes(
    table: _Table, objects: Int64[np.ndarray, " M"], sizes: Int64[np.ndarray, "M 2"]
) -> Float32[np.ndarray, "M 4"]:
    """x, y, width, height in pixels -> x1, y1, x2, y2 in [0, 1]; `sizes` is the width, height of each object's image.

    Boxes of no width or height are let through: COCO's own train2017 has two.
    """
    column = table.column("bbox", list, expected="[x, y, width, height]")
    for row, value in enumerate(column):
        if len(value) != 4 or not all(type(v) in (int, float) for v in value):
            raise table.error(row, f"has bbox {shown(value)}, expected [x, y, width, height]")
    values = [column[row] for row in objects.tolist()]
    try:
        boxes = np.array(values, dtype=np.float64).reshape(-1, 4)
    except OverflowError:  # a whole number that no float holds
        boxes = np.array([[v if abs(v) < 1e300 else np.inf for v in value] for value in values], dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    usable = (np.abs(corners) <= LONGEST_SIDE).all(axis=1) & (boxes[:, 2:] >= 0).all(axis=1)
    for i in np.flatnonzero(~usable).tolist():
        expected = f"expected finite numbers of at most {LONGEST_SIDE:,} pixels, width and height not negative"
        raise table.error(int(objects[i]), f"has bbox {shown(values[i])}: {expected}")
    inside = (corners[:, :2] <= sizes).all(axis=1) & (corners[:, 2:] >= 0).all(axis=1)
    for i in np.flatnonzero(~inside).tolist():
        width, height = sizes[i]
        raise table.error(
            int(objects[i]), f"has bbox {shown(values[i])}, outside its image of {width} x {height} pixels"
        )
    return np.clip(corners / np.tile(sizes, 2), 0, 1).astype(np.float32)


def _read_outlines(
    table: _Table, objects: Int64[np.ndarray, " M"], sizes: Int64[np.ndarray, "M 2"]
) -> tuple[Outlines, int]:
    """The objects' segmentation, and the number of polygons that are left out since they enclose nothing.

    All points go into one array: an array per polygon would cost more than the points.
    """
    points, lengths, counts, masks, num_lines = array("f"), [], [], {}, 0
    for i, row in enumerate(objects.tolist()):
        value, before = table.rows[row].get("segmentation"), len(lengths)
        if isinstance(value, dict) and value:
            masks[i] = _read_rle(table, row, value, sizes[i])
        elif value:
            for polygon in value if isinstance(value, list) else [value]:
                start = len(points)
                if not _extend(points, polygon) or (len(points) - start) % 2:
                    raise table.error(row, _NO_OUTLINE)
                if len(points) - start < 6:
                    del points[start:]
                    num_lines += 1
                else:
                    lengths.append((len(points) - start) // 2)
        counts.append(len(lengths) - before)
    of_object = np.repeat(np.arange(len(objects)), counts)
    of_point = np.repeat(of_object, lengths)
    pixels = np.frombuffer(points, dtype=np.float32).reshape(-1, 2)
    for i in of_point[~np.isfinite(pixels).all(axis=1)].tolist():
        raise table.error(int(objects[i]), _NO_OUTLINE)
    scaled = pixels / sizes.astype(np.float32)[of_point]
    return Outlines(scaled, np.cumsum(lengths, dtype=np.int64), np.cumsum(counts, dtype=np.int64), masks), num_lines


_NO_OUTLINE = "has a segmentation that is neither RLE nor a list of [x1, y1, x2, y2, ...] polygons"


def _extend(points: array, polygon: Any) -> bool:
    """Appends the numbers of a polygon: x1, y1, x2, y2, ..., or a list of x, y; false if it is none."""
    try:
        if isinstance(polygon, list) and polygon and isinstance(polygon[0], list):
            if any(len(point) != 2 for point in polygon):
                return False
            polygon = [number for point in polygon for number in point]
        if not isinstance(polygon, list):
            return False
        points.extend(polygon)
    except (TypeError, OverflowError):  # not a number, or one that no float holds
        return False
    return True


def _read_rle(table: _Table, row: int, rle: Mapping[str, Any], size: Int64[np.ndarray, "2"]) -> dict[str, Any]:
    """A run-length mask, which must be on its image's grid. `counts`: runs column by column, or their string."""
    width, height = size.tolist()
    counts = rle.get("counts")
    if rle.get("size") != [height, width]:
        shown_size = shown(rle.get("size"))
        raise table.error(row, f"has a mask of size {shown_size}, its image is [{height}, {width}] (height first)")
    if not isinstance(counts, list | str) or not counts:
        raise table.error(row, "has a mask without counts")
    runs = counts if isinstance(counts, list) else _decode_runs(counts)
    if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != width * height:
        raise table.error(row, f"has a mask whose counts do not add up to {width * height} pixels")
    return {"size": rle["size"], "counts": counts}


def _decode_runs(text: str) -> list[int]:
    """The runs that a string of counts stands for; none if it is no such string.

    Source: rleFrString of pycocotools: five bits per character, the lowest first, a sixth says that more follow; the
    fifth of the last is the sign; from the fourth run on, what is stored is the difference to the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if shift == 0 else []
