"""A folder of maps to look through in a browser: opens from disk, needs neither a server nor a network.

    index.html  assets/report.css  assets/report.js     the page
    data/index.js                                       what filtering and sorting need, of all images
    data/00000.js ...                                   the maps of one image by all methods, loaded when it is on screen
    photos/00000.jpg ...

A page that was opened from disk may load scripts but not read files, so the data are scripts too. Colours, enlargement and
opacity are the browser's work: a map is stored at its own resolution, a byte a cell.
"""

import base64
import html
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from mlvision.data.unfinished import unfinished
from mlvision.errors import InputError
from mlvision.explain.render import ORDER, ExplainedImage, ShownMethod, colour_table, shared_limit, shown_part

MAX_SIDE = 64  # cells; an input-gradient map of 224 x 224 would make 50 kB a label
_FILES = {"index.html", "assets", "data", "photos"}
_MARK = '<meta name="generator" content="mlvision report">'
_DRAWN, _FLAT, _NO_POSITIVE = range(3)


@dataclass(frozen=True)
class ReportData:
    """What a report shows.

    Attributes:
        images: read once, in order; a generator keeps the memory low.
        thresholds: of the scores, one or one a class: from which a label counts as predicted.
        summary: what a reader must know to trust the page: run, protocol, seeds, ...; names and values as text.
    """

    title: str
    classes: Sequence[str]
    methods: Sequence[ShownMethod]
    images: Iterable[ExplainedImage]
    thresholds: float | Float[np.ndarray, " C"] = 0.5
    summary: Mapping[str, str] = field(default_factory=dict)


def write_report(folder: str | Path, report: ReportData, *, max_side: int = MAX_SIDE) -> Path:
    """Write a report into a folder, whole or not at all; an earlier report there is replaced.

    The same data give the same bytes.

    Args:
        max_side: of a map, in cells: finer maps are averaged down to it, and the page says so.

    Returns:
        The page to open.

    Raises:
        InputError: the folder holds anything that is not a report; no images, no methods or two of one name; not one
            class a score; an image without any map.
    """
    folder = Path(folder)
    names = [method.name for method in report.methods]
    if not names or len(set(names)) < len(names):
        raise InputError(f"report: expected methods of different names, got {names}")
    _check_free(folder)
    # Everything goes to a sibling that is renamed at the end: a run that is killed leaves no half report.
    with unfinished(folder) as written:
        _write_all(written, report, max_side)
        if folder.exists():
            _check_free(folder)
            old = written.with_name(written.name.replace("unfinished", "old"))
            os.rename(folder, old)
            os.rename(written, folder)
            shutil.rmtree(old)
        else:
            os.rename(written, folder)
    return folder / "index.html"


def _check_free(folder: Path) -> None:
    """Refuses a folder with anything that a report did not write: it would be lost."""
    if folder.is_symlink():
        raise InputError(f"{folder}: a link is in the way of the report, which would replace it; name another folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: a file is in the way of the report")
    found = {path.name for path in folder.iterdir()}
    if not found:
        return
    index = folder / "index.html"
    if not index.is_file() or _MARK not in index.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise InputError(f"{folder}: exists and is no report; name another folder")
    if found - _FILES:
        raise InputError(f"{folder}: holds {sorted(found - _FILES)[0]} beside an earlier report; name another folder")


def _write_all(folder: Path, report: ReportData, max_side: int) -> None:
    for name in ("assets", "data", "photos"):
        (folder / name).mkdir(parents=True)
    page = resources.files("mlvision.explain") / "report_page"
    for name in ("report.css", "report.js"):
        (folder / "assets" / name).write_bytes((page / name).read_bytes())
    text = (page / "report.html").read_text(encoding="utf-8")
    assert _MARK in text
    (folder / "index.html").write_text(text.replace("{{title}}", html.escape(report.title)), encoding="utf-8")

    rows, averaged = [], {}
    for number, image in enumerate(report.images):
        row, maps = _image(image, report, max_side, averaged)
        rows.append(row)
        _write_script(folder / "data" / f"{number:05}.js", f"mlvisionReport.image({number},", maps)
        Image.fromarray(image.photo).save(folder / "photos" / f"{number:05}.jpg", quality=90, subsampling=0)
    if not rows:
        raise InputError("report: there are no images")
    index = {
        "title": report.title,
        "classes": list(report.classes),
        "methods": [
            [m.name, m.signed, m.label_specific, m.description, averaged.get(m.name, ""), m.magnitudes]
            for m in report.methods
        ],
        "thresholds": [_short(t) for t in np.broadcast_to(report.thresholds, len(report.classes))],
        "summary": list(report.summary.items()),
        "outcomes": ORDER,
        "colours": [_encode(colour_table(signed)) for signed in (False, True)],
        "images": rows,
    }
    _write_script(folder / "data" / "index.js", "mlvisionReport.index(", index)


