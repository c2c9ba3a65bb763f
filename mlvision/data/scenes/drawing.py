"""What `scenes` draws with: glyph shapes, distractors, fills and backgrounds; and from pixels back to polygons."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from contourpy import FillType, contour_generator
from jaxtyping import Bool, Float, Float32
from PIL import Image, ImageDraw

# Symbols of the DejaVu Sans that matplotlib ships, chosen for outlines that stay apart from each other when small,
# turned and half hidden. Rows are the pairs that `ScenesConfig.co_occurrence` plants.
GLYPHS = {
    "airplane": "\u2708", "envelope": "\u2709",
    "telephone": "\u260e", "cup": "\u2615",
    "umbrella": "\u2602", "snowman": "\u2603",
    "anchor": "\u2693", "ship wheel": "\u2638",
    "scissors": "\u2702", "pencil": "\u270e",
    "gear": "\u2699", "hammers": "\u2692",
    "scales": "\u2696", "alembic": "\u2697",
    "skull": "\u2620", "swords": "\u2694",
    "chess knight": "\u265e", "chess rook": "\u265c",
    "sun": "\u2600", "cloud": "\u2601",
    "heart": "\u2665", "music note": "\u266b",
    "cat": "\U0001f431", "mouse": "\U0001f42d",
    "star": "\u2605", "snowflake": "\u2744",
}  # fmt: skip

_SUPERSAMPLE = 4
# Hairlines of the font (snowman, cup) are under a pixel wide on a small object: every outline is drawn this much
# bolder, as a share of the glyph's longest side.
_BOLD = 0.02

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

Pattern = Callable[[np.random.Generator, int], Float32[np.ndarray, "H W"]]


@cache
def glyph_contours(name: str) -> tuple[tuple[Float32[np.ndarray, "_ 2"], bool], ...]:
    """The closed contours of a class, each with True where it encloses ink and False where it cuts a hole.

    In the order to paint them (a contour comes after the one around it); x right, y down, centred on 0, the longest
    side 1.
    """
    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    # By file, not by name: a system font of the same name may have other outlines.
    font = FontProperties(fname=Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    contours = TextPath((0, 0), GLYPHS[name], size=100, prop=font).to_polygons(closed_only=True)
    every = np.concatenate(contours)
    low, high = every.min(axis=0), every.max(axis=0)
    scale = np.array([1, -1]) / (high - low).max()
    contours = [(contour - (low + high) / 2) * scale for contour in contours]
    areas = [_signed_area(contour) for contour in contours]
    order = np.argsort([-abs(area) for area in areas])
    ink = np.sign(areas[order[0]])  # the font winds ink one way and holes the other
    return tuple((contours[i].astype(np.float32), bool(np.sign(areas[i]) == ink)) for i in order)


def _signed_area(contour: Float[np.ndarray, "n 2"]) -> float:
    x, y = contour.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def glyph_coverage(
    name: str, size: int, length: float, angle: float, corner: Float[np.ndarray, "2"]
) -> Float32[np.ndarray, "H W"]:
    """A glyph on a `size` x `size` image: the share of each pixel that it covers, in [0, 1].

    Args:
        name: a key of GLYPHS.
        size: side of the image in pixels.
        length: longest side, in pixels, of the upright box around the turned glyph.
        angle: turn in radians.
        corner: where that box lies within its room to move: (0, 0) touches the left and top edge of the image,
            (1, 1) the right and bottom edge.
    """
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], dtype=np.float32)
    contours = [(contour @ turn, ink) for contour, ink in glyph_contours(name)]
    every = np.concatenate([contour for contour, _ in contours])
    low, high = every.min(axis=0), every.max(axis=0)
    scale = length / (float((high - low).max()) + _BOLD)
    bold = _BOLD * scale
    offset = bold / 2 + corner * (size - bold - (high - low) * scale) - low * scale
    return coverage(size, [(contour * scale + offset, ink) for contour, ink in contours], bold)


def coverage(
    size: int, contours: list[tuple[Float[np.ndarray, "_ 2"], bool]], stroke: float = 0.0, closed: bool = True
) -> Float32[np.ndarray, "H W"]:
    """Antialiased contours: painted in order (True: ink, False: hole), then outlined `stroke` pixels wide.

    With `closed=False` the contours are open lines and only their stroke is drawn.
    """
    canvas = Image.new("L", (size * _SUPERSAMPLE, size * _SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    points = [(contour * _SUPERSAMPLE).ravel().tolist() for contour, _ in contours]
    if closed:
        for flat, (_, ink) in zip(points, contours, strict=True):
            draw.polygon(flat, fill=255 if ink else 0)
    if stroke:
        for flat in points:
            draw.line(flat + flat[:2] * closed, fill=255, width=max(1, round(stroke * _SUPERSAMPLE)))
    return np.asarray(canvas.reduce(_SUPERSAMPLE), dtype=np.float32) / 255


def paint(
    rng: np.random.Generator,
    canvas: Float32[np.ndarray, "H W 3"],
    alpha: Float32[np.ndarray, "H W"],
    split: str,
    difficulty: float,
) -> None:
    """Fill a shape, in place, with two colours that are both lighter or both darker than what surrounds it."""
    rows, columns = np.nonzero(alpha.any(axis=1))[0], np.nonzero(alpha.any(axis=0))[0]
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    around = canvas[box] @ _LUMA
    mean, spread = around.mean(), around.std()
    contrast = spread + 0.35 - 0.2 * difficulty
    colours = rng.uniform(size=(64, 3)).astype(np.float32)
    luma = colours @ _LUMA
    darker, lighter = luma < mean - contrast, luma > mean + contrast
    side = darker if rng.random() * (darker.sum() + lighter.sum()) < darker.sum() else lighter
    if side.sum() < 2:  # surroundings from dark to bright: the lightest or the darkest will do
        side = np.argsort(luma if mean > 0.5 else -luma)
    first, second = colours[side][:2]
    patterns = _PATTERNS[split]
    mix = patterns[rng.integers(len(patterns))](rng, len(canvas))[box]
    fill = first + (second - first) * mix[..., None]
    canvas[box] += alpha[box][..., None] * (fill - canvas[box])


def distractor(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "H W"]:
    """A shape of no class: an ellipse, a polygon with random corners, or a bent stroke."""
    centre, radius = size * rng.uniform(0.05, 0.95, 2), size * rng.uniform(0.05, 0.2)
    kind = rng.integers(3)
    if kind == 2:
        start, (bend, end) = centre, centre + rng.uniform(-3, 3, (2, 2)) * radius
        t = np.linspace(0, 1, 16)[:, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        return coverage(size, [(curve, True)], stroke=size * rng.uniform(0.015, 0.05), closed=False)
    corners = 32 if kind == 0 else rng.integers(3, 8)
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False) + rng.uniform(0, 2 * np.pi)
    reach = rng.uniform(0.5, 1, 2) if kind == 0 else rng.uniform(0.5, 1, (corners, 1))
    turn = rng.uniform(0, np.pi)
    shape = np.stack([np.cos(angle), np.sin(angle)], axis=1) * reach * radius
    shape = shape @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return coverage(size, [(shape + centre, True)])


def _grid(size: int) -> tuple[Float32[np.ndarray, "1 W"], Float32[np.ndarray, "H 1"]]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return axis[None, :], axis[:, None]


def _along(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "H W"]:
    """How far each pixel lies along a random direction, from the image's centre, in sides of the image."""
    angle = rng.uniform(0, 2 * np.pi)
    x, y = _grid(size)
    return (x - 0.5) * np.float32(np.cos(angle)) + (y - 0.5) * np.float32(np.sin(angle))


