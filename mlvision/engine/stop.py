"""SIGTERM and Ctrl-C while a run trains: noted, and heard where training can be saved."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class StopSignal:
    """The first of SIGTERM and SIGINT (Ctrl-C) that comes while `noted` lasts; a second Ctrl-C interrupts at once.

    Attributes:
        name: of the signal; empty before it comes.
    """

    def __init__(self) -> None:
        self.name = ""
        self._waiting = False

    def __call__(self) -> bool:
        return bool(self.name)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Outside the main thread, which alone gets signals, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        # Plain assignments: a signal may come while another one is noted, and a lock would wait for itself.
        if self.name:
            # torchrun sends its own Ctrl-C after the terminal's: the second one need not be the user's.
            if number == signal.SIGINT == signal.Signals[self.name] and "TORCHELASTIC_RUN_ID" not in os.environ:
                raise KeyboardInterrupt
            return
        self.name = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":  # by the system's call: print may be what was interrupted
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            os.write(2, f"{self.name}: saving after this step or validation{again}\n".encode())
        if self._waiting:
            raise _Heard

    def ends(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches up to the signal, which also ends the wait for one: that may take for ever."""
        iterator = iter(batches)
        while True:
            try:
                self._waiting = True
                if self.name:
                    return
                batch = next(iterator, None)
            except _Heard:
                return
            finally:
                self._waiting = False
            if batch is None:
                return
            yield batch


class _Heard(BaseException):
    """No Exception: whoever reads an image turns those into what is wrong with the image."""
