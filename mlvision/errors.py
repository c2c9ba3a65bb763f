"""The one error type that means "what the user gave is wrong", and the check of option ranges that raises it."""

import dataclasses
import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

# What no CSV, log or terminal keeps in one piece: control characters, line separators, and halves of surrogate pairs.
UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MOST_CHARACTERS = 2000  # of a message: lists of names are long, values may be as large as a file


class InputError(ValueError):
    """A config, file, label or checkpoint that cannot be used as given.

    Its message is one line that names the file, key or label and what was expected; the scripts print it without a
    traceback and exit with 2.

    Attributes:
        on_every_rank: of several processes all have raised it, so that one message is enough.
    """

    on_every_rank = False

    def __str__(self) -> str:
        text = " ".join(super().__str__().split())
        half = _MOST_CHARACTERS // 2
        return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12


def shown(value: Any) -> str:
    """A value out of a file for an error message: its repr, in which whatever is long is cut."""
    return _SHORT.repr(value).replace("\n", " ")  # arrays have lines


def listed(names: Sequence[Any], most: int = 40) -> str:
    """Names for an error message, apart by commas; of more than `most` the first ones and how many are left out."""
    texts = [name if len(name) <= 120 else f"{name[:117]}..." for name in map(str, names[:most])]
    return ", ".join(texts) + (f" and {len(names) - most:,} others" if len(names) > most else "")


def printable(text: str) -> str:
    """The text with the escapes of what no line of text can hold: in the name of a file there may be any byte."""
    return UNWRITABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def describe_os_error(error: OSError) -> str:
    """One line: the file, and what the system said of it."""
    return f"{error.filename}: {error.strerror or error}" if error.filename else f"{error.strerror or error}"


def first_line(error: BaseException) -> str:
    """What another library says is wrong, short enough for one of our lines: its first line, or what that announces."""
    first, *rest = map(str.strip, str(error).strip().split("\n"))
    return (rest[0] if rest and first.endswith(":") else first) or type(error).__name__


def check_fields(options: object, prefix: str, rules: Iterable[tuple[str, bool, str]] = ()) -> None:
    """Refuse the first option that is not finite or is a whole number of more than 64 bits, or
    breaks its rule: (field, whether it holds, what was expected).

    Raises:
        InputError: names the option by `prefix` and field, with what was expected and what was given.
    """
    for option in dataclasses.fields(options):  # pyright: ignore[reportArgumentType]
        value = getattr(options, option.name)
        if not _is_sane(value):
            raise InputError(
                f"{prefix}{option.name}: expected finite numbers, whole ones of at most 64 bits, got {shown(value)}"
            )
    for name, holds, expected in rules:
        if not holds:
            raise InputError(f"{prefix}{name}: expected {expected}, got {shown(getattr(options, name))}")


def _is_sane(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_sane, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_sane, value))
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not isinstance(value, float) or math.isfinite(value)
