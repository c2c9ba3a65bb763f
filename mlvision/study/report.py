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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from PIL import Image

from mlvision.errors import InputError
from mlvision.files import whole_folder
from mlvision.study.render import ORDER, ExplainedImage, ShownMethod, colour_table, shared_limit, shown_part

MAX_SIDE = 64  # cells; an input-gradient map of 224 x 224 would make 50 kB a label
_FILES = {"index.html", "assets", "data", "photos"}
_MARK = '<meta name="generator" content="mlvision report">'


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
    with whole_folder(folder, replace=True) as written:
        _write_all(written, report, max_side)
        _check_free(folder)  # again: it may have been filled since
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
    page = resources.files("mlvision.study") / "report_page"
    for name in ("report.css", "report.js"):
        (folder / "assets" / name).write_bytes((page / name).read_bytes())
    text = (page / "report.html").read_text(encoding="utf-8")
    assert _MARK in text
    title = html.escape(report.title)
    (folder / "index.html").write_text(text.replace("{{title}}", title), encoding="utf-8", errors="backslashreplace")

    images, averaged = [], {}
    table = {kind: np.zeros(len(report.classes), dtype=np.int64) for kind in (*ORDER, "explained")}
    has_areas = False
    for number, image in enumerate(report.images):
        listed, data = _image(image, report, max_side, averaged)
        images.append(listed)
        _count(image, report.thresholds, table)
        has_areas = has_areas or bool(image.areas)
        _write_script(folder / "data" / f"{number:05}.js", f"mlvisionReport.image({number},", data)
        Image.fromarray(image.photo).save(folder / "photos" / f"{number:05}.jpg", quality=90, subsampling=0)
    if not images:
        raise InputError("report: there are no images")
    kinds = [kind for kind in table if kind != "TN"]
    listed = np.flatnonzero(sum(table[kind] for kind in kinds))
    index = {
        "title": report.title,
        "classes": list(report.classes),
        "methods": [
            {
                "name": method.name,
                "signed": method.signed,
                "labelSpecific": method.label_specific,
                "description": method.description,
                "averaged": averaged.get(method.name, ""),
                "magnitudes": method.magnitudes,
            }
            for method in report.methods
        ],
        "thresholds": [_short(t) for t in np.broadcast_to(report.thresholds, len(report.classes))],
        "summary": list(report.summary.items()),
        "outcomes": ORDER,
        "colours": [_encode(colour_table(signed)) for signed in (False, True)],
        "hasAreas": has_areas,
        "table": [{"class": c, **{kind: int(table[kind][c]) for kind in kinds}} for c in listed.tolist()],
        "images": images,
    }
    _write_script(folder / "data" / "index.js", "mlvisionReport.index(", index)


def _image(
    image: ExplainedImage, report: ReportData, max_side: int, averaged: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the index and an image's own file hold; notes in `averaged` which methods' maps were too fine."""
    if len(image.scores) != len(report.classes):
        raise InputError(f"{image.key}: {len(image.scores)} scores for {len(report.classes)} classes")
    if not any(method.name in image.maps for method in report.methods):
        raise InputError(f"{image.key}: no map of {', '.join(m.name for m in report.methods)}")
    said, places = image.outcomes(report.thresholds), image.places
    labels = [int(image.labels[place]) for place in places]
    predicted = image.predicted(report.thresholds)
    explained = []
    for place, c in zip(places, labels, strict=True):
        label = {"label": c, "outcome": ORDER.index(said[c]), "score": round(float(image.scores[c]), 4)}
        if (rival := image.rival(place)) >= 0:
            label |= {"against": rival, "rivalScore": round(float(image.scores[rival]), 4)}
        explained.append(label)
    listed = {
        "key": image.key,
        "height": image.photo.shape[0],
        "width": image.photo.shape[1],
        "loss": _short(image.loss),
        "truth": np.flatnonzero(image.targets == 1).tolist(),
        "unknown": int(np.isnan(image.targets).sum()),
        "predicted": [int(c) for c in np.argsort(-image.scores, kind="stable") if predicted[c]],
        "labels": explained,
    }
    wanted = {*labels, *listed["truth"]}
    return listed, {
        "logits": None if image.logits is None else [_short(image.logits[c]) for c in labels],
        "methods": [_maps(image, method, places, max_side, averaged) for method in report.methods],
        "areas": {
            c: [np.round(outline, 4).tolist() for outline in outlines]
            for c, outlines in image.areas.items()
            if c in wanted
        },
    }


def _count(
    image: ExplainedImage, thresholds: float | Float[np.ndarray, " C"], table: dict[str, Int64[np.ndarray, " C"]]
) -> None:
    """Add an image to the table of classes: its outcomes, and which labels are explained, contrasts left out."""
    said = np.array(image.outcomes(thresholds))
    for outcome in ORDER:
        table[outcome] += said == outcome
    explained = {int(image.labels[place]) for place in image.places if image.rival(place) < 0}
    table["explained"][list(explained)] += 1


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
    highest, lowest = native.max(axis=(1, 2)), native.min(axis=(1, 2))
    flat = highest == lowest
    positive, cells = shown.clip(min=0), np.zeros(shown.shape, dtype=np.int8)
    # Each side of 0 has its own scale, so that the fainter one keeps its shape.
    steps = [np.where((top := side.max(axis=(1, 2))) > 0, top / 127, 1) for side in (positive, -shown.clip(max=0))]
    for step, side in zip(steps, (positive, shown.clip(max=0)), strict=True):
        cells += np.rint(side / step[:, None, None]).astype(np.int8)
    # A map without positive evidence has nothing to draw unless both signs are drawn.
    draws = {
        "for": (positive, ~flat & (highest > 0)),
        "both": (shown, ~flat),
        "method": (shown_part(shown, image, method), ~flat & ((highest > 0) | _signed(image, method))),
    }
    measures = image.measures.get(method.name, {})
    return {
        "size": shown.shape[1:],
        # The ends of the colours: of all labels together, and of each label by its positive part and by both signs.
        "limits": {name: _short(shared_limit(values[drawn])) for name, (values, drawn) in draws.items()},
        "own": [[_short(shared_limit(side[n : n + 1])) for side in (positive, shown)] for n in range(len(shown))],
        "flat": flat.tolist(),
        "steps": [[_short(up), _short(down)] for up, down in zip(*steps, strict=True)],
        # Where the highest and the lowest cell are: shares from the left and from the top, of the map as it was made.
        "peaks": [[*_place(values.argmax(), values), _short(values.max())] for values in native],
        "lows": [[*_place(values.argmin(), values), _short(values.min())] for values in native],
        "measures": [[name, [_short(values[place]) for place in places]] for name, values in measures.items()],
        "cells": _encode(cells),
    }


def _signed(image: ExplainedImage, method: ShownMethod) -> Bool[np.ndarray, " L"]:
    return np.array([image.signed(place, method) for place in image.places], dtype=bool)


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
