"""Files of a data set as bytes, text and JSON: what is wrong with one is an error that names the file and the line."""

import glob
import json
import os
import stat
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mlvision.errors import InputError, printable, shown


def read_bytes(path: str) -> bytes:
    """The file's content.

    Raises:
        InputError: the file cannot be read, or is none: a pipe or a device would be waited for, or never end.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise InputError(f"{printable(path)}: not a valid file name: {error}") from error


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # opening a pipe would wait for its other end
    kind = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # of a folder `open` says so itself
        os.close(descriptor)
        raise OSError("a pipe, socket or device, expected a regular file")
    return descriptor


def read_text(path: str) -> str:
    """The file's text, without a byte-order mark.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8") from error


def read_lines(path: str) -> list[str]:
    """The file's lines without surrounding blanks; entry i is line i + 1.

    Raises:
        InputError: as `read_text`, no line, or an empty line before others: in a list whose rows count, one row too many.
    """
    lines = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if not lines:
        raise InputError(f"{path}: the file is empty")
    if "" in lines:
        raise InputError(f"{path}, line {lines.index('') + 1}: is empty")
    return lines


def read_names(path: str, what: str) -> list[str]:
    """As `read_lines`, for a list whose lines must differ; `what` says in an error what a line is.

    Raises:
        InputError: as `read_lines`, or a line that another repeats.
    """
    lines = read_lines(path)
    check_distinct(lines, path, what, "line")
    return lines


def check_distinct(entries: Sequence[str], path: str, what: str, place: str) -> None:
    """Refuses a list of which one entry repeats another; the error calls an entry `what` and where it stands `place`.

    Raises:
        InputError: names both places, counted from 1.
    """
    first: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        if first.setdefault(entry, number) != number:
            raise InputError(f"{path}, {place} {number}: repeats the {what} {shown(entry)} of {place} {first[entry]}")


def read_json(path: str) -> Any:
    """The parsed file.

    Raises:
        InputError: as `read_text`, not JSON (names line and column), or an object that has a key twice.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
            raise InputError(f"{path}: an object has the key {shown(twice)} twice: expected each key once")
        return entries

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=distinct)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise InputError(f"{path}: lists or objects are nested too deeply to be read") from error
    except InputError:
        raise
    except ValueError as error:  # a number of more digits than Python converts
        raise InputError(f"{path}: a number is too long to be read") from error


def find_split_file(root: str, template: str, split: str, what: str) -> str:
    """The file under `root` that `template` names for a split, by its `{split}`.

    Raises:
        InputError: it is missing; says `what` it would have been, and which splits have one.
    """
    path = os.path.join(root, template.replace("{split}", split))
    if not os.path.isfile(path):
        found = f"; splits there: {list_splits(os.path.join(root, template))}" if "{split}" in template else ""
        raise InputError(f"{path}: no such {what}{found}")
    return path


def list_splits(template: str) -> str:
    """The split names for which `template`, with `{split}` in it, finds a file; in words, for an error."""
    before, after = template.split("{split}", 1)
    matches = sorted(glob.glob(f"{glob.escape(before)}*{glob.escape(after)}"))
    names = [match[len(before) : len(match) - len(after)] for match in matches]
    return ", ".join(name for name in names if name) or "none"
