"""Files, written whole or not at all, and read back without trust: what a file holds is a value or an InputError."""

import argparse
import errno
import fcntl
import io
import json
import math
import os
import re
import shutil
import socket
import stat
import struct
import tokenize
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import torch

from mlvision.errors import InputError, first_line
from mlvision.text_files import read_json

_SPREADSHEET_STARTS = ("=", "+", "-", "@", "\t", "\r")
# What unpacking a damaged zip archive, or parsing the header of an array in it, raises.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    SyntaxError, tokenize.TokenError, ArithmeticError, RuntimeError, MemoryError,
)  # fmt: skip


def is_file_name(name: str) -> bool:
    """Whether a name, which may be empty, names a file or folder in another folder and nothing outside it."""
    return "/" not in name and name not in (".", "..")


def check_out(path: Path | str, suffixes: Sequence[str] = ()) -> Path:
    """Refuse a place, given as `out=`, where no file can be put without loss; for before anything is computed.

    Args:
        suffixes: of the formats that the writer has, in lower case; empty: any.

    Raises:
        InputError: the folder is missing; a device, pipe, link or folder has this name; a suffix that stands for none
            of the formats.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"out: expected a name that ends in {' or '.join(suffixes)}, got {str(path)!r}")
    fault = _fault_of_place(path)
    if fault:
        raise InputError(f"out: {fault}")
    return path


def _fault_of_place(path: Path) -> str:
    """Why no file can be put there; empty when one can."""
    if "\0" in str(path) or not path.name:
        return f"expected the name of a file, got {str(path)!r}"
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    try:
        with suppress(FileNotFoundError):
            os.lstat(_partial(path))
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return ""
    except OSError as error:  # a name that is too long, a folder that may not be entered
        return f"{path}: {error.strerror}"
    if stat.S_ISREG(mode):
        return ""
    return f"{path} is {_kind(mode)}, which would be replaced; expected a file or a new name"


def check_out_folder(path: Path | str, option: str = "out") -> Path:
    """Refuse a place, given by an option, where no folder can be; for before anything is computed. Links are followed.

    Raises:
        InputError: a file, a device or a link that leads to no folder has this name.
    """
    path = Path(path)
    if "\0" in str(path):
        raise InputError(f"{option}: expected the name of a folder, got {str(path)!r}")
    if os.path.lexists(path) and not path.is_dir():
        raise InputError(f"{option}: {path} is {_kind(os.lstat(path).st_mode)}; expected a folder or a new name")
    return path


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFLNK: "a link",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def whole_file(path: Path | str, mode: str = "w", newline: str | None = None) -> Iterator[IO[Any]]:
    """A file that appears at `path` whole, on the disk, once the block is left; after an error nothing has changed.

    Text is UTF-8. A file name's bytes that are not UTF-8 are written as JSON escapes them (`\\udcff`), so that every
    program can read the rest.

    Args:
        mode: w or wb.
        newline: as in `open`; empty for CSV.

    Raises:
        InputError: no file can be put there, as in `check_out`; the disk is full; another process is writing this file.
    """
    path = Path(path)
    fault = _fault_of_place(path)
    if fault:
        raise InputError(fault)
    partial = _partial(path)
    raw = _open_partial(partial, path)
    try:
        with io.BufferedWriter(raw) as buffer:
            file = buffer
            if mode == "w":
                file = io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", newline=newline)
            yield file
            file.flush()
            raw.sync()
            os.replace(partial, path)  # while it is locked: no other process can have taken it for its own
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if raw.failure is None:
            raise
        # Libraries turn it into errors of their own that hide the cause (torch: "unexpected pos"), so it was kept.
        kept = "the previous one is kept" if path.exists() else "nothing was written"
        raise InputError(f"{path}: could not be written ({raw.failure.strerror}); {kept}") from error


def _partial(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(path.name + ".partial")


class _Raw(io.FileIO):
    """A file that remembers why it could not be written."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise

    def sync(self) -> None:
        try:
            os.fsync(self.fileno())
        except OSError as error:  # some file systems find room only now
            self.failure = error
            raise


