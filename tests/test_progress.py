import sys

import pytest

from mlvision import progress
from mlvision.progress import Progress, duration, track


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_line_comes_every_half_minute(clock, capsys):
    for _ in track(range(100), 100, "label maps"):
        clock.now += 4
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 400 // 32  # the first update after each 30 s
    assert lines[0] == "label maps: 8 of 100 images, 0.25 images/s, 6 min left"
    assert lines[-1] == "label maps: 96 of 100 images, 0.25 images/s, 16 s left"


def test_short_work_is_silent(clock, capsys):
    for _ in track(range(1000), 1000, "decoding"):
        clock.now += 0.02
    assert capsys.readouterr() == ("", "")


def test_a_resumed_piece_counts_what_was_done_and_what_follows(clock):
    """2 steps of 16 images in 4 s: 8 images a second; 10 + 20 steps are left."""
    work = Progress(20, "epoch 2/3", "steps", done=8, more=20, images=16)
    clock.now += 4
    work.note("loss 0.5000")
    work.update(2)
    assert work.line() == "epoch 2/3: 10 of 20 steps, loss 0.5000, 8 images/s, 60 s left"


def test_nothing_done_has_no_speed(clock):
    assert Progress(5, "x").line() == "x: 0 of 5 images, ? left"


def test_what_is_not_shown_is_silent(clock, capsys):
    work = Progress(9, "x", shown=False)
    for _ in range(9):
        clock.now += 40
        work.update()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(3, "decoding train") as work:
        work.note("loss 1.0")
        for _ in range(3):
            clock.now += 40
            work.update()
    err = capsys.readouterr().err
    assert "decoding train" in err
    assert "left" not in err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3600, "60 min"),
        (5400, "1 h 30 min"),
        (12345, "3 h 26 min"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_durations_in_words(seconds, text):
    assert duration(float(seconds)) == text
