"""One process at a time in a run folder: a lock that names who holds it and that dies with its process."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mlvision.errors import InputError
from mlvision.files import is_alive

LOCK = "in_use"
_RENEWED_EVERY, _WATCHED_FOR = 10.0, 60.0  # seconds
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if it is not there; a second process is refused while the first one lives.

    The system's own lock on the file `in_use` decides, and it is gone as soon as its process is: loader workers do not
    inherit it. (It also goes when its own process opens and closes the file.) Some file systems of clusters have no such
    locks, or keep them on each host: so the file also says which process on which host holds it, and the holder renews the
    file's time. A lock of this host is stale when its process is gone; one of another host when nobody renews it for a
    minute.

    Raises:
        InputError: another process holds it; names the process and its host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _open_locked(path)
    ended = threading.Event()
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}\n")
        file.flush()
        threading.Thread(target=_renew, args=(path, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        if _is_at(file, path):
            path.unlink()  # before the lock is given back: afterwards it may be the next holder's
        file.close()


def _open_locked(path: Path) -> TextIO:
    """The lock's file, locked by this process, its holder gone."""
    while True:
        file = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            supported = _try_lock(file)
            if not _is_at(file, path):  # its holder has ended since it was opened here
                file.close()
                continue
            file.seek(0)
            written = re.fullmatch(r"(\d+) (.+)\n", file.read())
            holder = "process {} on {}".format(*written.groups()) if written else "another process"
            if supported is None or (written and _holds(path, written[1], written[2], supported)):
                raise InputError(
                    f"{path.parent}: in use by {holder}: wait until it has ended, or give another out= "
                    f"(if you are sure that it has ended, remove {path})"
                )
            if written:
                print(f"{path.parent}: was in use by {holder}, which is gone; taken over")
            return file
        except BaseException:
            file.close()
            raise


def _try_lock(file: TextIO) -> bool | None:
    """True: locked; None: another process has it; False: this file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return None
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holds(path: Path, process: str, host: str, supported: bool) -> bool:
    """Whether the process that wrote the file still holds it, although the file could be locked here."""
    if host != socket.gethostname():
        print(
            f"{path}: of process {process} on {host}; looking for {_WATCHED_FOR:.0f} s whether it is still renewed",
            flush=True,
        )
        return _is_renewed(path)
    return not supported and is_alive(int(process))


def _is_renewed(path: Path) -> bool:
    """Whether its holder renews it. Only changes count: the clocks of two hosts may differ."""
    before, end = path.stat().st_mtime_ns, time.monotonic() + _WATCHED_FOR
    while time.monotonic() < end:
        time.sleep(min(1.0, _WATCHED_FOR))
        if path.stat().st_mtime_ns != before:
            return True
    return False


def _renew(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_RENEWED_EVERY):
        with contextlib.suppress(OSError):
            os.utime(path)