def _image(
    image: ExplainedImage, report: ReportData, max_side: int, averaged: dict[str, str]
) -> tuple[list[Any], list[Any]]:
    """What the index holds of an image, and its maps; notes in `averaged` which methods' maps were too fine."""
    if len(image.scores) != len(report.classes):
        raise InputError(f"{image.key}: {len(image.scores)} scores for {len(report.classes)} classes")
    if not any(method.name in image.maps for method in report.methods):
        raise InputError(f"{image.key}: no map of {', '.join(m.name for m in report.methods)}")
    said, places = image.outcomes(report.thresholds), image.places
    labels = [int(image.labels[place]) for place in places]
    predicted = image.scores >= report.thresholds
    row = [
        image.key,
        *image.photo.shape[:2],
        _short(image.loss),
        np.flatnonzero(image.targets == 1).tolist(),
        int(np.isnan(image.targets).sum()),
        np.array([c for c in np.argsort(-image.scores, kind="stable") if predicted[c]], dtype=int).tolist(),
        labels,
        [ORDER.index(said[c]) for c in labels],
        [round(float(image.scores[c]), 4) for c in labels],
        # A contrast's second class with its score; contrasts are few.
        {
            n: [image.rival(place), round(float(image.scores[image.rival(place)]), 4)]
            for n, place in enumerate(places)
            if image.rival(place) >= 0
        },
    ]
    logits = None if image.logits is None else [_short(image.logits[c]) for c in labels]
    return row, [logits, [_maps(image, method, places, max_side, averaged) for method in report.methods]]


def _maps(
    image: ExplainedImage, method: ShownMethod, places: list[int], max_side: int, averaged: dict[str, str]
) -> dict[str, Any] | None:
    """The maps of one method as bytes, each with its own scale; None where the method has none of this image."""
    if method.name not in image.maps or not places:
        return None
    native = image.maps[method.name][places].astype(np.float32)
    shown = _averaged(native, max_side)
    if shown.shape != native.shape:
        sizes = " to ".join(f"{h} x {w}" for h, w in (native.shape[1:], shown.shape[1:]))
        averaged.setdefault(method.name, sizes)
    shown = shown_part(shown, image, method)
    signed = np.array([image.signed(place, method) for place in places], dtype=bool)
    tops = np.abs(shown).max(axis=(1, 2))
    steps = np.where(tops > 0, tops / np.where(signed, 127, 255), 1)
    cells = np.rint(shown / steps[:, None, None]).astype(np.int16).astype(np.uint8)  # signed ones in two's complement
    highest, lowest = native.max(axis=(1, 2)), native.min(axis=(1, 2))
    silent = np.where(highest == lowest, _FLAT, np.where((highest > 0) | signed, _DRAWN, _NO_POSITIVE))
    measures = image.measures.get(method.name, {})
    return {
        "size": shown.shape[1:],
        "limit": _short(shared_limit(shown[silent == _DRAWN])),
        "own": [_short(shared_limit(values[None])) for values in shown],
        "silent": silent.tolist(),
        "steps": [_short(step) for step in steps],
        # Where the highest and the lowest cell are: shares from the left and from the top, of the map as it was made.
        "peaks": [[*_place(values.argmax(), values), _short(values.max())] for values in native],
        "lows": [[*_place(values.argmin(), values), _short(values.min())] for values in native]
        if signed.any()
        else None,
        "measures": [[name, [_short(values[place]) for place in places]] for name, values in measures.items()],
        "cells": _encode(cells),
    }


def _averaged(maps: Float[np.ndarray, "L h w"], max_side: int) -> Float[np.ndarray, "L _ _"]:
    """Maps of at most `max_side` cells a side: each new cell is the mean of the area that it covers."""
    height, width = maps.shape[1:]
    if max(height, width) <= max_side:
        return maps
    share = max_side / max(height, width)
    size = max(1, round(width * share)), max(1, round(height * share))
    return np.stack([np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX)) for values in maps])


def _place(cell: np.integer, values: Float[np.ndarray, "h w"]) -> tuple[float, float]:
    row, column = divmod(int(cell), values.shape[1])
    return round((column + 0.5) / values.shape[1], 3), round((row + 0.5) / values.shape[0], 3)


def _short(value: float | np.floating) -> float | None:
    """Six significant digits; None, which JSON can say, for NaN."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _write_script(path: Path, call: str, data: Any) -> None:
    """Data as a script that hands it over; names in it cannot end the script, whatever they hold."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 is escaped too
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    path.write_text(f"{call}{text});\n", encoding="ascii")
