"""A CSV file: a row per image with a column for each class or one column of `a;b;c`, or a row per image and label."""

import csv
import hashlib
import io
import math
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

import numpy as np
from jaxtyping import Int64

from mlvision.data.images import SUFFIXES
from mlvision.data.manifest import Manifest, check_groups, image_key
from mlvision.data.readers.base import DataConfig, check_files, check_root
from mlvision.data.records import LabelLists, Records
from mlvision.errors import InputError, listed, shown
from mlvision.text_files import read_text

ROWS = ("image", "label")
MEANINGS = ("present", "absent", "unknown")
# What a cell of a class's column means, as `_normal` writes it; `data.cells` adds to these.
CELLS = {
    **dict.fromkeys(("1", "true", "yes"), "present"),
    **dict.fromkeys(("0", "false", "no"), "absent"),
    **dict.fromkeys(("-1", "nan", ""), "unknown"),
}
_DELIMITERS = (",", ";", "\t", "|")
_DELIMITER_NAMES = {"tab": "\t", "\\t": "\t"}


def file_number(key: str) -> int | None:
    """The last number in the file's stem: `images/beach14.jpg` -> 14; None where there is none."""
    numbers = re.findall(r"\d+", posixpath.splitext(posixpath.basename(key))[0])
    return int(numbers[-1]) if numbers else None


