"""Names in pictures: never a box, one line, cut to the room; on machines with and without fonts for them."""

import os
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mlvision import lettering
from mlvision.lettering import families, fitted, legible, length, short, write

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
HOOKED = "\u1d8a"  # a letter that STIX has and DejaVu has not


def forget():
    lettering._drawable.cache_clear()
    lettering._installed_face.cache_clear()


@pytest.fixture
def fonts(monkeypatch):
    """Call it with the fonts that are installed; none at first."""

    def install(*paths):
        monkeypatch.setattr(lettering, "_installed", lambda: tuple(map(str, paths)))
        forget()

    install()
    yield install
    forget()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("fire truck", "fire truck"),
        ("Ärger, Ωμέγα, кот", "Ärger, Ωμέγα, кот"),
        ("\u732b", r"\u732b"),
        ("\U0001f98a!", ":fox face:!"),
        ("고양이", "goyangi"),
        ("ネコ", "neko"),
        ("a\nb\t\tc\r\n\u2028d ", "a b c d"),
        ("bell\x07", r"bell\x07"),
        ("nul\0", r"nul\x00"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("\ue000\U0010ffff", r"\ue000\U0010ffff"),
        ("safe\u202egnp.exe", "safegnp.exe"),  # no mark of direction turns what follows it around
        ("\U0001f468\u200d\U0001f469\ufe0f", ":man::woman:"),
        ("\u200b", r"'\u200b'"),
        ("", ""),
    ],
)
def test_what_no_font_has_is_spelt(fonts, text, shown):
    assert legible(text) == shown
    assert legible(shown) == shown


def test_an_installed_font_is_taken_where_ours_has_no_such_letter(fonts):
    assert legible(f"a{HOOKED}") == rf"a\u{ord(HOOKED):x}"
    assert families([f"a{HOOKED}"]) == ["DejaVu Sans"]
    fonts(FONTS / "cmr10.ttf", FONTS / "STIXGeneral.ttf")
    assert legible(f"a{HOOKED}") == f"a{HOOKED}"
    assert families(["abc", f"a{HOOKED}"]) == ["DejaVu Sans", "STIXGeneral"]
    stix = ImageFont.truetype(str(FONTS / "STIXGeneral.ttf"), 20)
    ours = ImageFont.truetype(str(FONTS / "DejaVuSans.ttf"), 20)
    assert length(f"a{HOOKED}b", 20) == ours.getlength("a") + stix.getlength(HOOKED) + ours.getlength("b")

    def drawn(method):
        picture = Image.new("RGB", (60, 40), "white")
        method(ImageDraw.Draw(picture))
        return np.asarray(picture)

    expected = drawn(lambda draw: draw.text((5, 30), HOOKED, fill="black", font=stix, anchor="ls"))
    ascent = ours.getmetrics()[0]
    assert (drawn(lambda draw: write(draw, (5, 30 - ascent), HOOKED, 20, "black")) == expected).all()
    assert (expected < 128).sum() > 30


def test_fonts_of_boxes_and_files_that_are_none_are_passed_over(monkeypatch, tmp_path):
    from matplotlib import font_manager

    (tmp_path / "broken.ttf").write_bytes(b"no font")
    found = [str(FONTS / "LastResortHE-Regular.ttf"), str(tmp_path / "broken.ttf"), str(tmp_path / "gone.ttf")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: found)
    lettering._installed.cache_clear()
    forget()
    try:
        assert legible("\u732b") == r"\u732b"
    finally:
        lettering._installed.cache_clear()
        forget()


@pytest.mark.parametrize("anchor", ["la", "ma", "ra", "lm", "mm"])
@pytest.mark.parametrize("bold", [False, True])
def test_plain_text_stands_where_pillow_puts_it(anchor, bold):
    face = ImageFont.truetype(str(FONTS / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")), 13)
    ours, theirs = Image.new("L", (200, 40), 255), Image.new("L", (200, 40), 255)
    write(ImageDraw.Draw(ours), (100, 15), "Typography", 13, "black", bold=bold, anchor=anchor)
    ImageDraw.Draw(theirs).text((100, 15), "Typography", fill="black", font=face, anchor=anchor)
    ink = [np.argwhere(np.asarray(picture) < 128) for picture in (ours, theirs)]
    assert np.abs(ink[0].mean(0) - ink[1].mean(0)).max() < 1.01  # half pixels are rounded here or there


@pytest.mark.parametrize("keep_end", [False, True])
def test_a_line_is_cut_to_its_room_and_no_more_than_that(keep_end):
    text = "annotations/val/a-photo-of-a-cat.jpg"
    for width in range(20, 300, 7):
        line = fitted(text, width, 12, keep_end=keep_end)
        assert length(line, 12) <= width
        if line != text:
            kept = line.strip("…")
            assert kept in text
            assert (text.endswith(kept) and line[0] == "…") if keep_end else (text.startswith(kept) and line[-1] == "…")
            longer = f"…{text[-len(kept) - 1 :]}" if keep_end else f"{text[: len(kept) + 1]}…"
            assert length(longer, 12) > width
    assert fitted(text, 1000, 12, keep_end=keep_end) == text


@pytest.mark.timeout(60)
def test_names_of_any_length_are_cut_at_once():
    started = time.process_time()
    for name in ("w" * 10**6, "a b " * 10**6, "\n" * 10**6, "\u0301" * 10**6):
        assert length(fitted(name, 100, 12), 12) <= 100
        assert len(short(name)) <= 28
    assert time.process_time() - started < 20  # letter by letter it takes hours
    assert short("x" * 28) == "x" * 28
    assert short("x" * 29) == "x" * 27 + "…"
