"""What goes wrong outside of us: processes that have ended, files whose bytes are damaged, and input that never ends."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def dead_process() -> int:
    """The number of a process that has ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def damaged(whole: bytes, *, num: int, seed: int, hole: int) -> Iterator[bytes]:
    """`num` copies, each with one fault: a flipped bit, a byte that is another, a missing end, or `hole` bytes of zero."""
    draw = random.Random(seed)
    for _ in range(num):
        content = bytearray(whole)
        kind, place = draw.randrange(4), draw.randrange(len(whole))
        if kind == 0:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[place] = draw.randrange(256)
        elif kind == 2:
            del content[place:]
        else:
            content[place : place + hole] = bytes(hole)
        yield bytes(content)


@contextmanager
def soon(case: object, seconds: float = 20) -> Iterator[None]:
    """Fail what computes for longer: far more than any case of a fuzz test takes, far less than a hang.

    Counted is the time of the processor, so that a busy machine is no hang. What waits for ever is left to pytest-timeout.
    """

    def stop(*_: Any) -> None:
        raise AssertionError(f"computes for {seconds} s: {case}")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