def hash_percent(key: str) -> int:
    """A number in 0..99 that depends on the key alone: a split that stays when images are added or sorted."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()) % 100


SPLIT_RULES: dict[str, Callable[[str], int | None]] = {"file_number": file_number, "hash": hash_percent}


@dataclass(frozen=True)
class CsvConfig(DataConfig):
    """A CSV file and a folder of images. Without a split column or rule, its one split is called `all`."""

    name: Annotated[str, "which reader: a key of DATASETS"] = "csv"
    file: Annotated[str, "the CSV file under root"] = "labels.csv"
    images: Annotated[str, "folder under root to which the image column is relative"] = "."
    delimiter: Annotated[str, "what stands between the columns, such as ; or tab; empty: recognised in the header"] = ""
    rows: Annotated[str, "image: a row per image; label: a row per image and label, which label_column holds"] = "image"
    image_column: Annotated[str, "column of file names; one without a suffix is looked up by its stem"] = "image"
    label_column: Annotated[str, "column that holds all labels of an image; empty: each class has its column"] = ""
    separator: Annotated[str, "what stands between the labels of label_column"] = ";"
    cells: Annotated[
        dict[str, str],
        "class columns: text of a cell (`empty` for none) -> present, absent or unknown, besides 1 true yes, 0 false no, "
        "-1 nan empty",
    ] = field(default_factory=dict)
    ignore_columns: Annotated[list[str], "columns that are not classes"] = field(default_factory=list)
    classes: Annotated[list[str], "class list in order; empty: the header's order, or label_column's labels sorted"] = (
        field(default_factory=list)
    )
    groups: Annotated[
        list[int],
        "sizes of groups of consecutive classes of which each image shows exactly one, such as [5,5]; empty: no class "
        "excludes another",
    ] = field(default_factory=list)
    split_column: Annotated[str, "column that names each row's split"] = ""
    split_rule: Annotated[str, "number of an image that chooses its split: file_number or hash (0-99)"] = ""
    splits: Annotated[dict[str, str], "split -> inclusive range of that number, such as train: 0-49"] = field(
        default_factory=dict
    )

    def read(self, split: str) -> Manifest:
        """Reads one split.

        A cell of a class's column holds 1, true or yes (present), 0, false or no (absent), or -1, nan or nothing (unknown),
        in capitals or not; a number may have a point (1.0), and `cells` says what others mean. In `label_column` a class
        that is not named is absent, and without `classes` the class list is made from the rows of all splits, so that all
        splits agree on it. A column without a name, such as an index that pandas wrote, is left out.

        A file name without an image's suffix stands for the one image file of that stem, so rows that name an image with
        and without its suffix are rows of one image; if files are not looked for (`check_files`), the name stays as it is.
        A split rule looks at the name as the file has it.

        Raises:
            InputError: file, column, value or split is not as expected; the message names the line.
        """
        if self.rows not in ROWS:
            raise InputError(f"data.rows={self.rows}: expected one of {', '.join(ROWS)}")
        if self.rows == "label" and not self.label_column:
            raise InputError(
                "data.label_column is not set: data.rows=label needs the column that holds the label of a row"
            )
        root = check_root(self)
        source = os.path.join(root, self.file)
        table, notes = _read_table(source, self)
        named = [image_key(self.images, name) for name in table.column(self.image_column)]
        split_of, rule = _read_splits(self, table, named)
        if split not in split_of:
            raise _no_such_split(self, table, split, split_of)
        files_of = _files_by_stem(root, named) if self.check_files else {}
        keys = [files_of[name][0] if len(files_of.get(name, ())) == 1 else name for name in named]
        image_of, first_rows = _group_rows(self, table, keys, split_of)
        classes, present, unknown = (_read_label_column if self.label_column else _read_class_columns)(self, table)
        chosen = [row for row in first_rows.tolist() if split_of[row] == split]
        chosen_keys = [keys[row] for row in chosen]
        for key in chosen_keys:
            if key in files_of:
                raise InputError(
                    f"{source}: image {shown(key)} has no suffix, and several files fit: {listed(files_of[key])}"
                )

        place = np.full(len(first_rows), -1, dtype=np.int64)
        place[image_of[chosen]] = np.arange(len(chosen))
        place_of = place[image_of]  # of each row's image among the chosen ones, -1 if it is none
        labels, num_repeats = _of_images(present, place_of, len(chosen))
        records = Records.under(root, chosen_keys, labels, _of_images(unknown, place_of, len(chosen))[0])
        check_files(self, records, source)
        left_out = sum(split_of[row] is None for row in first_rows.tolist())
        what = "rows" if self.rows == "image" else "images"
        protocol = f"{self.file}{rule}, {len(chosen):,} of {len(first_rows):,} {what}"
        if left_out:
            protocol += f" ({left_out:,} {what} belong to no split)"
        if num_repeats:
            notes.append(f"{num_repeats:,} labels that stand twice for an image count once")
        if self.groups:
            notes.append(f"one class of each of {len(self.groups)} groups")
        manifest = Manifest(classes, records, split, ", ".join([protocol, *notes]), groups=tuple(self.groups))
        check_groups(manifest, source)
        return manifest


def _no_such_split(config: CsvConfig, table: "_Table", split: str, split_of: Sequence[str | None]) -> InputError:
    names = sorted({name for name in split_of if name is not None} | set(config.splits))
    message = f"{table.source}: split {shown(split)} {'is empty' if split in names else 'does not exist'}"
    naming = [name for i, name in enumerate(table.header) if any(row[i].strip() == split for row in table.rows)]
    hint = f"; column {naming[0]!r} holds it: set data.split_column={naming[0]}" if naming else ""
    return InputError(f"{message}; splits: {listed(names)}{hint}")


def _group_rows(
    config: CsvConfig, table: "_Table", keys: Sequence[str], split_of: Sequence[str | None]
) -> tuple[Int64[np.ndarray, " R"], Int64[np.ndarray, " I"]]:
    """The image of each row, and the first row of each image; with `rows=image` an image has one row."""
    image = table.column_index(config.image_column)
    number_of: dict[str, int] = {}
    image_of = np.array([number_of.setdefault(key, len(number_of)) for key in keys], dtype=np.int64)
    _, first_rows = np.unique(image_of, return_index=True)
    first_of = first_rows[image_of]
    repeated = np.flatnonzero(first_of != np.arange(len(keys)))
    for row, first in zip(repeated.tolist(), first_of[repeated].tolist(), strict=True):
        repeats = f"column {config.image_column!r} repeats {shown(keys[row])} of line {table.lines[first]}"
        here, there = (table.rows[i][image].strip() for i in (row, first))
        if here != there:
            repeats += f" ({shown(here)} and {shown(there)} are one image)"
        if config.rows == "image":
            hint = "; data.rows=label reads a row per image and label" if config.label_column else ""
        elif split_of[row] != split_of[first]:
            hint = f" with another split: {split_of[row]} instead of {split_of[first]}"
        else:
            continue
        raise table.error(row, repeats + hint)
    return image_of, first_rows


def _of_images(pairs: "_Pairs", place_of: Int64[np.ndarray, " R"], num_images: int) -> tuple[LabelLists, int]:
    """The classes of each image, by its place, from pairs of a row and a class; and how many pairs repeat others."""
    rows, classes = pairs
    places = place_of[rows]
    is_chosen = places >= 0
    lists = LabelLists.of_pairs(places[is_chosen], classes[is_chosen], num_images)
    return lists, int(is_chosen.sum() - lists.lengths(range(num_images)).sum())


def _files_by_stem(root: str, keys: Iterable[str]) -> dict[str, list[str]]:
    """The image files with the stem of each key that has no image's suffix and is no file itself."""
    stems = {key for key in keys if not _is_image(key)}
    files_of: dict[str, list[str]] = {}
    for folder in {posixpath.dirname(key) for key in stems}:
        path = os.path.join(root, folder)
        for name in sorted(os.listdir(path)) if os.path.isdir(path) else ():
            key = posixpath.join(folder, name)
            stems.discard(key)
            if _is_image(name):
                files_of.setdefault(posixpath.splitext(key)[0], []).append(key)
    return {stem: files_of[stem] for stem in stems if stem in files_of}


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in SUFFIXES


