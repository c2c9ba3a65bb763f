import os
import re
import socket

import pytest

from mlvision.data.unfinished import is_alive, unfinished


def dead_process() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with unfinished(tmp_path / "new/set") as path:
        path.mkdir()
        assert not (tmp_path / "new/set").exists()
        path.rename(tmp_path / "new/set")
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["set"]
    with pytest.raises(FileExistsError), unfinished(tmp_path / "new/other") as path:
        (path / "images").mkdir(parents=True) or path.mkdir()
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["set"]


def test_only_what_dead_processes_of_this_host_left_of_this_folder_is_removed(tmp_path):
    host, dead = re.sub(r"[^\w-]", "_", socket.gethostname()), dead_process()
    left = f".set.unfinished-{host}-{dead}-1a2b"
    kept = [
        f".set.unfinished-{host}-{os.getpid()}-1a2b",  # a living one's
        f".set.unfinished-elsewhere-{dead}-1a2b",
        f".other.unfinished-{host}-{dead}-1a2b",
        f"set.unfinished-{host}-{dead}-1a2b",
        ".set.unfinished-1a2b3c4d",
    ]
    for name in (left, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.jpg").touch()
    with unfinished(tmp_path / "set"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_living_process_is_told_from_a_dead_one():
    assert is_alive(os.getpid())
    assert is_alive(10**30)  # no number of a process: nothing is known
    assert not is_alive(dead_process())