def _open_partial(partial: Path, path: Path) -> _Raw:
    """The unfinished file, new and locked; what a killed process left there is taken over."""
    while True:
        try:
            raw = _Raw(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")
        except OSError as error:
            raise InputError(f"{path}: could not be written ({partial.name}: {error.strerror})") from error
        try:
            fcntl.lockf(
                raw, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # loader workers, which may outlive this process, inherit flock
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raw.close()
                raise InputError(f"{path}: another process is writing this file; give each its own") from None
            # else a file system without locks
        if partial.exists() and os.path.samestat(os.fstat(raw.fileno()), os.lstat(partial)):
            raw.truncate(0)
            return raw
        raw.close()  # its writer has just moved it into its place


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder that appears at `folder` whole once the block is left, and is filled at the path that is yielded; after an
    error nothing has changed.

    What processes of this host that are gone have left of the same folder is removed first.

    Args:
        replace: another folder that is there is removed at the end.

    Raises:
        OSError: the place is taken, and not to be replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"[^\w-]", "_", socket.gethostname())
    prefix = f".{folder.name}.unfinished-{host}-"
    for left in folder.parent.iterdir():
        number = re.fullmatch(re.escape(prefix) + r"(\d+)-\w+", left.name)
        if number and not is_alive(int(number[1])):
            shutil.rmtree(left, ignore_errors=True)
    path, old = (folder.with_name(f"{prefix}{os.getpid()}-{uuid.uuid4().hex[:8]}") for _ in range(2))
    try:
        path.mkdir()
        yield path
        sync(path)
        if replace and folder.exists():
            os.rename(folder, old)
        os.rename(path, folder)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether a process of this number runs on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; a number that none can have, of which nothing is known
        return True
    return True


def sync(path: Path) -> None:
    """Onto the disk: a file's content, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def spreadsheet_text(text: str) -> str:
    """A cell that a spreadsheet takes for text: one that starts with = + - @, a tab or a return would be a formula there,
    and gets an apostrophe in front. So does one that starts with such an apostrophe already. Reversible: remove one leading
    apostrophe wherever one of these signs follows the apostrophes.

    Source: OWASP, CSV Injection.
    """
    return f"'{text}" if text.lstrip("'").startswith(_SPREADSHEET_STARTS) else text


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Arrays by name as a compressed .npz, whole or not at all.

    Raises:
        InputError: as `whole_file`.
    """
    with whole_file(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_torch(path: Path | str) -> Any:
    """What `torch.save` wrote, onto the CPU: tensors and plain values, numpy's included. No code of the file runs.

    The checksums of the zip format are compared, which torch itself leaves out: it takes a flipped bit for a weight.

    Raises:
        InputError: the file is missing or damaged, or holds other objects.
    """
    try:
        with open(path, "rb") as file:
            is_archive = file.read(4) == b"PK\3\4"
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if is_archive:
        _check_archive(path)
    try:
        with torch.serialization.safe_globals(_plain_classes()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of any kind may have been given, and torch raises whatever they lead it to
        foreign = re.search(r"GLOBAL (\w+(?:\.\w+)+) (?:was not an allowed global|whose module)", str(error))
        if foreign:
            raise InputError(
                f"{path}: holds an object of {foreign[1]}, and reading it would run code; expected tensors and plain "
                "values, as torch.save(model.state_dict(), file) writes them: save those where that class is defined"
            ) from error
        raise InputError(f"{path}: cannot be read, or was cut short ({type(error).__name__})") from error


def _check_archive(path: Path | str) -> None:
    """Refuse an archive that is damaged, or that torch.save did not write."""
    with one_line(path), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch packs nothing. A small file could fill the memory otherwise.
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        damaged = None if packed else archive.testzip()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise InputError(
            f"{path}: holds a TorchScript program; expected weights: save its state_dict() with torch.save"
        )
    if packed:
        raise InputError(f"{path}: {packed[0]!r} is compressed; expected a file that torch.save wrote")
    if damaged is not None:
        raise InputError(
            f"{path}: the file is damaged: the checksum of {damaged!r} does not match; where torch.save wrote it without "
            "checksums (set_crc32_options), load it and save it with them"
        )


@cache
def _plain_classes() -> list[Any]:
    """What training scripts store besides tensors, and what cannot run code: numbers and arrays of numpy, options, paths."""
    makers = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
    numbers = {type(np.dtype(code)) for code in (*np.typecodes["All"],) if code not in "OV"}
    # numpy's modules have moved: files name them as they were.
    moved = [(maker, f"numpy.{core}.multiarray.{name}") for name, maker in makers.items() for core in ("core", "_core")]
    return [np.dtype, np.ndarray, *numbers, *moved, argparse.Namespace, SimpleNamespace, PosixPath]


class StoredArray:
    """An array of a .npz whose shape and dtype are known before any of it is unpacked: a small file may hold a huge one.

    Attributes:
        shape: as the array's header has it.
        dtype: likewise; never of Python objects.
    """

    def __init__(self, path: Path | str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo):
        self._path, self._archive, self._entry = path, archive, entry
        with one_line(path), archive.open(entry) as file:
            read = np.lib.format.read_array_header_1_0
            if np.lib.format.read_magic(file) != (1, 0):
                read = np.lib.format.read_array_header_2_0
            self.shape, self._by_column, self.dtype = read(file)
            self._start = file.tell()
        if self.dtype.hasobject:
            raise InputError(f"{path}: {entry.filename} holds Python objects, and reading them would run code")
        if self._start + math.prod(self.shape) * self.dtype.itemsize != entry.file_size:
            raise InputError(f"{path}: {entry.filename} holds {entry.file_size:,} bytes, its header promises others")

    def read(self) -> np.ndarray:
        """All of it.

        Raises:
            InputError: it is damaged.
        """
        with one_line(self._path), self._archive.open(self._entry) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def blocks(self, num_rows: int) -> Iterator[np.ndarray]:
        """Its rows in order, so many at a time: memory does not grow with the array, unless it is stored by columns.

        Raises:
            InputError: it is damaged.
        """
        if self._by_column:
            whole = self.read()
            yield from (whole[start : start + num_rows] for start in range(0, len(whole), num_rows))
            return
        row = math.prod(self.shape[1:])
        with self._archive.open(self._entry) as file:
            with one_line(self._path):
                file.read(self._start)
            for start in range(0, self.shape[0], num_rows):
                count = min(num_rows, self.shape[0] - start)
                with one_line(self._path):
                    block = np.frombuffer(file.read(count * row * self.dtype.itemsize), self.dtype, count * row)
                yield block.reshape(count, *self.shape[1:])


@contextmanager
def open_arrays(path: Path | str) -> Iterator[dict[str, StoredArray]]:
    """The arrays of a .npz by name, none of them unpacked yet.

    Raises:
        InputError: the file is missing or damaged.
    """
    with one_line(path):
        archive = zipfile.ZipFile(path)
    with archive:
        yield {e.filename.removesuffix(".npy"): StoredArray(path, archive, e) for e in archive.infolist()}


@contextmanager
def one_line(path: Path | str) -> Iterator[None]:
    """What damaged bytes lead other libraries to, as one line that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except _DAMAGED as error:
        raise InputError(f"{path}: the file is damaged, or was cut short ({first_line(error)})") from error


def read_written(path: Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    values = read_json(str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected names and values, as it was written")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write strict JSON, NaN as null, whole or not at all; infinity would be a fault and is refused."""
    text = json.dumps(_without_nan(values), indent=2, allow_nan=False)
    with whole_file(path) as file:
        file.write(text + "\n")


def _without_nan(value: Any) -> Any:
    """NaN as None: strict JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
