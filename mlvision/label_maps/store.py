"""The label-map store: one folder of memory-mapped arrays, read a batch at a time, written in blocks that survive a kill.

    meta.json       what the maps are of and how they were made (StoreMeta)
    values.npy      [N, K, h, w] the K best of each cell, highest first; or [N, C, h, w] all classes (top_k = 0)
    ids.npy         [N, K, h, w] their classes: uint16, or uint32 above 65,536 classes; not where top_k = 0
    fill.npy        [N, h, w] float16: what one class that is not stored is worth; not where top_k = 0
    scale.npy       [N, 2] float32: lowest value and step of each image; only where values are uint8
    done.npy        [N] uint8: 1 where the row is whole

N images in the order of the record list, C classes, h x w cells.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from mlvision.errors import InputError, first_line
from mlvision.files import one_line, sync, whole_folder, write_json
from mlvision.space import Groups, has_groups
from mlvision.types import KINDS, LabelMap

FORMAT = "mlvision label maps"
FORMAT_VERSION = 1
DTYPES = ("float16", "uint8")
META = "meta.json"
_ACTIVATION = "activation"  # in meta.json: softmax (one group of all classes), sigmoid (none), or nothing (no logits)
_HIGHEST = float(np.finfo(np.float16).max)
_ROWS_AT_ONCE = 1024  # of a store that is checked as a whole

Rows = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class Geometry:
    """How the teacher saw the images.

    Attributes:
        squash: each axis was resized on its own, so that map and image agree in coordinates from 0 to 1.
        extent: x1, y1, x2, y2 in [0, 1]: the part of every image that the grid covers; None: all of it.
    """

    squash: bool = True
    extent: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class StoreMeta:
    """What the maps of a store are of, and how they were made.

    Attributes:
        record_hash: of the list of images; row i of each array is its i-th.
        class_hash: of the class names in their order.
        teacher: its name, for people; `teacher_hash` tells its weights apart.
        preprocessing: whatever decides the teacher's input (size, interpolation, mean, std, flips, ...), as JSON has it.
        grid: (h, w).
        kind: of the values; see LabelMap.
        groups: of logits: the classes that share a softmax, as the teacher was trained; see `LabelSpace.groups`. (): a
            sigmoid of each.
        top_k: how many classes a cell stores; 0: all.
        block_size: rows of one block; the last may be shorter.
        dtype: of the values on disk: float16, or uint8 with a scale for each image.
        precision: that the teacher computed in.
        approximate: the measured difference between mean map and teacher logits where they are not equal; None: equal.
    """

    record_hash: str
    num_records: int
    class_hash: str
    num_classes: int
    teacher: str
    teacher_hash: str
    grid: tuple[int, int]
    kind: str
    groups: Groups
    top_k: int
    block_size: int
    dtype: str = "float16"
    precision: str = "fp32"
    approximate: float | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)
    geometry: Geometry = Geometry()

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise InputError(f"label maps: expected a {name} of {choices}, got {getattr(self, name)!r}")
        if min(self.num_records, self.num_classes, self.block_size, *self.grid) < 1:
            raise InputError(f"label maps: expected images, classes, cells and rows of a block, got {self}")
        if not 0 <= self.top_k <= self.num_classes:
            raise InputError(f"top_k: expected 0 to the {self.num_classes} classes, got {self.top_k}")
        if self.groups and sum(self.groups) != self.num_classes:
            raise InputError(f"label maps: {self.num_classes} classes in groups of {list(self.groups)}")

    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array, `done` last."""
        n, cells = self.num_records, self.grid
        arrays: dict[str, tuple[tuple[int, ...], str]] = {}
        arrays["values"] = ((n, self.top_k or self.num_classes, *cells), self.dtype)
        if self.top_k:
            arrays["ids"] = ((n, self.top_k, *cells), "uint16" if self.num_classes <= 1 << 16 else "uint32")
            arrays["fill"] = ((n, *cells), "float16")
        if self.dtype == "uint8":
            arrays["scale"] = ((n, 2), "float32")
        return arrays | {"done": ((n,), "uint8")}

    @property
    def hash(self) -> str:
        """sha256 of all of it: the same for stores of the same maps."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """As meta.json has it, lists for tuples.

        Logits of one softmax or of sigmoids have the words of the first stores, so that runs find theirs unchanged.
        """
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        groups = values.pop("groups")
        if self.kind != "logit":
            words = {_ACTIVATION: None}
        elif len(groups) > 1 and has_groups(groups):
            words = {"groups": groups}
        else:
            words = {_ACTIVATION: "softmax" if has_groups(groups) else "sigmoid"}
        return json.loads(json.dumps(values | words))


class LabelMapStore:
    """Label maps on disk. Only the path goes to another process, which maps the files itself on its first read."""

    def __init__(self, path: Path, meta: StoreMeta):
        self.path = path
        self.meta = meta

    @classmethod
    def open(cls, path: Path | str) -> "LabelMapStore":
        """Read what the store is; its arrays are opened by the first read.

        Raises:
            InputError: no store, or one of another format version.
        """
        return cls(Path(path), _read_meta(Path(path)))

    def __len__(self) -> int:
        return self.meta.num_records

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "meta": self.meta}  # a pickled memory map would be a copy of the whole file

    def check(self, *, record_hash: str, class_hash: str, num_records: int) -> None:
        """Refuse a store that does not belong to this list of images and classes, or whose rows are not all there and whole.

        Raises:
            InputError: as `check_belongs` and `check_rows`.
        """
        self.check_belongs(record_hash=record_hash, class_hash=class_hash, num_records=num_records)
        self.check_rows()

    def check_belongs(self, *, record_hash: str, class_hash: str, num_records: int) -> None:
        """Refuse a store that was made for another list of images or classes.

        Raises:
            InputError: names both sides.
        """
        meta = self.meta
        if meta.class_hash != class_hash:
            raise InputError(
                f"{self.path}: made for the class list {meta.class_hash[:12]}, but the data has {class_hash[:12]}"
            )
        if (meta.record_hash, meta.num_records) != (record_hash, num_records):
            raise InputError(
                f"{self.path}: made for the record list {meta.record_hash[:12]} of {meta.num_records:,} images, but the "
                f"data has {record_hash[:12]} of {num_records:,}"
            )

    def check_rows(self) -> None:
        """Refuse a store with rows that are unfinished, or damaged: read once as a whole, so that a student never takes
        NaN for an unknown label or another image's class for its own.

        Raises:
            InputError: how many rows are missing, or the first row with numbers that the writer would have refused.
        """
        arrays, total = self._arrays, len(self)
        undone = int((arrays["done"] != 1).sum())
        if undone:
            raise InputError(
                f"{self.path}: {undone:,} of {total:,} rows are unfinished; make the maps again with the same options to "
                "resume"
            )
        for start in range(0, total, _ROWS_AT_ONCE):
            for name, array in arrays.items():
                bad = _damaged(name, array[start : start + _ROWS_AT_ONCE], self.meta.num_classes)
                if bad.any():
                    what = (
                        f"class ids outside the {self.meta.num_classes} classes" if name == "ids" else "NaN or infinity"
                    )
                    raise InputError(
                        f"{self.path / name}.npy: row {start + int(np.argwhere(bad)[0, 0])} holds {what}; the file is "
                        "damaged, make the maps again in another folder"
                    )

    def read(self, indices: Rows) -> LabelMap:
        """The maps of some rows, in that order; rows may repeat.

        Values are float16 as stored, or float32 where stored as uint8; ids are int16, or int64 above 32,768 classes; the
        fill is float32.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise InputError(f"{self.path}: rows 0 to {len(self) - 1}, asked for {rows.min()} to {rows.max()}")
        # One gather an array: a batch costs little more than one row.
        part = {name: array.take(rows, axis=0) for name, array in self._arrays.items() if name != "done"}
        extent = self.meta.geometry.extent
        return LabelMap(
            values=torch.from_numpy(_decode(part["values"], part.get("scale"))),
            ids=torch.from_numpy(self._signed(part["ids"])) if "ids" in part else None,
            kind=self.meta.kind,
            fill=torch.from_numpy(part["fill"]).float() if "fill" in part else 0.0,  # numpy converts float16 slowly
            extent=None if extent is None else torch.tensor(extent).repeat(len(rows), 1),
            groups=self.meta.groups,
        )

    def _signed(self, ids: np.ndarray) -> np.ndarray:
        # torch knows little of unsigned types. The same bytes, where no id is above int16: a copy costs as much as the read.
        return ids.view(np.int16) if self.meta.num_classes <= 1 << 15 else ids.astype(np.int64)

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        # Plain views: np.memmap's own indexing costs more than a row.
        return {name: array.view(np.ndarray) for name, array in _open_arrays(self.path, self.meta).items()}


