import errno
import fcntl
import os
import signal
import socket
import threading
import time

import pytest
from faults import dead_process

from mlvision.engine import lock
from mlvision.engine.lock import LOCK, locked
from mlvision.errors import InputError


def in_child(function) -> int:
    """Exit code of a forked process, which is 2 after an InputError and else what `function` returns."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = function() or 0
        except InputError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def hold(folder):
    with locked(folder):
        return 0


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_a_second_process_is_refused_until_the_first_one_lets_go(tmp_path):
    with locked(tmp_path / "run"):
        assert in_child(lambda: hold(tmp_path / "run")) == 2
        assert in_child(lambda: hold(tmp_path / "other")) == 0
    assert not (tmp_path / "run" / LOCK).exists()
    assert in_child(lambda: hold(tmp_path / "run")) == 0


def test_the_message_names_process_and_host(tmp_path):
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.write(ready[1], b"x")
            os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(InputError, match=rf"in use by process {child} on {socket.gethostname()}: .*in_use\)"):
        hold(tmp_path)
    os.write(release[1], b"x")
    os.waitpid(child, 0)
    hold(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over_though_a_process_that_it_forked_lives(tmp_path, capsys):
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            if os.fork() == 0:  # as a loader's worker
                os.write(ready[1], b"x")
                os.read(release[0], 1)
                os._exit(0)
            signal.pause()
    os.read(ready[0], 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    hold(tmp_path)
    assert f"was in use by process {child} on {socket.gethostname()}, which is gone" in capsys.readouterr().out
    os.write(release[1], b"x")


@pytest.mark.parametrize("damaged", [b"", b"12", b"no number here\n", b"7 host\nmore\n", b"\0\0", b"\xff 7 host\n"])
def test_a_file_that_says_nothing_does_not_refuse(tmp_path, damaged):
    (tmp_path / LOCK).write_bytes(damaged)
    hold(tmp_path)


def test_the_lock_is_given_back_after_an_exception_and_leaves_another_holders_file(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert not (tmp_path / LOCK).exists()
    with locked(tmp_path):
        (tmp_path / LOCK).unlink()  # by hand
        (tmp_path / LOCK).write_text("another's")
    assert (tmp_path / LOCK).read_text() == "another's"


def test_without_locks_of_the_system_a_living_process_of_this_host_is_refused(tmp_path, no_locks):
    (tmp_path / LOCK).write_text(f"{os.getpid()} {socket.gethostname()}\n")
    with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"):
        hold(tmp_path)
    (tmp_path / LOCK).write_text(f"{dead_process()} {socket.gethostname()}\n")
    hold(tmp_path)


@pytest.mark.parametrize("supported", [True, False])
def test_a_process_of_another_host_lives_while_it_renews_its_lock(tmp_path, monkeypatch, request, supported):
    if not supported:
        request.getfixturevalue("no_locks")
    path = tmp_path / LOCK
    path.write_text("12 elsewhere\n")
    monkeypatch.setattr(lock, "_RENEWED_EVERY", 0.01)
    ended = threading.Event()
    renewing = threading.Thread(target=lock._renew, args=(path, ended))
    renewing.start()
    with pytest.raises(InputError, match="in use by process 12 on elsewhere"):
        hold(tmp_path)
    ended.set()
    renewing.join()
    monkeypatch.setattr(lock, "_WATCHED_FOR", 0.05)
    hold(tmp_path)


def test_a_holder_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_RENEWED_EVERY", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        while (tmp_path / LOCK).stat().st_mtime == 0:
            time.sleep(0.01)