def _around(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "H W"]:
    """The distance of each pixel from a random point, in sides of the image."""
    x, y = _grid(size)
    centre = rng.uniform(0, 1, 2).astype(np.float32)
    return np.hypot(x - centre[0], y - centre[1])


def _value_noise(rng: np.random.Generator, size: int, cells: int) -> Float32[np.ndarray, "H W"]:
    """Smooth noise: a coarse grid of normal values, enlarged."""
    grid = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def _flat(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "H W"]:
    return np.zeros((size, size), dtype=np.float32)


def _ramp(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "H W"]:
    return (_along(rng, size) + 0.5).clip(0, 1)


def _stripes(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "H W"]:
    return np.sin(_along(rng, size) * rng.uniform(40, 90)) / 2 + 0.5


def _dots(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "H W"]:
    period = rng.uniform(40, 70)
    x, y = _grid(size)
    return (np.sin(x * period) * np.sin(y * period)).clip(0, 1)


def _halo(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "H W"]:
    return _around(rng, size).clip(0, 1)


def _checks(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "H W"]:
    period = rng.uniform(10, 20)
    x, y = _grid(size)
    return (np.floor(x * period) + np.floor(y * period)) % 2


def _marble(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "H W"]:
    return (_value_noise(rng, size, 12) / 2 + 0.5).clip(0, 1)