@dataclass(frozen=True)
class _Table:
    """The file's cells; `lines` are the line numbers of the rows."""

    source: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column_index(self, name: str) -> int:
        if name not in self.header:
            raise InputError(f"{self.source}: no column {shown(name)}; columns: {listed(self.header)}")
        return self.header.index(name)

    def column(self, name: str) -> list[str]:
        """The cells of one column, none of them empty."""
        index = self.column_index(name)
        cells = [row[index].strip() for row in self.rows]
        if "" in cells:
            raise self.error(cells.index(""), f"column {name!r} is empty")
        return cells

    def error(self, row: int, message: str) -> InputError:
        return InputError(f"{self.source}, line {self.lines[row]}: {message}")


def _read_table(source: str, config: CsvConfig) -> tuple[_Table, list[str]]:
    """The table, and notes on what of the file is not in it."""
    text = read_text(source)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=_delimiter(config, text))
    rows, lines = [], []
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{source}, line {reader.line_num}: {error}") from error
    if len(rows) < 2:
        raise InputError(f"{source}: expected a header and at least one row")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(rows[0]):
            raise InputError(f"{source}, line {line}: {len(row)} fields, the header has {len(rows[0])}")
    header = [name.strip() for name in rows[0]]
    nameless = [i for i, name in enumerate(header) if not name]
    for i in reversed(nameless):
        for row in (header, *rows):
            del row[i]
    if len(set(header)) != len(header):
        raise InputError(f"{source}, line {lines[0]}: column names must differ from each other: {listed(header)}")
    notes = [f"{len(nameless)} columns without a name left out"] if nameless else []
    return _Table(source, header, rows[1:], lines[1:]), notes


def _delimiter(config: CsvConfig, text: str) -> str:
    """What stands between the columns: the option, or what makes the image column one of the most columns of the header."""
    if config.delimiter:
        delimiter = _DELIMITER_NAMES.get(config.delimiter, config.delimiter)
        if len(delimiter) != 1 or delimiter in '"\r\n':
            raise InputError(f"data.delimiter={shown(config.delimiter)}: expected one character, or tab")
        return delimiter

    def header(delimiter: str) -> list[str]:
        reader = csv.reader(io.StringIO(text.lstrip("\r\n"), newline=""), delimiter=delimiter)
        try:
            return [name.strip() for name in next(reader, [])]
        except csv.Error:
            return []

    fitting = [delimiter for delimiter in _DELIMITERS if config.image_column in header(delimiter)]
    return max(fitting, key=lambda delimiter: len(header(delimiter)), default=",")


def _read_splits(config: CsvConfig, table: _Table, keys: Sequence[str]) -> tuple[list[str | None], str]:
    """The split of each row, None for a row of no split; and the rule in words, for the protocol."""
    if config.split_column and config.split_rule:
        raise InputError("data.split_column and data.split_rule exclude each other: set one of them")
    if config.split_column:
        return list(table.column(config.split_column)), f", column {config.split_column}"
    if not config.split_rule:
        return ["all"] * len(keys), ""
    if config.split_rule not in SPLIT_RULES:
        raise InputError(f"data.split_rule={config.split_rule}: expected one of {', '.join(SPLIT_RULES)}")
    split_of_number = _read_ranges(config.splits)
    split_of: list[str | None] = []
    for row, key in enumerate(keys):
        number = SPLIT_RULES[config.split_rule](key)
        if number is None:
            raise table.error(row, f"{key!r} holds no number, which split_rule={config.split_rule} needs")
        split_of.append(next((name for name, numbers in split_of_number.items() if number in numbers), None))
    ranges = ", ".join(f"{name} {numbers}" for name, numbers in config.splits.items())
    return split_of, f", split by {config.split_rule} ({ranges})"


def _read_ranges(splits: Mapping[str, str]) -> dict[str, range]:
    """`{"train": "0-49"}` -> `{"train": range(0, 50)}`; the ranges must not overlap."""
    if not splits:
        raise InputError("data.splits is empty: data.split_rule needs ranges, such as data.splits.train=0-49")
    ranges = {}
    for name, text in splits.items():
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
        if match is None or int(match[1]) > int(match[2]):
            raise InputError(f"data.splits.{name}={text}: expected a range such as 0-49")
        ranges[name] = range(int(match[1]), int(match[2]) + 1)
    in_order = sorted(ranges, key=lambda name: ranges[name].start)
    for a, b in pairwise(in_order):
        if ranges[b].start < ranges[a].stop:
            raise InputError(f"data.splits: {a} ({splits[a]}) and {b} ({splits[b]}) overlap")
    return ranges


