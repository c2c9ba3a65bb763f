"""What is written of explained images as they come: files of maps, and pages. No image is kept, however many there are.

Maps are one .npz for each image and method, which needs nothing else to be laid over the image:

    <method>/00000.npz ...      numbered in the order of the images, as the report's photos are

| array | |
| --- | --- |
| maps | `[L, h, w]` float16, rows first, of the method's own resolution, over `scale` |
| scale | float32, the image's largest magnitude: `maps * scale` are the maps, in their own units |
| extent | `[4]` x1, y1, x2, y2 in [0, 1] of the full image, its EXIF rotation applied: what the grid covers |
| kind | what the values are, as `LabelMap.kind`: attribution, logit, probability or mass |
| labels, against | `[L]` class indices: of each map, and of what a contrast is set against (-1: no contrast) |
| names | `[L]`: each map's label in words |
| classes, scores, logits, targets | `[C]`: names; in [0, 1]; as the model gave them; 1 present, 0 absent, NaN unknown |
| key | the image's key in its manifest: a relative path |
| about | JSON: the method and whatever else was given |
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from mlvision.errors import InputError
from mlvision.files import write_arrays
from mlvision.study.render import ExplainedImage, ShownMethod, draw_grid

PAGE = 8  # images


def save_maps(
    images: Iterable[ExplainedImage], folder: Path, classes: Sequence[str], about: Mapping[str, Mapping[str, Any]]
) -> Iterator[ExplainedImage]:
    """Write the maps of each image, and pass it on.

    Args:
        about: of each method, what a reader must know beside, as JSON takes it; methods that are not here are not written.

    Raises:
        InputError: a method's name cannot name a folder.
    """
    _check_names(about)
    for method in about:
        (folder / method).mkdir(parents=True)
    for number, image in enumerate(images):
        for method, facts in about.items():
            _write_maps(folder / method / f"{number:05}.npz", image, method, classes, facts)
        yield image


def _check_names(methods: Iterable[str]) -> None:
    """Refuses methods whose names cannot name a folder: no other names here become files, images are numbered."""
    for name in methods:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
            raise InputError(f"method: {name[:100]!r} names a folder; expected letters, digits, _ - and . only")


def _write_maps(
    path: Path, image: ExplainedImage, method: str, classes: Sequence[str], facts: Mapping[str, Any]
) -> None:
    places = image.places
    maps = image.maps[method][places]
    # float16 ends at 65,504: each image has its own scale, and its shape survives whatever the unit.
    scale = np.float32(np.abs(maps).max(initial=0) or 1)
    arrays = {
        "maps": (maps / scale).astype(np.float16),
        "scale": scale,
        "extent": np.array(image.extent, dtype=np.float32),
        "kind": np.array(image.kinds.get(method, "attribution")),
        "labels": image.labels[places].astype(np.int64),
        "against": np.array([image.rival(place) for place in places], dtype=np.int64),
        "names": np.array([image.name(place, classes) for place in places]),
        "classes": np.array(classes),
        "scores": image.scores,
        "logits": np.full_like(image.scores, np.nan) if image.logits is None else image.logits,
        "targets": image.targets,
        "key": np.array(image.key),
        "about": np.array(json.dumps({"method": method, **facts})),
    }
    write_arrays(path, arrays)


def save_pages(
    images: Iterable[ExplainedImage],
    folder: Path,
    classes: Sequence[str],
    methods: Sequence[ShownMethod],
    thresholds: float | Float[np.ndarray, " C"],
    *,
    num: int,
    title: str = "",
) -> Iterator[ExplainedImage]:
    """Draw the first images on `num` pages of each method, <method>_0.png ..., and pass all images on."""
    _check_names(method.name for method in methods)
    folder.mkdir()
    page, waiting = 0, []

    def draw() -> None:
        for method in methods:
            drawn = draw_grid(waiting, classes, method, thresholds, title=title)
            Image.fromarray(drawn).save(folder / f"{method.name}_{page}.png")

    for image in images:
        if page < num:
            waiting.append(image)
        if len(waiting) == PAGE:
            draw()
            page, waiting = page + 1, []
        yield image
    if waiting:
        draw()


def refuse_flat(images: Iterable[ExplainedImage], methods: Iterable[str]) -> Iterator[ExplainedImage]:
    """Pass the images on, and look whether each method said anything of any of them.

    Raises:
        InputError: after the last image, a method of which all maps are flat.
    """
    silent, count = list(methods), 0
    for image in images:
        count += 1
        silent = [name for name in silent if np.ptp(image.maps[name], axis=(1, 2)).max(initial=0) == 0]
        yield image
    if silent:
        raise InputError(
            f"{silent[0]}: the maps of all labels of all {count} images are flat; they explain nothing. The images may be "
            "uniform, the grid a single cell, or the model's answer constant"
        )
