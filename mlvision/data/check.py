"""What a user wants to know of a data set before training on it: counts, bad files, duplicates, and how it looks."""

import colorsys
import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from mlvision.data import read_split
from mlvision.data.images import decode_record, map_records, read_photo, record_files
from mlvision.data.loader import MOST_WORKERS
from mlvision.data.manifest import Manifest, check_same_classes
from mlvision.data.readers.base import DataConfig
from mlvision.data.readers.coco import CocoConfig
from mlvision.data.records import Boxes, Record
from mlvision.errors import InputError, check_fields, listed, shown
from mlvision.files import spreadsheet_text, whole_file
from mlvision.label_maps.oracle import object_cover
from mlvision.lettering import fitted, length, write
from mlvision.text_files import read_bytes


@dataclass(frozen=True)
class CheckOptions:
    """The options of `prepare_data.py check`."""

    data: DataConfig = field(default_factory=CocoConfig)
    out: Annotated[str, "folder for check.json, check.csv, contact_sheet.png; empty: runs/check-<data.name>"] = ""
    samples: Annotated[int, "images of each split on the contact sheet"] = 12
    seed: Annotated[int, "seed that chooses these images"] = 0
    num_workers: Annotated[int, "threads that decode"] = 2
    labels_only: Annotated[bool, "count labels only: no image is looked for or opened, there is no contact sheet"] = (
        False
    )

    def __post_init__(self) -> None:
        rules = (
            ("samples", 1 <= self.samples <= 1000, "1 to 1000"),
            ("seed", self.seed >= 0, "0 or more"),
            ("num_workers", 0 <= self.num_workers <= MOST_WORKERS, f"0 to {MOST_WORKERS}"),
        )
        check_fields(self, "", rules)


@dataclass(frozen=True)
class SplitCheck:
    """One split and its files.

    Attributes:
        manifest: the split as read.
        digests: sha256 of each image file's content, None where it cannot be read or decoded, or was not opened.
        unreadable: (key, reason) of each such file.
    """

    manifest: Manifest
    digests: tuple[str | None, ...]
    unreadable: tuple[tuple[str, str], ...]

    @cached_property
    def duplicates(self) -> list[list[str]]:
        """Groups of keys whose files have the same content."""
        return [keys for keys in self.keys_by_content.values() if len(keys) > 1]

    @cached_property
    def keys_by_content(self) -> dict[str, list[str]]:
        """Keys by the digest of their file."""
        groups: dict[str, list[str]] = {}
        for key, digest in zip(self.manifest.keys, self.digests, strict=True):
            if digest is not None:
                groups.setdefault(digest, []).append(key)
        return groups

    @cached_property
    def class_counts(self) -> dict[str, np.ndarray]:
        """`[C]` numbers of images in which each class is present, unknown, or shown by difficult objects only."""
        present, known = self.manifest.label_counts()
        return {
            "present": present,
            "unknown": len(self.manifest) - known,
            "difficult": self.manifest.difficult_counts(),
        }

    def summary(self) -> dict[str, Any]:
        """The numbers of the split, as plain data."""
        per_image = self.manifest.labels_per_image().tolist()
        _, boxes = self.manifest.boxes()
        counts = self.class_counts
        return {
            "protocol": self.manifest.protocol,
            "hash": self.manifest.hash,
            "images": len(self.manifest),
            "labels": sum(per_image),
            "unknown": int(counts["unknown"].sum()),
            "labels_per_image": {
                "mean": float(np.mean(per_image)),
                "min": min(per_image),
                "max": max(per_image),
                "images": dict(sorted(Counter(per_image).items())),
            },
            "boxes": len(boxes),
            "crowd_boxes": int(boxes.crowd.sum()),
            "difficult_boxes": int(boxes.difficult.sum()),
            "classes": {name: column.tolist() for name, column in counts.items()},
            "unreadable": [{"key": key, "reason": reason} for key, reason in self.unreadable],
            "duplicates": self.duplicates,
        }


@dataclass(frozen=True)
class Overlap:
    """Images that two splits share: keys in both, and (key in the first, key in the second) of equal files."""

    splits: tuple[str, str]
    keys: list[str]
    contents: list[tuple[str, str]]


