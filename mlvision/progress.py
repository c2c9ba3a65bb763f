"""How far a long piece of work has come: a bar where stderr is a terminal, else a line every half minute."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_LINE_EVERY = 30.0  # seconds


class Progress:
    """Counts what is done of `total` and shows it on stderr.

    Args:
        what: is done, such as `label maps`.
        unit: of what is counted, in the plural.
        done: how much of `total` was done before.
        more: how many units follow after this piece: they count for the time that is left.
        images: of each unit, where it is not images that are counted.
        shown: false: nothing is shown, as on ranks above 0.
    """

    def __init__(
        self,
        total: int,
        what: str,
        unit: str = "images",
        *,
        done: int = 0,
        more: int = 0,
        images: int = 1,
        shown: bool = True,
    ) -> None:
        at_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=done, desc=what, unit=f" {unit}", leave=False, disable=not (shown and at_terminal)
        )
        self._lines = shown and not at_terminal
        self._total, self._what, self._unit, self._more, self._images = total, what, unit, more, images
        self._done = self._before = done
        self._note = ""
        self._started = self._said = time.monotonic()

    def update(self, num: int = 1) -> None:
        self._done += num
        self._bar.update(num)
        if self._lines and time.monotonic() - self._said >= _LINE_EVERY:
            self._said = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Show this with all that follows, such as a loss."""
        self._note = text
        self._bar.set_postfix_str(text, refresh=False)

    def line(self) -> str:
        rate = (self._done - self._before) / max(time.monotonic() - self._started, 1e-9)
        left = (self._total - self._done + self._more) / rate if rate else float("inf")
        parts = [f"{self._done:,} of {self._total:,} {self._unit}"]
        parts += [self._note] if self._note else []
        speed = rate * self._images
        parts += [f"{speed:.0f} images/s" if speed >= 10 else f"{speed:.2g} images/s"] if speed else []
        return f"{self._what}: {', '.join([*parts, f'{duration(left)} left'])}"

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def track(
    work: Iterable[T], total: int, what: str, unit: str = "images", *, images: int = 1, shown: bool = True
) -> Iterator[T]:
    """The items of `work`, each one of `total` units, with their progress shown; arguments as of Progress."""
    with Progress(total, what, unit, images=images, shown=shown) as progress:
        for item in work:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min, 3 h 20 min; `?` for one that is not finite.

    >>> duration(12345.0)
    '3 h 26 min'
    """
    if not seconds < 1e9:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"
