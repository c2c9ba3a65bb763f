"""The one error type that means "what the user gave is wrong", and the check of option ranges that raises it."""

import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

_LONGEST = 600  # characters at each end of a message that is cut


class InputError(ValueError):
    """A config, file, label or checkpoint that cannot be used as given.

    Its message is one line that names the file, key or label and what was expected; the scripts print it without a
    traceback and exit with 2.

    Attributes:
        on_every_rank: of several processes all have raised it, so that one message is enough.
    """

    on_every_rank = False

    def __init__(self, message: str) -> None:
        # What a message repeats of a file may be of any length: its beginning names the file, its end what was expected.
        whole = len(message) <= 2 * _LONGEST
        super().__init__(message if whole else f"{message[:_LONGEST]} ... {message[-_LONGEST:]}")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12


def shown(value: Any) -> str:
    """A value out of a file for an error message: its repr, in which whatever is long is cut."""
    return _SHORT.repr(value)


def listed(names: Sequence[Any], most: int = 40) -> str:
    """Names for an error message, apart by commas; of more than `most` the first ones and how many are left out."""
    texts = [name if len(name) <= 120 else f"{name[:117]}..." for name in map(str, names[:most])]
    return ", ".join(texts) + (f" and {len(names) - most:,} others" if len(names) > most else "")


def describe_os_error(error: OSError) -> str:
    """One line: the file, and what the system said of it."""
    return f"{error.filename}: {error.strerror or error}" if error.filename else f"{error.strerror or error}"


def first_line(error: BaseException) -> str:
    """What another library says is wrong, short enough for one of our lines."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def check_fields(options: object, prefix: str, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Refuse the first option that breaks its rule: (field, whether it holds, what was expected).

    Raises:
        InputError: names the option by `prefix` and field, with what was expected and what was given.
    """
    for name, holds, expected in rules:
        if not holds:
            raise InputError(f"{prefix}{name}: expected {expected}, got {getattr(options, name)!r}")
