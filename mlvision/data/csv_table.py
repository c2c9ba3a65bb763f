"""A CSV file with one row an image: a column for each class, or one column of `a;b;c`."""

import csv
import hashlib
import io
import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

from mlvision.data.manifest import DataConfig, Manifest, Record, check_files, check_root
from mlvision.data.text_files import read_text
from mlvision.errors import InputError

# What a cell of a class's column may hold.
_PRESENT, _ABSENT, _UNKNOWN = "1", "0", ("-1", "")
_CELLS = frozenset((_PRESENT, _ABSENT, *_UNKNOWN))


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
    image_column: Annotated[str, "column of file names"] = "image"
    label_column: Annotated[str, "column that holds all labels of an image; empty: each class has its column"] = ""
    separator: Annotated[str, "what stands between the labels of label_column"] = ";"
    ignore_columns: Annotated[list[str], "columns that are not classes"] = field(default_factory=list)
    classes: Annotated[list[str], "class list in order; empty: the header's order, or label_column's labels sorted"] = (
        field(default_factory=list)
    )
    split_column: Annotated[str, "column that names each row's split"] = ""
    split_rule: Annotated[str, "number of an image that chooses its split: file_number or hash (0-99)"] = ""
    splits: Annotated[dict[str, str], "split -> inclusive range of that number, such as train: 0-49"] = field(
        default_factory=dict
    )


def read_csv(config: CsvConfig, split: str) -> Manifest:
    """Reads one split.

    A cell of a class's column holds 1 (present), 0 (absent), or -1 or nothing (unknown). In `label_column` a class
    that is not named is absent, and without `classes` the class list is made from the rows of all splits, so that all
    splits agree on it.

    Raises:
        InputError: file, column, value or split is not as expected; the message names the line.
    """
    source = os.path.join(check_root(config), config.file)
    table = _read_table(source)
    keys = [posixpath.normpath(posixpath.join(config.images, name)) for name in table.column(config.image_column)]
    table.check_distinct(keys, config.image_column)
    split_of, note = _read_splits(config, table, keys)
    if split not in split_of:
        available = sorted({name for name in split_of if name is not None} | set(config.splits))
        missing = "is empty" if split in available else "does not exist"
        raise InputError(f"{source}: split {split!r} {missing}; splits: {', '.join(available)}")
    classes, labels, unknown = (_read_label_column if config.label_column else _read_class_columns)(config, table)

    records = tuple(
        Record(key, os.path.join(config.root, key), labels[i], unknown[i])
        for i, key in enumerate(keys)
        if split_of[i] == split
    )
    check_files(config, records, source)
    left_out = split_of.count(None)
    protocol = f"{config.file}{note}, {len(records):,} of {len(keys):,} rows"
    if left_out:
        protocol += f" ({left_out:,} rows belong to no split)"
    return Manifest(classes, records, split, protocol)


@dataclass(frozen=True)
class _Table:
    """The file's cells; `lines` are the line numbers of the rows."""

    source: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column_index(self, name: str) -> int:
        if name not in self.header:
            raise InputError(f"{self.source}: no column {name!r}; columns: {', '.join(self.header)}")
        return self.header.index(name)

    def column(self, name: str) -> list[str]:
        """The cells of one column, none of them empty."""
        index = self.column_index(name)
        cells = [row[index].strip() for row in self.rows]
        if "" in cells:
            raise self.error(cells.index(""), f"column {name!r} is empty")
        return cells

    def check_distinct(self, values: Sequence[str], name: str) -> None:
        first: dict[str, int] = {}
        for row, value in enumerate(values):
            if first.setdefault(value, row) != row:
                raise self.error(row, f"column {name!r} repeats {value!r} of line {self.lines[first[value]]}")

    def error(self, row: int, message: str) -> InputError:
        return InputError(f"{self.source}, line {self.lines[row]}: {message}")


def _read_table(source: str) -> _Table:
    text = read_text(source)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
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
    header = [name.strip() for name in rows[0]]
    if "" in header or len(set(header)) != len(header):
        raise InputError(f"{source}, line {lines[0]}: column names must be distinct and not empty: {', '.join(header)}")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise InputError(f"{source}, line {line}: {len(row)} fields, the header has {len(header)}")
    return _Table(source, header, rows[1:], lines[1:])


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


_Labels = tuple[tuple[str, ...], list[tuple[int, ...]], list[tuple[int, ...]]]


def _read_class_columns(config: CsvConfig, table: _Table) -> _Labels:
    """Class names, and the present and the unknown classes of each row, from one column a class."""
    for name in config.ignore_columns:
        table.column_index(name)
    others = {config.image_column, config.split_column, *config.ignore_columns}
    columns = [name for name in table.header if name not in others]
    if config.classes:
        foreign = [name for name in columns if name not in config.classes]
        if foreign:
            raise InputError(
                f"{table.source}, line 1: column {foreign[0]!r} is neither in data.classes nor in data.ignore_columns"
            )
        columns = config.classes
    if not columns:
        raise InputError(f"{table.source}: no column is left for a class; columns: {', '.join(table.header)}")
    indices = [table.column_index(name) for name in columns]
    labels, unknown = [], []
    for row, fields in enumerate(table.rows):
        cells = [fields[i].strip() for i in indices]
        if not _CELLS.issuperset(cells):
            bad = next(c for c, cell in enumerate(cells) if cell not in _CELLS)
            raise table.error(
                row, f"column {columns[bad]!r} holds {cells[bad]!r}, expected 1, 0, or -1 or empty (unknown)"
            )
        labels.append(tuple(c for c, cell in enumerate(cells) if cell == _PRESENT))
        unknown.append(tuple(c for c, cell in enumerate(cells) if cell in _UNKNOWN))
    return tuple(columns), labels, unknown


def _read_label_column(config: CsvConfig, table: _Table) -> _Labels:
    """As `_read_class_columns`, from the one column that holds all labels of an image; nothing is unknown."""
    if not config.separator:
        raise InputError("data.separator is empty: expected what stands between the labels, such as ;")
    index = table.column_index(config.label_column)
    named = [{label.strip() for label in row[index].split(config.separator)} - {""} for row in table.rows]
    classes = tuple(config.classes or sorted(set().union(*named)))
    if not classes:
        raise InputError(f"{table.source}: column {config.label_column!r} holds no label")
    class_of = {name: c for c, name in enumerate(classes)}
    for row, labels in enumerate(named):
        foreign = sorted(labels - class_of.keys())
        if foreign:
            raise table.error(row, f"label {foreign[0]!r} is not in the class list: {', '.join(classes)}")
    return classes, [tuple(sorted(class_of[label] for label in labels)) for labels in named], [()] * len(named)