def _normal(cell: str) -> str:
    """A cell as `CELLS` has it: `1.0`, ` 1 ` and `1` are one, as `2.0` and `2` are, and so are `True` and `true`."""
    text = cell.strip().lower()
    try:
        number = float(text)
    except ValueError:
        return text
    if math.isnan(number):
        return "nan"
    return str(int(number)) if number.is_integer() else text


def _meanings(config: CsvConfig) -> dict[str, str]:
    """What each text of a cell means."""
    meanings = dict(CELLS)
    for cell, meaning in config.cells.items():
        if meaning not in MEANINGS:
            raise InputError(f"data.cells.{cell}={shown(meaning)}: expected one of {', '.join(MEANINGS)}")
        meanings["" if cell == "empty" else _normal(cell)] = meaning
    return meanings


# A row and a class each.
_Pairs = tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]


def _read_class_columns(config: CsvConfig, table: _Table) -> tuple[tuple[str, ...], _Pairs, _Pairs]:
    """Class names, and the pairs of a row and a class that is present or unknown there, from one column a class."""
    for name in config.ignore_columns:
        table.column_index(name)
    others = {config.image_column, config.split_column, *config.ignore_columns}
    columns = [name for name in table.header if name not in others]
    if config.classes:
        foreign = [name for name in columns if name not in config.classes]
        if foreign:
            raise InputError(
                f"{table.source}, line 1: column {shown(foreign[0])} is neither in data.classes nor in data.ignore_columns"
            )
        columns = config.classes
    if not columns:
        raise InputError(f"{table.source}: no column is left for a class; columns: {listed(table.header)}")
    indices = [table.column_index(name) for name in columns]
    meanings = _meanings(config)
    cells = list(zip(*table.rows, strict=True))
    number = {**{meaning: i for i, meaning in enumerate(MEANINGS)}, None: len(MEANINGS)}
    number_of = {cell: number[meanings.get(_normal(cell))] for cell in set().union(*(cells[i] for i in indices))}
    numbers = np.stack(
        [np.frombuffer(bytes(map(number_of.__getitem__, cells[i])), dtype=np.uint8) for i in indices], axis=1
    )
    if (numbers == number[None]).any():
        row, bad = np.argwhere(numbers == number[None])[0].tolist()
        raise table.error(row, _no_meaning(config, columns[bad], table.rows[row][indices[bad]]))
    present, unknown = (np.nonzero(numbers == number[meaning]) for meaning in ("present", "unknown"))
    return tuple(columns), (present[0], present[1]), (unknown[0], unknown[1])


def _no_meaning(config: CsvConfig, name: str, cell: str) -> str:
    expected = "expected 1, 0, or -1 or empty (unknown)"
    hint = f"map other values with data.cells, or exclude the column with data.ignore_columns=[{name}]"
    if cell.strip() in (config.train, config.val, config.test):
        hint = f"if it names the split, set data.split_column={name}"
    return f"column {shown(name)} holds {shown(cell.strip())}, {expected}; {hint}"


def _read_label_column(config: CsvConfig, table: _Table) -> tuple[tuple[str, ...], _Pairs, _Pairs]:
    """As `_read_class_columns`, from the one column that holds the labels of a row; one may stand there twice.

    Nothing is unknown. With `rows=label` a cell is one label, whatever it holds.
    """
    if not config.separator:
        raise InputError("data.separator is empty: expected what stands between the labels, such as ;")
    index = table.column_index(config.label_column)
    cells = [row[index] for row in table.rows]
    names_of = {
        cell: [name.strip() for name in (cell.split(config.separator) if config.rows == "image" else [cell])]
        for cell in set(cells)
    }
    classes = tuple(config.classes or sorted(set().union(*names_of.values()) - {""}))
    if not classes:
        raise InputError(f"{table.source}: column {config.label_column!r} holds no label")
    class_of = {name: c for c, name in enumerate(classes)}
    foreign = {cell: name for cell in names_of for name in reversed(names_of[cell]) if name and name not in class_of}
    if foreign:
        row = next(row for row, cell in enumerate(cells) if cell in foreign)
        raise table.error(row, f"label {shown(foreign[cells[row]])} is not in the class list: {listed(classes)}")
    classes_of = {cell: [class_of[name] for name in names if name] for cell, names in names_of.items()}
    rows = np.repeat(np.arange(len(cells)), [len(classes_of[cell]) for cell in cells])
    labels = np.array([c for cell in cells for c in classes_of[cell]], dtype=np.int64)
    return classes, (rows, labels), (rows[:0], labels[:0])
