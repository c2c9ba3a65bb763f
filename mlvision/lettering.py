"""Names in pictures: whatever they hold, they stand in one line, are cut to the room that there is, and are never boxes.

Letters are those of the DejaVu Sans that matplotlib ships, so that pictures are the same on every machine; what it lacks
(Chinese, Japanese, Korean, most emoji, ...) is taken from a font that is installed, and is spelt out where none has it.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont

ELLIPSIS = "…"
_MOST = 2000  # characters that are looked at: no picture is wide enough for more
# A font that has a box for every character is of no use, and neither is one of pictures of a single size.
_NO_LETTERS = ("lastresort", "adobeblank", "notocoloremoji")


def legible(text: str) -> str:
    """A text in one line, of characters that some font here can draw.

    White space of any kind becomes one blank; what is invisible (joiners, marks of direction, variants) is left out, or
    quoted with escapes when there is nothing else. What no font has is spelt: symbols by their name (`:fox face:`), kana and
    Hangul by their sound, bytes of a name that was no UTF-8 as `\\xff`, everything else by its code point (`\\u732b`).
    """
    return " ".join("".join(map(_drawable, text)).split()) or (text and ascii(text))


@cache
def _drawable(char: str) -> str:
    category = unicodedata.category(char)
    if char.isspace():
        return " "
    if category == "Cf" or "\ufe00" <= char <= "\ufe0f":
        return ""
    if "\udc80" <= char <= "\udcff":  # what os.fsdecode makes of a byte that is no UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    if not category.startswith("C") and _face(char, False):
        return char
    name = unicodedata.name(char, "")
    if category in ("So", "Sk"):
        return f":{name.lower()}:"
    if sound := re.fullmatch(r"(?:HANGUL SYLLABLE|HIRAGANA LETTER|KATAKANA LETTER) (\w+)", name):
        return sound[1].lower()
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def short(name: str, longest: int = 28) -> str:
    """A name, legible, and cut to so many characters."""
    name = legible(name[:_MOST])
    return name if len(name) <= longest else name[: longest - 1] + ELLIPSIS


def fitted(text: str, width: int | float, size: int, *, bold: bool = False, keep_end: bool = False) -> str:
    """As much of a text, legible, as fits into so many pixels; an ellipsis stands where it is cut.

    Args:
        size: of the letters, in pixels.
        keep_end: cut at the beginning, as paths are.
    """
    text = legible(text[-_MOST:] if keep_end else text[:_MOST])
    if length(text, size, bold) <= width:
        return text
    low, high = 0, len(text) - 1  # how many characters stay: `low` surely fit
    while low < high:
        middle = (low + high + 1) // 2
        if length(_cut(text, middle, keep_end), size, bold) <= width:
            low = middle
        else:
            high = middle - 1
    return _cut(text, low, keep_end)


def _cut(text: str, kept: int, keep_end: bool) -> str:
    return ELLIPSIS + text[len(text) - kept :] if keep_end else text[:kept] + ELLIPSIS


def length(text: str, size: int, bold: bool = False) -> float:
    """How many pixels wide a text is."""
    return sum((_font(face, size).getlength(run) for face, run in _runs(text, bold)), 0.0)


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int | float, int | float],
    text: str,
    size: int,
    fill: str,
    *,
    bold: bool = False,
    anchor: str = "la",
) -> None:
    """Write a line that is legible already, each run in a font that has its letters.

    Args:
        anchor: what `place` is: l, m or r (left, middle, right), then a or m (top, middle), as in Pillow.
    """
    x, y = place
    ascent, descent = _font(_own(bold), size).getmetrics()
    baseline = y + (ascent if anchor[1] == "a" else (ascent - descent) / 2)
    x -= {"l": 0, "m": 0.5, "r": 1}[anchor[0]] * length(text, size, bold)
    for face, run in _runs(text, bold):
        font = _font(face, size)
        draw.text((x, baseline), run, fill=fill, font=font, anchor="ls")
        x += font.getlength(run)


def families(texts: Sequence[str]) -> list[str]:
    """The names of the fonts of some texts, for matplotlib, which takes each character from the first that has it."""
    from matplotlib import font_manager

    manager, names = font_manager.fontManager, ["DejaVu Sans"]
    for path in dict.fromkeys(face for text in texts for face, _ in _runs(text, False)):
        if path == _own(False):
            continue
        if all(entry.fname != path for entry in manager.ttflist):  # installed after matplotlib made its list
            manager.addfont(path)
        names += [entry.name for entry in manager.ttflist if entry.fname == path]
    return list(dict.fromkeys(names))


def _runs(text: str, bold: bool) -> Iterator[tuple[str, str]]:
    """The stretches of a text that share a font, with its file; what none has is left to our own, as a box."""
    for face, run in groupby(text, lambda char: _face(char, bold) or _own(bold)):
        yield face, "".join(run)


def _face(char: str, bold: bool) -> str:
    """The file of the first font that has a character; empty: none has."""
    own = _own(bold), _own(False)
    return next((path for path in own if _has(path, char)), "") or _installed_face(char)


@cache
def _installed_face(char: str) -> str:
    return next((path for path in _installed() if _has(path, char)), "")


@cache
def _own(bold: bool) -> str:
    import matplotlib

    # By file, as in data/scenes/drawing.py: a system font of the same name may be another.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", name))


@cache
def _installed() -> tuple[str, ...]:
    """The files of the machine's own fonts, upright ones without serifs first."""
    from matplotlib import font_manager

    def order(path: str) -> tuple[bool, bool, bool, str]:
        name = Path(path).stem.lower()
        slanted = any(word in name for word in ("italic", "oblique", "serif", "mono", "bold", "black", "light", "thin"))
        return slanted, "sans" not in name, "regular" not in name, path

    found = font_manager.findSystemFonts()
    return tuple(sorted((p for p in found if not Path(p).stem.lower().startswith(_NO_LETTERS)), key=order))


def _has(path: str, char: str) -> bool:
    outlines = _outlines(path)
    return outlines is not None and bool(outlines.get_char_index(ord(char)))


@cache
def _outlines(path: str) -> Any:
    """A font by its file; None: it cannot be read, or has no outlines to scale."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # a file of the machine's that is no font: another may have the letter
        return None
    return font if font.scalable else None


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)
