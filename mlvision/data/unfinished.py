"""Folders that are written whole or not at all, and what is left of them when their process is killed."""

import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A path next to `folder`, to write to and to rename to `folder` at the end; it is removed if the context fails.

    What processes of this host that are gone have left of the same folder is removed first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"[^\w-]", "_", socket.gethostname())
    prefix = f".{folder.name}.unfinished-{host}-"
    for left in folder.parent.iterdir():
        number = re.fullmatch(re.escape(prefix) + r"(\d+)-\w+", left.name)
        if number and not is_alive(int(number[1])):
            shutil.rmtree(left, ignore_errors=True)
    path = folder.with_name(f"{prefix}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        yield path
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def is_alive(process: int) -> bool:
    """Whether a process of this number runs on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; a number that none can have, of which nothing is known
        return True
    return True