class LabelMapWriter:
    """Fills a store in blocks of consecutive rows; block j belongs to rank j mod world_size.

    A block's data is on the disk before its rows are marked as done, and a block with an undone row is made again whole. So
    the store is the same, byte for byte, however often it was interrupted and however many ranks wrote it, if the maps are.
    Nothing is written through a memory map: a full disk is then an error, not a SIGBUS.
    """

    def __init__(self, path: Path, meta: StoreMeta, rank: int = 0, world_size: int = 1):
        self.path = path
        self.meta = meta
        self.rank = rank
        self.world_size = world_size
        self._places = {n: (array.offset, array.strides[0]) for n, array in _open_arrays(path, meta).items()}
        self._next = -1  # the row that goes on with a block half written

    @classmethod
    def create_or_resume(
        cls, path: Path | str, meta: StoreMeta, *, rank: int = 0, world_size: int = 1, timeout: float = 60.0
    ) -> "LabelMapWriter":
        """Open the store of this `meta`, or make an empty one: rank 0 does that, the others wait up to `timeout` seconds.

        Raises:
            InputError: another store is there (names the first difference), or rank 0 made none in time.
        """
        path = Path(path)
        if rank == 0 and not (path / META).is_file():
            _create(path, meta)
        deadline = time.monotonic() + timeout
        while not (path / META).is_file():
            if time.monotonic() > deadline:
                raise InputError(f"{path}: rank {rank} waited {timeout:g} s, but rank 0 made no store there")
            time.sleep(0.05)
        found, wanted = _read_meta(path).to_json(), meta.to_json()
        for key, value in wanted.items():
            if key == "approximate" and None not in (found.get(key), value):
                continue  # measured anew by each process: its last bits depend on threads and device
            if found.get(key) != value:
                raise InputError(
                    f"{path}: {key} is {found.get(key)!r} in the store that is there, but {value!r} was asked for; choose "
                    "another folder or remove it"
                )
        return cls(path, meta, rank, world_size)

    def outstanding(self) -> list[range]:
        """The rows of each block that this rank has yet to make."""
        done = np.array(_open_arrays(self.path, self.meta)["done"])
        starts = range(self.rank * self.meta.block_size, len(done), self.world_size * self.meta.block_size)
        return [block for block in map(self._block, starts) if not (done[block.start : block.stop] == 1).all()]

    def write(
        self,
        rows: Rows,
        values: Float[Tensor, "n K h w"],
        ids: Integer[Tensor, "n K h w"] | None = None,
        fill: Float[Tensor, "n h w"] | None = None,
    ) -> None:
        """Write consecutive rows that start one of this rank's blocks or go on with it; the last of a block marks it done.

        Raises:
            InputError: other rows or shapes, or a row that cannot be stored: it is named.
        """
        first, last = int(rows[0]), int(rows[-1])
        block = self._block(first)
        mine = block.start // self.meta.block_size % self.world_size == self.rank
        whole = np.array_equal(np.asarray(rows), np.arange(first, min(first + len(rows), block.stop)))
        if not (mine and whole and first in (block.start, self._next)):
            raise InputError(
                f"{self.path}: rows {first} to {last} neither start nor go on with a block of rank {self.rank} of "
                f"{self.world_size}, in blocks of {self.meta.block_size} rows"
            )
        given = {"values": values.float(), "ids": ids, "fill": None if fill is None else fill.float()}
        arrays = {name: column.detach().cpu().numpy() for name, column in given.items() if column is not None}
        self._check(arrays, first, len(rows))
        arrays = _encode(arrays, self.meta)
        ends = last + 1 == block.stop
        for name, array in arrays.items():
            self._put(name, first, array, synced=ends)
        self._next = last + 1
        if ends:
            self._put("done", block.start, np.ones(len(block), dtype=np.uint8), synced=True)

    def _block(self, row: int) -> range:
        start = row - row % self.meta.block_size
        return range(start, min(start + self.meta.block_size, self.meta.num_records))

    def _put(self, name: str, row: int, array: np.ndarray, *, synced: bool) -> None:
        file = self.path / f"{name}.npy"
        offset, stride = self._places[name]
        try:
            with open(file, "r+b") as opened:
                opened.seek(offset + row * stride)
                opened.write(array.tobytes())
            if synced:
                sync(file)  # some file systems find room only now
        except OSError as error:
            raise InputError(f"{file}: could not be written ({error.strerror}); finished blocks are kept") from error

    def _check(self, arrays: dict[str, np.ndarray], first: int, num_rows: int) -> None:
        """Refuse rows that the arrays cannot hold, or that a LabelMap does not allow."""
        layout = self.meta.layout()
        expected = {n: (num_rows, *layout[n][0][1:]) for n in ("values", "ids", "fill") if n in layout}
        given = {name: array.shape for name, array in arrays.items()}
        if given != expected:
            raise InputError(f"{self.path}: the store takes {expected}, got {given}")
        names = [name for name in expected if name != "ids"]
        faults = {f"{n} not finite in float16": ~(np.abs(arrays[n]) <= _HIGHEST) for n in names}
        if "ids" in arrays:
            ids, num_classes = arrays["ids"], self.meta.num_classes
            faults[f"class ids outside the {num_classes} classes"] = (ids < 0) | (ids >= num_classes)
            faults["a class twice in one cell"] = np.diff(np.sort(ids, axis=1), axis=1) == 0
            faults["a fill above the least stored value"] = arrays["fill"] > arrays["values"].min(axis=1)
        for fault, where in faults.items():
            if where.any():
                raise InputError(f"{self.path}: row {first + int(np.argwhere(where)[0, 0])}: {fault}")


