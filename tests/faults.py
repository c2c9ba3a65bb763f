"""What goes wrong outside of us: processes that have ended, and files whose bytes are damaged."""

import os
import random
from collections.abc import Iterator


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
