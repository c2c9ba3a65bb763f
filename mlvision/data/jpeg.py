"""JPEG files by OpenCV, and what libjpeg says of their damage.

libjpeg goes on where data end early, match no code or are left over: it fills up with grey or shifted blocks and prints
one line on the process's standard error. OpenCV returns such an image as if it were whole, Pillow discards the line.
"""

import os
import re
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from jaxtyping import UInt8

START = b"\xff\xd8\xff"
_END = b"\xff\xd9"
_APP1 = 0xE1  # Exif or XMP: may hold a rotation
_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive

# Not among them: an unknown JFIF revision, odd but harmless parameters.
_COMPLAINT = re.compile(
    rb"((?:Corrupt JPEG data|Premature end of JPEG file|Inconsistent progression sequence)[^\n]*)\n?"
)

T = TypeVar("T")


class JpegHeader(NamedTuple):
    """What stands before the first scan.

    Attributes:
        width, height: in pixels.
        plain: 8 bits, grey or three channels, Huffman-coded: OpenCV reads it as Pillow does.
        has_exif: a rotation may be stated.
        is_closed: the end marker is there.
    """

    width: int
    height: int
    plain: bool
    has_exif: bool
    is_closed: bool


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG file; None if it ends before the first scan or is not laid out as the standard asks."""
    width = height = 0
    plain = has_exif = False
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == _SCAN:
            # Within a scan the two bytes of a marker cannot occur, and earlier ones may be a thumbnail's.
            is_closed = data.find(_END, position) >= 0
            return JpegHeader(width, height, plain, has_exif, is_closed) if width else None
        if marker == _APP1:
            has_exif = True
        elif marker in _FRAMES:
            height, width = (int.from_bytes(data[i : i + 2]) for i in (position + 5, position + 7))
            plain = marker in _HUFFMAN_FRAMES and data[position + 4] == 8 and data[position + 9] in (1, 3)
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return None


def decode(data: bytes) -> tuple[UInt8[np.ndarray, "rows columns 3"] | None, str]:
    """The stored pixels as RGB, not turned (None if OpenCV cannot read them), and libjpeg's complaint ("" if none)."""
    content = np.frombuffer(data, np.uint8)
    return _LISTENER.hear(lambda: imdecode(content, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION))


def imdecode(content: UInt8[np.ndarray, " n"], flags: int) -> np.ndarray | None:
    """`cv2.imdecode`, with None for everything that it refuses: it returns None for some files and raises for others."""
    try:
        return cv2.imdecode(content, flags)
    except cv2.error:
        return None


class _Listener:
    """Collects what libjpeg prints on standard error; whatever else arrives there is passed on.

    Standard error belongs to the whole process: a line that comes while several threads decode may be of any of them. Each
    thread that hears one decodes again, alone.
    """

    def __init__(self) -> None:
        self._door = threading.Condition()
        self._num_inside = 0
        self._complaints: list[str] = []
        self._stderr: int | None = None  # what standard error was; None if it was closed
        self._scratch = -1
        self._num_read = 0

    def hear(self, decode: Callable[[], T]) -> tuple[T, str]:
        """What `decode` returns, and the first complaint ("" if none)."""
        with self._door:
            self._enter()
            before = len(self._complaints)
        try:
            result = decode()
        finally:
            with self._door:
                self._leave()
                complaints = self._complaints[before:]
        if not complaints:
            return result, ""
        with self._door:  # held throughout: no other thread enters
            self._door.wait_for(lambda: not self._num_inside)
            self._complaints.clear()
            self._enter()
            try:
                result = decode()
            finally:
                self._leave()
            return result, next(iter(self._complaints), "")

    def _enter(self) -> None:
        if not self._num_inside:
            self._stderr = _duplicate(2)
            self._scratch, self._num_read = _scratch_file(), 0
            if self._scratch != 2:  # it is where a process runs with standard error closed
                os.dup2(self._scratch, 2)
        self._num_inside += 1

    def _leave(self) -> None:
        self._num_inside -= 1
        if self._num_inside:
            self._sort()
            return
        if self._stderr is not None:
            os.dup2(self._stderr, 2)
        self._sort()
        for descriptor in {2 if self._stderr is None else self._stderr, self._scratch}:
            os.close(descriptor)
        self._door.notify_all()

    def _sort(self) -> None:
        """Keeps the new complaints and writes the rest where it was meant to go."""
        size = os.fstat(self._scratch).st_size
        if size == self._num_read:
            return
        text = os.pread(self._scratch, size - self._num_read, self._num_read)
        self._num_read = size
        self._complaints += [line.decode("ascii", "replace") for line in _COMPLAINT.findall(text)]
        if self._stderr is not None:
            with suppress(OSError):  # standard error may be a pipe that nobody reads any more
                os.write(self._stderr, _COMPLAINT.sub(b"", text))


def _duplicate(descriptor: int) -> int | None:
    try:
        return os.dup(descriptor)
    except OSError:
        return None


def _scratch_file() -> int:
    """A descriptor of a file without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("stderr")
    descriptor, path = tempfile.mkstemp()
    os.unlink(path)
    return descriptor


_LISTENER = _Listener()