def _encode(arrays: dict[str, np.ndarray], meta: StoreMeta) -> dict[str, np.ndarray]:
    """As on disk. The fill is at most the least value of its cell as it will be read, not only as it was given."""
    stored = {}
    if meta.dtype == "uint8":
        low, high = (end(arrays["values"], axis=(1, 2, 3)) for end in (np.min, np.max))
        step = (high - low) / np.float32(255)
        each = (slice(None), None, None, None)
        levels = (arrays["values"] - low[each]) / np.where(step > 0, step, 1)[each]
        stored["values"] = np.rint(levels).clip(0, 255).astype(np.uint8)
        stored["scale"] = np.stack([low, step], axis=1)
    else:
        stored["values"] = arrays["values"].astype(np.float16)
    if "ids" in arrays:
        stored["ids"] = arrays["ids"].astype(meta.layout()["ids"][1])
        least = _decode(stored["values"], stored.get("scale")).min(axis=1)
        below = least.astype(np.float16)
        below = np.where(below > least, np.nextafter(below, np.float16(-np.inf)), below)
        stored["fill"] = np.minimum(arrays["fill"].astype(np.float16), below)
    return stored


def _decode(values: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    if scale is None:
        return values
    low, step = scale[:, :, None, None, None].swapaxes(0, 1)
    return values * step + low


def _damaged(name: str, part: np.ndarray, num_classes: int) -> np.ndarray:
    """Where rows of an array hold what the writer would have refused."""
    if name == "ids":
        return part >= num_classes
    if part.dtype == np.float16:  # by its bits, far faster than numpy's own isfinite of it
        return (part.view(np.uint16) & 0x7FFF) >= 0x7C00
    return ~np.isfinite(part) if part.dtype == np.float32 else np.zeros(1, dtype=bool)


def _create(path: Path, meta: StoreMeta) -> None:
    """An empty store, which appears whole; of several processes that try at once, one succeeds."""
    try:
        with whole_folder(path) as folder:
            for name, (shape, dtype) in meta.layout().items():
                file = folder / f"{name}.npy"
                np.lib.format.open_memmap(file, mode="w+", dtype=np.dtype(dtype), shape=shape)  # holes: no blocks yet
                sync(file)
            write_json(folder / META, meta.to_json())
    except OSError as error:
        if not (path / META).is_file():
            raise InputError(f"{path}: the store could not be made there ({error.strerror})") from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 48


def _is_geometry(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("squash")) is not bool or "extent" not in value:
        return False
    extent = value["extent"]
    if extent is None:
        return True
    is_box = isinstance(extent, list) and len(extent) == 4 and all(type(edge) in (int, float) for edge in extent)
    return is_box and 0 <= extent[0] < extent[2] <= 1 and 0 <= extent[1] < extent[3] <= 1


# What the entries of meta.json are, whatever damage has made of them.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("record_hash", "class_hash", "teacher", "teacher_hash", "kind", "dtype", "precision"), (_is_text, "text")
    ),
    **dict.fromkeys(("num_records", "num_classes", "top_k", "block_size"), (_is_whole, "a whole number")),
    "grid": (lambda grid: isinstance(grid, list) and len(grid) == 2 and all(map(_is_whole, grid)), "two whole numbers"),
    _ACTIVATION: (lambda value: value in (None, "softmax", "sigmoid"), "softmax, sigmoid or nothing"),
    "groups": (lambda sizes: isinstance(sizes, list) and all(map(_is_whole, sizes)), "whole numbers"),
    "approximate": (lambda gap: gap is None or type(gap) in (int, float), "a number or nothing"),
    "preprocessing": (lambda names: isinstance(names, dict), "names and values"),
    "geometry": (_is_geometry, "whether the images were squashed and an extent of x1, y1, x2, y2 in [0, 1] or nothing"),
}


