"""JPEG files by OpenCV, and what libjpeg says of their damage.

libjpeg goes on where data end early, match no code or are left over: it fills up with grey or shifted blocks and prints
one line on the process's standard error. OpenCV returns such an image as if it were whole, Pillow discards the line.
"""

import fcntl
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
_FILL = 0xFF
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive

# Not among them: an unknown JFIF revision, odd but harmless parameters.
_COMPLAINT = re.compile(
    rb"((?:Corrupt JPEG data|Premature end of JPEG file|Inconsistent progression sequence)[^\n]*)\n?"
)

T = TypeVar("T")


class JpegHeader(NamedTuple):
    """What the frame header of a JPEG file says, and what else decides how it is read.

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
    """The header of a JPEG file; None if it has none, or is not laid out as the standard asks."""
    has_exif = False
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _FRAMES:
            height, width = (int.from_bytes(data[i : i + 2]) for i in (position + 5, position + 7))
            plain = marker in _HUFFMAN_FRAMES and data[position + 4] == 8 and data[position + 9] in (1, 3)
            # Looked for from here on: what stands before may be a thumbnail's. Some files have bytes after it.
            is_closed = data.endswith(_END) or data.find(_END, position) >= 0
            return JpegHeader(width, height, plain, has_exif, is_closed)
        if marker == _FILL:
            position += 1
            continue
        has_exif |= marker == _APP1
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
        self._start()
        os.register_at_fork(after_in_child=self._start_in_child)

    def _start(self) -> None:
        self._door = threading.Condition()
        self._num_inside = 0
        self._complaints: list[str] = []
        self._stderr: int | None = None  # what standard error was; None if it was closed
        self._scratch: int | None = None  # what it is while images are decoded; each process has its own
        self._num_read = 0

    def _start_in_child(self) -> None:
        if self._num_inside and self._stderr is not None:
            os.dup2(self._stderr, 2)
        self._start()

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
            if self._scratch is None:
                self._scratch = _scratch_file()
            os.dup2(self._scratch, 2)
        self._num_inside += 1

    def _leave(self) -> None:
        assert self._scratch is not None
        self._num_inside -= 1
        if not self._num_inside and self._stderr is not None:
            os.dup2(self._stderr, 2)
        size = os.lseek(self._scratch, 0, os.SEEK_END)
        if size > self._num_read:
            self._sort(os.pread(self._scratch, size - self._num_read, self._num_read))
            self._num_read = size
        if not self._num_inside:
            os.close(2 if self._stderr is None else self._stderr)
            if size:
                os.ftruncate(self._scratch, 0)
                self._num_read = os.lseek(self._scratch, 0, os.SEEK_SET)
            self._door.notify_all()

    def _sort(self, text: bytes) -> None:
        """Keeps the complaints and writes the rest where it was meant to go."""
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
    """A descriptor, above those of the standard streams, of a file without a name."""
    with (
        os.fdopen(os.memfd_create("stderr"), "wb") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()
    ) as file:
        return fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)


_LISTENER = _Listener()