# How a shape's two colours mix. The splits share plain fills only.
_PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "train": (_flat, _ramp, _stripes, _dots),
    "test": (_flat, _halo, _checks, _marble),
}


def background(rng: np.random.Generator, size: int, split: str) -> Float32[np.ndarray, "H W 3"]:
    """Smooth clutter: a gradient, colour noise and blobs; of another family for each split."""
    train = split == "train"
    ramp = (_ramp if train else _halo)(rng, size)
    canvas = np.empty((size, size, 3), dtype=np.float32)
    first, second = rng.uniform(0.1, 0.9, (2, 3)).astype(np.float32)
    canvas[:] = first + (second - first) * ramp[..., None]
    for _ in range(4):
        if train:
            noise = _value_noise(rng, size, int(rng.integers(3, 9)))
        else:
            noise = np.sin(_along(rng, size) * rng.uniform(5, 25) + rng.uniform(0, 2 * np.pi))
        canvas += noise[..., None] * rng.normal(0, 0.06, 3).astype(np.float32)
    for _ in range(rng.integers(1, 5)):
        width = rng.uniform(0.05, 0.2)
        distance = _around(rng, size) if train else np.abs(_along(rng, size) + rng.uniform(-0.5, 0.5))
        blob = np.exp(-((distance / width) ** 2))[..., None]
        canvas += 0.6 * blob * (rng.uniform(size=3).astype(np.float32) - canvas)
    return canvas.clip(0, 1)


def mask_polygons(mask: Bool[np.ndarray, "H W"]) -> list[list[float]]:
    """Polygons of a mask in COCO's form: each `[x1, y1, x2, y2, ...]` in pixels, the mask their union.

    A polygon cannot state a hole: each hole is joined to the contour around it by a cut of no width, walked there and
    back, which every even-odd or winding rasteriser cancels. The contour runs half way between the centres of inside
    and outside pixels, so a rasteriser that asks for pixel centres gives the mask back exactly.
    """
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    inked = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    corner = columns[0], rows[0]
    tracer = contour_generator(z=np.pad(inked, 1).astype(np.float64), fill_type=FillType.OuterOffset)
    polygons = []
    for points, offsets in zip(*tracer.filled(0.5, 2.0), strict=True):
        # Padding moved everything by 1, and the centre of pixel i is at i + 0.5. A ring repeats its first point.
        rings = [points[a : b - 1] - 0.5 + corner for a, b in pairwise(offsets)]
        outer, *holes = [_without_straight_points(ring) for ring in rings]
        polygons.append(_cut_to_holes(outer, holes).ravel().tolist())
    return polygons


def _without_straight_points(ring: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "m 2"]:
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _cut_to_holes(outer: Float[np.ndarray, "n 2"], holes: list[np.ndarray]) -> Float[np.ndarray, "m 2"]:
    for hole in holes:
        distance = np.square(outer[:, None] - hole).sum(axis=-1)
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        outer = np.concatenate([outer[: i + 1], np.roll(hole, -j, axis=0), hole[j : j + 1], outer[i:]])
    return outer