def _read_meta(path: Path) -> StoreMeta:
    file = path / META
    if not file.is_file():
        raise InputError(f"{path}: no label-map store ({META} is missing)")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.pop("format"), content.pop("format_version")
        if version != (FORMAT, FORMAT_VERSION):
            raise InputError(f"format {version}, but this code reads {(FORMAT, FORMAT_VERSION)}")
        for name, (fits, expected) in _FIELDS.items():
            if name in content and not fits(content[name]):
                raise InputError(f"expected {expected} as {name}, got {content[name]!r}")
        extent = content["geometry"]["extent"]
        geometry = Geometry(**content.pop("geometry") | {"extent": extent and tuple(extent)})
        groups = tuple(content.pop("groups", ()))
        if content.pop(_ACTIVATION, None) == "softmax":
            groups = (content["num_classes"],)
        return StoreMeta(**content | {"grid": tuple(content["grid"]), "geometry": geometry, "groups": groups})
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: does not describe a label-map store ({first_line(error)})") from error


def _open_arrays(path: Path, meta: StoreMeta) -> dict[str, np.memmap]:
    arrays = {}
    for name, (shape, dtype) in meta.layout().items():
        file = path / f"{name}.npy"
        with one_line(file):
            array = np.lib.format.open_memmap(file, mode="r")
        if (array.shape, array.dtype) != (shape, np.dtype(dtype)):
            raise InputError(f"{file}: holds {array.dtype} {array.shape}, but {META} says {dtype} {shape}")
        if not array.flags.c_contiguous:
            raise InputError(f"{file}: is stored by columns; expected rows, as the writer leaves them")
        arrays[name] = array
    return arrays