@dataclass(frozen=True)
class DataCheck:
    """The whole result; `splits` by name, in the order train, val, test. With `labels_only` no image was opened."""

    splits: dict[str, SplitCheck]
    overlaps: list[Overlap]
    labels_only: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        return next(iter(self.splits.values())).manifest.classes

    def problems(self) -> list[str]:
        """One line for each thing that a user should mend."""
        most_labels = max(split.manifest.labels_per_image().max(initial=0) for split in self.splits.values())
        found = _unsplit_names(self.classes) if most_labels < 2 else []
        for name, split in self.splits.items():
            found += [f"{name}: unreadable: {reason}" for _, reason in split.unreadable]
            found += [f"{name}: the same file {len(keys)} times: {listed(keys)}" for keys in split.duplicates]
        for overlap in self.overlaps:
            pair = " and ".join(overlap.splits)
            found += [f"{pair}: both hold {key}" for key in overlap.keys]
            found += [f"{pair}: the same file: {a}, {b}" for a, b in overlap.contents if a != b]
        return found

    def as_plain(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {
            "classes": list(self.classes),
            "labels_only": self.labels_only,
            "splits": {name: split.summary() for name, split in self.splits.items()},
            "overlaps": [
                {"splits": list(o.splits), "keys": o.keys, "contents": [list(pair) for pair in o.contents]}
                for o in self.overlaps
            ],
            "problems": self.problems(),
        }


def check_data(config: DataConfig, num_workers: int = 2, labels_only: bool = False) -> DataCheck:
    """Reads the splits that `train`, `val` and `test` name (an empty name is passed over) and decodes every image.

    With `labels_only` no image is looked for or opened: label files are checked where the images are not.

    Raises:
        InputError: a split cannot be read, the class lists differ, or training is to be judged on its own images.
    """
    if config.train and config.train in (config.val, config.test):
        raise InputError(f"data.train={config.train} is also named as val or test: expected another split")
    if labels_only:
        config = replace(config, check_files=False)
    manifests = [read_split(config, name) for name in dict.fromkeys((config.train, config.val, config.test)) if name]
    if not manifests:
        raise InputError("data.train, data.val and data.test are all empty: nothing to check")
    for manifest in manifests[1:]:
        check_same_classes(manifests[0], manifest)
    splits = {
        m.split: SplitCheck(m, (None,) * len(m), ()) if labels_only else _check_split(m, num_workers) for m in manifests
    }
    overlaps = [_find_overlap(a, b) for a, b in combinations(splits.values(), 2)]
    return DataCheck(splits, [overlap for overlap in overlaps if overlap.keys or overlap.contents], labels_only)


def write_check(check: DataCheck, folder: Path, samples: int, seed: int) -> None:
    """Writes check.json, check.csv (a row per class) and, where images were opened, contact_sheet.png into `folder`."""
    sheet = None if check.labels_only else contact_sheet(check, samples, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "check.json") as file:
        file.write(json.dumps(check.as_plain(), indent=1) + "\n")
    columns = {
        f"{split}_{kind}": column.tolist()
        for split, checked in check.splits.items()
        for kind, column in checked.class_counts.items()
    }
    with whole_file(folder / "check.csv", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", *columns])
        writer.writerows(zip(map(spreadsheet_text, check.classes), *columns.values(), strict=True))
    if sheet is not None:
        with whole_file(folder / "contact_sheet.png", "wb") as file:
            sheet.save(file, format="PNG")


def format_check(check: DataCheck, most: int = 10) -> str:
    """The result as tables to print; of more than `most` problems the first ones."""
    header = ["split", "images", "labels", "per image", "fewest", "most", "unknown", "boxes", "crowd", "difficult"]
    rows = []
    for name, split in check.splits.items():
        s = split.summary()
        per_image = s["labels_per_image"]
        numbers = [s["images"], s["labels"], per_image["mean"], per_image["min"], per_image["max"], s["unknown"]]
        rows.append([name, *numbers, s["boxes"], s["crowd_boxes"], s["difficult_boxes"]])
    counts = {name: split.class_counts for name, split in check.splits.items()}
    shown = [(n, kind) for n in counts for kind in counts[n] if kind == "present" or counts[n][kind].any()]
    class_header = ["class", *(name if kind == "present" else f"{name} {kind}" for name, kind in shown)]
    class_rows = [
        [class_name, *(int(counts[name][kind][c]) for name, kind in shown)]
        for c, class_name in enumerate(check.classes)
    ]
    problems = check.problems()
    lines = [*_table(header, rows), ""]
    lines += [f"{name}: {split.manifest.protocol}" for name, split in check.splits.items()]
    lines += ["", "images of each class", *_table(class_header, class_rows), ""]
    for name, of_kind in counts.items():
        absent = [class_name for class_name, n in zip(check.classes, of_kind["present"], strict=True) if n == 0]
        if absent:
            lines.append(f"note: {name} shows {len(absent)} of the classes in no image: {listed(absent)}")
    if check.labels_only:
        lines.append("note: no image was looked for or opened")
    lines.append(f"problems found: {len(problems):,}")
    lines += [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  and {len(problems) - most:,} more, listed in check.json")
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    texts = [
        [f"{v:.2f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in row] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, *texts)
    ]


def _check_split(manifest: Manifest, num_workers: int) -> SplitCheck:
    def check_file(record: Record) -> tuple[str | None, str | None]:
        try:
            contents = [read_bytes(path) for path in record_files(record)]
            decode_record(record, contents, manifest.max_pixels)
        except InputError as error:
            return None, str(error)
        return hashlib.sha256(b"".join(contents)).hexdigest(), None

    results = map_records(check_file, manifest, num_workers, manifest.split)
    unreadable = [(key, why) for key, (_, why) in zip(manifest.keys, results, strict=True) if why is not None]
    return SplitCheck(manifest, tuple(digest for digest, _ in results), tuple(unreadable))


def _unsplit_names(classes: Sequence[str]) -> list[str]:
    """A problem if the classes are combinations of fewer names: the reader was given another separator than theirs.

    A name may well hold a comma (`tench, Tinca tinca`); then its parts are more than the classes, not fewer.
    """
    # The last two stand within names too: only names that are clearly combinations count.
    for separator, least in ((";", 2), (",", 2), ("|", 2), ("\t", 2), ("/", 2), ("+", 2), ("_", 5), (" ", 5)):
        joined = [name for name in classes if separator in name.strip(separator)]
        parts = {part.strip() for name in classes for part in name.split(separator)}
        if len(joined) > len(classes) / 2 and least * len(parts) <= len(classes):
            return [
                f"{len(joined):,} of {len(classes):,} class names hold {separator!r} and are made of {len(parts):,} parts, "
                f"such as {shown(joined[0])}: an unsplit list of labels? data.separator says what stands "
                "between them"
            ]
    return []


def _find_overlap(a: SplitCheck, b: SplitCheck) -> Overlap:
    keys_of_a = set(a.manifest.keys)
    keys = [key for key in b.manifest.keys if key in keys_of_a]
    of_a, of_b = a.keys_by_content, b.keys_by_content
    contents = [(of_a[digest][0], of_b[digest][0]) for digest in of_a if digest in of_b]
    return Overlap((a.manifest.split, b.manifest.split), keys, contents)


# The contact sheet: a band for each split, then rows of tiles; all sizes in pixels.
_COLUMNS, _TILE, _GAP, _LINE = 6, 240, 16, 18
_INK, _FAINT, _PAPER = "#202020", "#808080", "white"
_MASK_OPACITY = 0.5


def contact_sheet(check: DataCheck, samples: int, seed: int) -> Image.Image:
    """A picture of random images of each split: boxes, masks, labels (a `?` before an unknown one), and the file's key."""
    rng = np.random.default_rng(seed)
    bands: list[Image.Image] = []
    for name, split in check.splits.items():
        readable = [i for i, digest in enumerate(split.digests) if digest is not None]
        chosen = sorted(rng.permutation(readable)[:samples].tolist())
        bands.append(_title(f"{name}: {len(chosen)} of {len(split.manifest):,} images"))
        for start in range(0, len(chosen), _COLUMNS):
            records = [split.manifest.records[i] for i in chosen[start : start + _COLUMNS]]
            bands.append(_row(records, check.classes, split.manifest.max_pixels))
    height = _GAP + sum(band.height + _GAP for band in bands)
    sheet = Image.new("RGB", (_GAP + _COLUMNS * (_TILE + _GAP), height), _PAPER)
    top = _GAP
    for band in bands:
        sheet.paste(band, (_GAP, top))
        top += band.height + _GAP
    return sheet


def _title(text: str) -> Image.Image:
    band = Image.new("RGB", (_COLUMNS * (_TILE + _GAP) - _GAP, 30), "#e8e8e8")
    write(ImageDraw.Draw(band), (10, 15), fitted(text, band.width - 20, 17), 17, _INK, anchor="lm")
    return band


def _row(records: Sequence[Record], classes: Sequence[str], max_pixels: int) -> Image.Image:
    pictures = [_picture(record, classes, max_pixels) for record in records]
    base = max(picture.height for picture in pictures)
    captions = [_caption(record, classes) for record in records]
    height = base + max(caption.height for caption in captions)
    row = Image.new("RGB", (_COLUMNS * (_TILE + _GAP) - _GAP, height), _PAPER)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = i * (_TILE + _GAP)
        row.paste(picture, (left + (_TILE - picture.width) // 2, base - picture.height))
        row.paste(caption, (left, base))
    return row


def _caption(record: Record, classes: Sequence[str]) -> Image.Image:
    """An image's key and labels, to stand under it."""
    labels = [(classes[c], _colour(c)) for c in record.labels] + [(f"? {classes[c]}", _FAINT) for c in record.unknown]
    words = list(_flow(labels or [("no label", _FAINT)]))
    num_lines = words[-1][0] + 1
    caption = Image.new("RGB", (_TILE, (num_lines + 1) * _LINE + 4), _PAPER)
    draw = ImageDraw.Draw(caption)
    write(draw, (0, 12), fitted(record.key, _TILE, 11, keep_end=True), 11, _FAINT, anchor="lm")
    for line, x, text, colour in words:
        y = _LINE * (line + 1) + 11
        draw.rectangle((x, y - 5, x + 9, y + 4), fill=colour)
        write(draw, (x + 14, y), text, 13, _INK, anchor="lm")
    return caption


def _flow(labels: Sequence[tuple[str, str]]) -> Iterator[tuple[int, int, str, str]]:
    """(line, x, text, colour) of each label, set in lines of a tile's width."""
    line = x = 0
    for text, colour in labels:
        text = fitted(text, _TILE - 14, 13)
        width = 14 + int(length(text, 13))
        if x and x + width > _TILE:
            line, x = line + 1, 0
        yield line, x, text, colour
        x += width + 12


def _picture(record: Record, classes: Sequence[str], max_pixels: int) -> Image.Image:
    """The image, scaled to fit a tile, with its masks and boxes; small ones come last, so that none is hidden."""
    image = Image.fromarray(read_photo(record, max_pixels))
    scale = _TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    boxes = record.boxes
    if boxes is None:
        return image
    corners = boxes.xyxy * (np.array([*size, *size]) - 1)
    area = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    order = np.argsort(-area, kind="stable").tolist()
    image = _tint_masks(image, boxes, order)
    draw = ImageDraw.Draw(image)
    for i in order:
        x1, y1, x2, y2 = corners[i].round().astype(int).tolist()
        c = int(boxes.labels[i])
        colour = _colour(c)
        marks = [word for word, on in (("crowd", boxes.crowd[i]), ("difficult", boxes.difficult[i])) if on]
        name = fitted(" ".join([classes[c], *marks]), _TILE, 10)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white")
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=2)
        # A name would hide a small object; the caption tells what its colour means.
        width = int(length(name, 10)) + 6
        if width <= x2 - x1 and y2 - y1 >= 30:
            draw.rectangle((x1, y1, x1 + width, y1 + 13), fill=colour)
            write(draw, (x1 + 4, y1 + 7), name, 10, "white", anchor="lm")
    return image


def _tint_masks(image: Image.Image, boxes: Boxes, order: Sequence[int]) -> Image.Image:
    """The image with each object's mask, if it has one, tinted in the colour of its class."""
    pixels = np.asarray(image).astype(np.float64)
    for i in order:
        if boxes.segmentation[i] is None:
            continue
        with suppress(InputError):  # a shape that cannot be drawn: its box is, and what else was checked is not lost
            cover = object_cover(boxes.xyxy[i], boxes.segmentation[i], pixels.shape[:2])
            colour = ImageColor.getrgb(_colour(int(boxes.labels[i])))
            pixels += _MASK_OPACITY * cover[:, :, None] * (colour - pixels)
    return Image.fromarray(pixels.round().astype(np.uint8))


def _colour(c: int) -> str:
    """A colour for class c, dark enough for white text; the golden ratio keeps neighbours apart."""
    red, green, blue = colorsys.hsv_to_rgb((c * 0.618034) % 1, 0.85, 0.72)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
