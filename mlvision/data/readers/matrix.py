"""A published matrix of labels, N images x C classes: .npy, .npz, or text with a row for each image."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float64, Shaped

from mlvision.data.manifest import Manifest, image_key
from mlvision.data.readers.base import DataConfig, check_files, check_root
from mlvision.data.records import LabelLists, Records
from mlvision.errors import InputError, listed, shown
from mlvision.files import one_line, open_arrays
from mlvision.text_files import check_distinct, find_split_file, read_lines, read_names

# What the numbers of a matrix mean, by name.
VALUES = {
    "binary": "1 present, 0 absent",
    "partial": "1 present, 0 absent, -1 or NaN unknown",
    "ternary": "1 present, -1 absent, 0 unknown",
    "positive": "above 0 present, all else absent",
}


_LONGEST = 4 * 4096  # bytes of an image's name in an array of text, four a letter; systems have no longer paths


@dataclass(frozen=True)
class MatrixConfig(DataConfig):
    """A label matrix, the names of its rows, and a folder of images."""

    name: Annotated[str, "which reader: a key of DATASETS"] = "matrix"
    labels: Annotated[str, "matrix file under root: .npy, .npz or .txt; {split} is the split's name"] = "{split}.txt"
    labels_array: Annotated[str, "array of a .npz that holds the matrix; empty: its only array"] = ""
    names: Annotated[str, "file of image names in the rows' order; empty: first column of a .txt"] = ""
    names_array: Annotated[str, "array of a .npz that holds the names; empty: its only array"] = ""
    images: Annotated[str, "folder under root to which the names are relative"] = "."
    classes: Annotated[str, "file of class names under root, a line for each column; empty: class 0, class 1, ..."] = ""
    values: Annotated[str, f"what numbers mean: {'; '.join(f'{k} ({v})' for k, v in VALUES.items())}"] = "binary"

    def read(self, split: str) -> Manifest:
        """Reads one split.

        A matrix does not say what its columns are: name the classes with a file. The order of the field's lists differs:
        those of the hashing papers have COCO's classes in alphabetical order, not by category id. Pickled arrays are not
        loaded.

        Raises:
            InputError: a file is missing or of another shape, the numbers of rows and names differ, or a number is not among
                those that `values` names; the message names file and row.

        Source: such files are published by, among others, Cole et al., "Multi-Label Learning from Single Positive Labels",
        CVPR 2021 (.npy: labels and image names), Liu et al., "Query2Label", 2021 (.npy, above 0 is present), and Cao et al.,
        "HashNet", ICCV 2017 (text lists).
        """
        if self.values not in VALUES:
            raise InputError(f"data.values={self.values}: expected one of {', '.join(VALUES)}")
        root = check_root(self)
        source = find_split_file(root, self.labels, split, "file")
        is_array = source.endswith((".npy", ".npz"))
        if is_array and not self.names:
            raise InputError(f"data.names is not set: {source} holds no image names; give the file that does")
        names_source = find_split_file(root, self.names, split, "file") if self.names else source
        matrix, own_names = (None, None) if is_array else _read_text_matrix(source, with_names=not self.names)
        names = _read_image_names(names_source, self.names_array) if self.names else own_names or []

        def classes_of(shape: tuple[int, ...], dtype: np.dtype) -> tuple[str, ...]:
            if len(shape) != 2 or dtype.kind not in "biuf" or 0 in shape:
                raise InputError(f"{source}: expected numbers [images, classes], got {dtype} {shape}")
            if shape[0] != len(names):
                raise InputError(f"{source}: has {shape[0]:,} rows, {names_source} names {len(names):,} images")
            return _class_names(os.path.join(root, self.classes) if self.classes else "", shape[1], source)

        if matrix is None:
            matrix = _load_array(source, self.labels_array, "labels_array", classes_of)
        classes = classes_of(matrix.shape, matrix.dtype)

        present, unknown = _meaning(matrix, self.values, source)
        keys = [image_key(self.images, name) for name in names]
        check_distinct(keys, names_source, "image", "row")
        records = Records.under(root, keys, _lists(present), _lists(unknown))
        check_files(self, records, names_source)
        protocol = (
            f"{os.path.basename(source)}, {len(records):,} images x {len(classes)} classes, "
            f"{int(present.sum()):,} labels ({VALUES[self.values]}), sha256 {_digest(source)}"
        )
        return Manifest(classes, records, split, protocol)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _load_array(
    path: str, key: str, option: str, check: Callable[[tuple[int, ...], np.dtype], object]
) -> Shaped[np.ndarray, "..."]:
    """The array of a .npy, or one of a .npz, which is unpacked after `check` has let its shape and dtype pass: a small file
    may hold an array that fills the memory."""
    if path.endswith(".npy"):
        with one_line(path):
            array = np.lib.format.open_memmap(path, mode="r")
        check(array.shape, array.dtype)
        return np.array(array)
    with open_arrays(path) as arrays:
        if key and key not in arrays:
            raise InputError(f"data.{option}={key}: {path} holds {listed(list(arrays)) or 'no array'}")
        if not key and len(arrays) != 1:
            raise InputError(f"data.{option} is not set: {path} holds {listed(list(arrays)) or 'no array'}")
        stored = arrays[key or next(iter(arrays))]
        check(stored.shape, stored.dtype)
        return stored.read()


def _read_text_matrix(path: str, with_names: bool) -> tuple[Float64[np.ndarray, "N C"], list[str] | None]:
    """Numbers apart by blanks or commas, behind an image name where `with_names`; and the names."""
    rows = [line.replace(",", " ").split() for line in read_lines(path)]
    first = int(with_names)
    num_columns = len(rows[0]) - first
    for number, row in enumerate(rows, start=1):
        if len(row) - first != num_columns or num_columns < 1:
            raise InputError(
                f"{path}, line {number}: {len(row)} fields, expected {'an image name and ' if with_names else ''}"
                f"{max(num_columns, 1)} numbers"
            )
    try:
        matrix = np.array([row[first:] for row in rows], dtype=np.float64)
    except ValueError:
        number, field = next((n, f) for n, row in enumerate(rows, start=1) for f in row[first:] if not _is_number(f))
        raise InputError(f"{path}, line {number}: {shown(field)} is not a number") from None
    return matrix, [row[0] for row in rows] if with_names else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_image_names(path: str, key: str) -> list[str]:
    if not path.endswith((".npy", ".npz")):
        return read_lines(path)

    def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
        if len(shape) != 1 or dtype.kind not in "US":
            raise InputError(f"{path}: expected a list of texts, got {dtype} {shape}")
        if dtype.itemsize > _LONGEST:
            raise InputError(
                f"{path}: a name of an image has up to {dtype.itemsize:,} bytes; expected at most {_LONGEST:,}"
            )

    names = _load_array(path, key, "names_array", check)
    return [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names]


def _class_names(path: str, num_classes: int, source: str) -> tuple[str, ...]:
    if not path:
        return tuple(f"class {c}" for c in range(num_classes))
    classes = read_names(path, "class")
    if len(classes) != num_classes:
        raise InputError(f"{source}: has {num_classes} columns, {path} names {len(classes)} classes")
    return tuple(classes)


def _lists(entries: Shaped[np.ndarray, "N C"]) -> LabelLists:
    images, labels = np.nonzero(entries)
    return LabelLists.of_pairs(images, labels, len(entries))


def _meaning(
    matrix: Shaped[np.ndarray, "N C"], values: str, source: str
) -> tuple[Shaped[np.ndarray, "N C"], Shaped[np.ndarray, "N C"]]:
    """Which entries are present, which unknown."""
    nothing = np.zeros(matrix.shape, dtype=bool)
    if values == "positive":
        present, absent, unknown = matrix > 0, matrix <= 0, nothing
    elif values == "ternary":
        present, absent, unknown = matrix == 1, matrix == -1, matrix == 0
    else:
        present, absent = matrix == 1, matrix == 0
        unknown = (matrix == -1) | (matrix != matrix) if values == "partial" else nothing
    understood = present | absent | unknown
    if not understood.all():
        row, column = np.argwhere(~understood)[0].tolist()
        raise InputError(
            f"{source}, row {row + 1}, column {column + 1} of the numbers: {matrix[row, column]:g}, "
            f"expected {VALUES[values]} (data.values={values})"
        )
    return present, unknown
