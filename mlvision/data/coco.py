"""COCO instances JSON: https://cocodataset.org/#format-data."""

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float32, Int64

from mlvision.data.manifest import DataConfig, Manifest, check_files, check_root
from mlvision.data.records import Boxes, Record
from mlvision.data.text_files import find_split_file, read_json
from mlvision.errors import InputError

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


def read_coco(config: CocoConfig, split: str) -> Manifest:
    """Reads one split.

    Classes are the categories by ascending id, so COCO's ids with holes (1 to 90) become 0 to 79. A crowd region makes
    its class present, as in every published COCO result, and is kept in the boxes with `crowd` set. Boxes are clipped
    to the image; a polygon of fewer than three points encloses nothing and is left out.

    Extension: `unknown_category_ids` of an image record lists categories of which nothing is known there.

    Raises:
        InputError: a folder, file or key is missing, or an entry contradicts another; the message names it.
    """
    if config.protocol not in PROTOCOLS:
        raise InputError(f"data.protocol={config.protocol}: expected one of {', '.join(PROTOCOLS)}")
    root = check_root(config, hint=_SCENES_HINT)
    source = find_split_file(root, config.annotations, split, "annotation file")
    document = _load(source)
    classes, class_of = _read_categories(_table(document, "categories", source))
    image_table = _table(document, "images", source)
    images = _read_images(image_table)
    unknown = _read_unknown(image_table, class_of)
    objects = _read_annotations(_table(document, "annotations", source), images, class_of)

    folder = config.images.replace("{split}", split)
    records = []
    for row, (name, size) in enumerate(zip(images.names, images.sizes.tolist(), strict=True)):
        boxes = objects[row]
        if config.protocol == "annotated" and not len(boxes):
            continue
        labels = tuple(sorted(set(boxes.labels.tolist())))
        contradiction = set(labels) & set(unknown[row])
        if contradiction:
            raise InputError(
                f"{source}: image {images.ids[row]} has annotations of class {classes[min(contradiction)]!r} "
                "and lists it in unknown_category_ids"
            )
        key = posixpath.normpath(posixpath.join(folder, name))
        records.append(
            Record(
                key=key,
                path=os.path.join(root, key),
                labels=labels,
                unknown=unknown[row],
                boxes=boxes,
                size=(size[0], size[1]),
            )
        )
    if not records:
        raise InputError(f"{source}: split {split!r} is empty: none of its {len(images.ids)} images has an annotation")
    check_files(config, records, source)
    chosen = "images with an annotation" if config.protocol == "annotated" else "all images"
    protocol = (
        f"{os.path.basename(source)}, {chosen} ({len(records):,} of {len(images.ids):,}), crowd counts as present"
    )
    return Manifest(classes, tuple(records), split, protocol)


@dataclass(frozen=True)
class _Table:
    """The entries of one list of the file, read a column at a time; errors name the entry by its id."""

    rows: list[Any]
    name: str
    source: str

    def error(self, row: int, message: str) -> InputError:
        entry = self.rows[row]
        which = f"id {entry['id']}" if isinstance(entry, dict) and "id" in entry else f"number {row}, counted from 0,"
        return InputError(f"{self.source}: {self.name}: the entry with {which} {message}")

    def column(self, key: str, *types: type) -> list[Any]:
        """The value of `key` in every entry, each of one of `types`."""
        try:
            values = [row[key] for row in self.rows]
        except (KeyError, TypeError):
            bad = next(i for i, row in enumerate(self.rows) if not isinstance(row, dict) or key not in row)
            raise self.error(bad, f"has no {key!r}") from None
        for row, value in enumerate(values):
            if not isinstance(value, types):
                raise self.error(row, f"has {key!r}: {value!r}, expected {' or '.join(t.__name__ for t in types)}")
        return values

    def check_distinct(self, values: Sequence[Any], key: str) -> None:
        seen = set()
        for row, value in enumerate(values):
            if value in seen:
                raise self.error(row, f"repeats the {key} {value!r} of another entry")
            seen.add(value)


@dataclass(frozen=True)
class _Images:
    """Columns of the image list; `sizes` is `[n, 2]` width, height in pixels of the annotation."""

    ids: list[int | str]
    names: list[str]
    sizes: Int64[np.ndarray, "n 2"]


def _load(source: str) -> dict[str, Any]:
    document = read_json(source)
    if not isinstance(document, dict):
        raise InputError(f"{source}: expected an object with images, annotations and categories")
    return document


def _table(document: dict[str, Any], name: str, source: str) -> _Table:
    if not isinstance(document.get(name), list):
        raise InputError(f"{source}: has no list {name!r}; expected COCO's images, annotations and categories")
    return _Table(document[name], name, source)


def _read_categories(table: _Table) -> tuple[tuple[str, ...], dict[int, int]]:
    """Class names by ascending category id, and the class index of each category id."""
    ids, names = table.column("id", int), table.column("name", str)
    table.check_distinct(ids, "id")
    table.check_distinct(names, "name")
    if not ids:
        raise InputError(f"{table.source}: has no categories")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return tuple(names[i] for i in order), {ids[i]: c for c, i in enumerate(order)}


def _read_images(table: _Table) -> _Images:
    ids, names = table.column("id", int, str), table.column("file_name", str)
    table.check_distinct(ids, "id")
    table.check_distinct(names, "file_name")
    sizes = np.array([table.column("width", int), table.column("height", int)], dtype=np.int64).T
    for row in np.flatnonzero((sizes <= 0).any(axis=1)).tolist():
        raise table.error(row, f"has width {sizes[row, 0]} and height {sizes[row, 1]}")
    return _Images(ids, names, sizes)


def _read_unknown(table: _Table, class_of: Mapping[int, int]) -> list[tuple[int, ...]]:
    """Class indices of each image's `unknown_category_ids`."""
    unknown = []
    for row, image in enumerate(table.rows):
        ids = image.get("unknown_category_ids", [])
        if not isinstance(ids, list) or not all(i in class_of for i in ids):
            raise table.error(row, f"has unknown_category_ids {ids!r}, expected a list of ids of the categories")
        unknown.append(tuple(sorted({class_of[i] for i in ids})))
    return unknown


def _read_annotations(table: _Table, images: _Images, class_of: Mapping[int, int]) -> list[Boxes]:
    """The boxes of each image, in the file's order."""
    image_row = {image_id: row for row, image_id in enumerate(images.ids)}
    rows = _look_up(table, "image_id", image_row, "images")
    labels = _look_up(table, "category_id", class_of, "categories")
    xyxy = _read_boxes(table, images.sizes[rows])
    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in table.rows], dtype=bool)

    # One sort groups the annotations by image; a dict of lists would cost an object for each of a million annotations.
    order = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[order], np.arange(len(images.ids) + 1))
    grouped = []
    for size, start, stop in zip(images.sizes, bounds[:-1], bounds[1:], strict=True):
        chosen = order[start:stop]
        segmentation = tuple(_read_segmentation(table, i, size) for i in chosen.tolist())
        difficult = np.zeros(len(chosen), dtype=bool)
        grouped.append(Boxes(xyxy[chosen], labels[chosen], crowd[chosen], difficult, segmentation))
    return grouped


def _look_up(table: _Table, key: str, index_of: Mapping[Any, int], others: str) -> Int64[np.ndarray, " n"]:
    """The index of what each entry refers to by `key`."""
    values = table.column(key, int, str)
    try:
        return np.array([index_of[value] for value in values], dtype=np.int64)
    except KeyError:
        bad = next(i for i, value in enumerate(values) if value not in index_of)
        raise table.error(bad, f"names the {key} {values[bad]!r}, which is not among the {others}") from None


def _read_boxes(table: _Table, sizes: Int64[np.ndarray, "n 2"]) -> Float32[np.ndarray, "n 4"]:
    """x, y, width, height in pixels -> x1, y1, x2, y2 in [0, 1]; `sizes` is the width, height of each entry's image.

    Boxes of no width or height are let through: COCO's own train2017 has two.
    """
    values = table.column("bbox", list)
    for row, value in enumerate(values):
        if len(value) != 4 or not all(isinstance(v, int | float) for v in value):
            raise table.error(row, f"has bbox {value}, expected [x, y, width, height]")
    boxes = np.array(values, dtype=np.float64).reshape(-1, 4)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    usable = np.isfinite(corners).all(axis=1) & (boxes[:, 2:] >= 0).all(axis=1)
    for row in np.flatnonzero(~usable).tolist():
        raise table.error(row, f"has bbox {values[row]}: expected finite numbers, width and height not negative")
    inside = (corners[:, :2] <= sizes).all(axis=1) & (corners[:, 2:] >= 0).all(axis=1)
    for row in np.flatnonzero(~inside).tolist():
        width, height = sizes[row]
        raise table.error(row, f"has bbox {values[row]}, outside its image of {width} x {height} pixels")
    return np.clip(corners / np.tile(sizes, 2), 0, 1).astype(np.float32)


def _read_segmentation(table: _Table, row: int, size: Int64[np.ndarray, "2"]) -> list[np.ndarray] | dict | None:
    """One entry's segmentation as `Boxes` keeps it; `size` is the width, height of its image."""
    value = table.rows[row].get("segmentation")
    if not value:
        return None
    if isinstance(value, dict):
        _check_rle(table, row, value, size)
        return {"size": value["size"], "counts": value["counts"]}
    scale = size.astype(np.float32)
    try:
        polygons = [np.array(points, dtype=np.float32).reshape(-1, 2) / scale for points in value]
    except (TypeError, ValueError):
        polygons = [np.full((1, 2), np.nan, dtype=np.float32)]
    if not all(np.isfinite(polygon).all() for polygon in polygons):
        raise table.error(row, "has a segmentation that is neither RLE nor a list of [x1, y1, x2, y2, ...] polygons")
    return [polygon for polygon in polygons if len(polygon) >= 3] or None


def _check_rle(table: _Table, row: int, rle: Mapping[str, Any], size: Int64[np.ndarray, "2"]) -> None:
    """Refuses a run-length mask that is not on its image's grid. `counts`: runs column by column, or their string."""
    width, height = size.tolist()
    counts = rle.get("counts")
    if rle.get("size") != [height, width]:
        raise table.error(row, f"has a mask of size {rle.get('size')}, its image is [{height}, {width}] (height first)")
    if isinstance(counts, list):
        if not all(isinstance(c, int) and c >= 0 for c in counts) or sum(counts) != width * height:
            raise table.error(row, f"has a mask whose counts do not add up to {width * height} pixels")
    elif not isinstance(counts, str):
        raise table.error(row, "has a mask without counts")
