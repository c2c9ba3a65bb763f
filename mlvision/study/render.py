"""Maps over photos, drawn with numpy and Pillow: fast enough for a training loop, the same bytes every time."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image, ImageDraw

from mlvision.errors import InputError
from mlvision.explain.selection import OUTCOMES, outcomes
from mlvision.lettering import fitted, legible, length, short, write
from mlvision.space import LabelSpace

# Mistakes first: they are what a reader looks for.
ORDER = ("FN", "FP", "TP", "TN", "unknown")
OUTCOME_COLOURS = {"TP": "#0a8f5b", "FP": "#d0202e", "FN": "#e08600", "TN": "#8a919b", "unknown": "#8a919b"}
OPACITY = 0.8  # of the strongest cells; weaker ones let more of the photo through
PERCENTILE = 99  # of |M|: a single hot cell does not hide all others

# Colours of a label's strongest evidence against it, and for it; apart for every kind of colour vision.
_AGAINST, _FOR = (21, 92, 214), (226, 44, 18)
_STEPS = 255  # colours from 0 to the limit
_INK, _MUTED, _PAPER = "#1d2126", "#5c6570", "#ffffff"
_SIZE, GAP, _BORDER = 12, 10, 4  # pixels: text, space between tiles, border of a tile
_NAME, _LINES = 40, 6  # the longest name within other words, in letters; the longest paragraph, in lines
MINUS = "\u2212"


@dataclass(frozen=True)
class ShownMethod:
    """How a method's maps are to be read.

    Attributes:
        signed: evidence against a label is drawn too; else only the positive part of the maps is. Contrasts are drawn
            with both signs even so: what speaks against `a - b` speaks for b.
        magnitudes: the maps say how much, not which way, those of contrasts too: nothing has two signs.
        label_specific: False where an image has one map whatever the label.
        description: one line.
    """

    name: str
    signed: bool = False
    magnitudes: bool = False
    label_specific: bool = True
    description: str = ""

    @classmethod
    def of(cls, name: str, explainer: object) -> "ShownMethod":
        """As the explainer itself says, with the first sentence of its docstring."""
        sentence = re.split(r"(?<=\.)\s+(?=[A-Z])", inspect.cleandoc(type(explainer).__doc__ or ""), maxsplit=1)[0]
        return cls(
            name,
            signed=getattr(explainer, "signed", False),
            magnitudes=getattr(explainer, "magnitudes", False),
            label_specific=getattr(explainer, "label_specific", True),
            description=" ".join(sentence.split()),
        )


@dataclass(frozen=True)
class ExplainedImage:
    """One image, what a model said about it, and the maps of some of its labels.

    Attributes:
        key: the image's key in its manifest.
        photo: exactly the part of the image that the maps cover.
        scores: in [0, 1], one a class.
        targets: 1 present, 0 absent, NaN unknown, one a class.
        labels: class indices of the explained labels; negative ones are empty places, which are left out.
        maps: each method's maps of these labels, of its own resolution, rows first; a method may be missing.
        logits: one a class; None: not shown.
        loss: of this image; NaN where there is none.
        against: for a contrast `a - b` the class b, -1 elsewhere; None: no contrasts.
        measures: by method and by the measure's name one number a label; NaN is not shown.
        extent: x1, y1, x2, y2 in [0, 1] of the full image: the part that the photo shows.
        kinds: by method what its values are, as `LabelMap.kind`; attribution where nothing is said.
        areas: by class the outlines of its annotated objects, each `[m, 2]` x, y in [0, 1] of the photo.
        space: how the scores decide; None: each class for itself.
    """

    key: str
    photo: UInt8[np.ndarray, "H W 3"]
    scores: Float[np.ndarray, " C"]
    targets: Float[np.ndarray, " C"]
    labels: Integer[np.ndarray, " L"]
    maps: Mapping[str, Float[np.ndarray, "_L _h _w"]]
    logits: Float[np.ndarray, " C"] | None = None
    loss: float = float("nan")
    against: Integer[np.ndarray, " L"] | None = None
    measures: Mapping[str, Mapping[str, Float[np.ndarray, " _L"]]] = field(default_factory=dict)
    extent: Sequence[float] = (0.0, 0.0, 1.0, 1.0)
    kinds: Mapping[str, str] = field(default_factory=dict)
    areas: Mapping[int, Sequence[Float[np.ndarray, "_ 2"]]] = field(default_factory=dict)
    space: LabelSpace | None = None

    def __post_init__(self) -> None:
        num_labels, num_classes = len(self.labels), len(self.scores)
        if num_labels and int(self.labels.max()) >= num_classes:
            raise InputError(f"{self.key}: label {int(self.labels.max())} is beyond the {num_classes} classes")
        for method, maps in self.maps.items():
            if maps.ndim != 3 or len(maps) != num_labels or not maps.size:
                raise InputError(f"{self.key}: maps of {method}: expected [{num_labels}, h, w], got {list(maps.shape)}")
            if not np.isfinite(maps[self.labels >= 0]).all():
                raise InputError(f"{self.key}: maps of {method} hold values that are not finite")

    @property
    def places(self) -> list[int]:
        """The places of `labels` that are not empty."""
        return np.flatnonzero(self.labels >= 0).tolist()

    def rival(self, place: int) -> int:
        """The class that the label at a place is set against; -1: none."""
        return -1 if self.against is None else int(self.against[place])

    def name(self, place: int, classes: Sequence[str]) -> str:
        """The label at a place in words, of a contrast both its classes."""
        name, rival = classes[int(self.labels[place])], self.rival(place)
        return name if rival < 0 else f"{name} {MINUS} {classes[rival]}"

    def signed(self, place: int, method: ShownMethod) -> bool:
        """Whether the map of a label is drawn with both signs."""
        return method.signed or (self.rival(place) >= 0 and not method.magnitudes)

    def predicted(self, thresholds: float | Float[np.ndarray, " C"]) -> Bool[np.ndarray, " C"]:
        """Which classes count as present by their scores."""
        return LabelSpace.of(self.space, len(self.scores)).decide(self.scores, thresholds)

    def outcomes(self, thresholds: float | Float[np.ndarray, " C"]) -> list[str]:
        """TP, FP, FN, TN or unknown, one a class."""
        predicted, targets = (torch.as_tensor(row)[None] for row in (self.predicted(thresholds), self.targets))
        return [OUTCOMES[o] if o >= 0 else "unknown" for o in outcomes(predicted, targets)[0].tolist()]

    def in_order(self, thresholds: float | Float[np.ndarray, " C"]) -> list[int]:
        """The places that are not empty: FN and FP first, then the highest scores."""
        said = self.outcomes(thresholds)
        return sorted(
            self.places, key=lambda p: (ORDER.index(said[self.labels[p]]), -float(self.scores[self.labels[p]]))
        )


@cache
def colour_table(signed: bool) -> UInt8[np.ndarray, "n 4"]:
    """RGBA from 0 to the limit, 256 colours; signed: from -limit through 0 to +limit, 511 colours.

    Alpha grows in proportion to the magnitude. Unsigned maps have matplotlib's perceptually uniform `plasma`: of its
    family the one that is least like vegetation, soil and sky.
    """
    strength = np.arange(_STEPS + 1) / _STEPS
    if signed:
        table = np.empty((2 * _STEPS + 1, 4))
        table[:_STEPS, :3], table[_STEPS:, :3] = _AGAINST, _FOR
        table[:, 3] = 255 * np.concatenate([strength[:0:-1], strength])
    else:
        from matplotlib import colormaps

        table = 255 * colormaps["plasma"](strength)
        table[:, 3] = 255 * strength
    return np.floor(table + 0.5).astype(np.uint8)


def shown_part(
    maps: Float[np.ndarray, "L h w"], image: ExplainedImage, method: ShownMethod
) -> Float[np.ndarray, "L h w"]:
    """What is drawn of the maps of an image's `places`: all of signed ones, else their positive part."""
    signed = np.array([image.signed(place, method) for place in image.places], dtype=bool)
    return np.where(signed[:, None, None], maps, maps.clip(min=0))


def shared_limit(maps: Float[np.ndarray, "L h w"]) -> float:
    """The end of the colour scale that all labels of an image share: the 99th percentile of |M|.

    The maximum where that is 0, as for maps with few cells that are not. 0: there is nothing to draw.
    """
    if not maps.size:
        return 0.0
    magnitude = np.abs(maps)
    return float(np.percentile(magnitude, PERCENTILE)) or float(magnitude.max())


def colourise(values: Float[np.ndarray, "h w"], limit: float, signed: bool) -> UInt8[np.ndarray, "h w 4"]:
    """A map as colours to lay over a photo: transparent where it is 0, opaque from the limit on.

    Args:
        limit: the magnitude at the end of the scale, which is symmetric for signed maps; 0 gives no colour at all.
        signed: blue below 0, red above; else from dark violet to yellow, and nothing below 0.
    """
    table = colour_table(signed)
    if not limit > 0:
        return np.zeros((*values.shape, 4), np.uint8)
    share = (values.astype(np.float64) / limit).clip(-1 if signed else 0, 1)
    return table[np.rint(share * _STEPS).astype(int) + (_STEPS if signed else 0)]


def upsample(values: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Bilinear between the centres of the cells, to (H, W); beyond the outer centres the outermost cell."""
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def overlay(
    photo: UInt8[np.ndarray, "H W 3"],
    values: Float[np.ndarray, "h w"],
    limit: float,
    signed: bool,
    opacity: float = OPACITY,
) -> UInt8[np.ndarray, "H W 3"]:
    """A map over the photo that it covers; the photo's own brightness stays as it is.

    Values are enlarged, not colours: the colour between two cells is one of the scale.
    """
    colours = colourise(upsample(values, (photo.shape[0], photo.shape[1])), limit, signed).astype(np.float32)
    alpha = colours[..., 3:] * (opacity / 255)
    return np.floor(photo * (1 - alpha) + colours[..., :3] * alpha + 0.5).astype(np.uint8)


def draw_grid(
    images: Sequence[ExplainedImage],
    classes: Sequence[str],
    method: ShownMethod,
    thresholds: float | Float[np.ndarray, " C"] = 0.5,
    *,
    title: str = "",
    tile_px: int = 176,
    columns: int = 8,
    opacity: float = OPACITY,
) -> UInt8[np.ndarray, "H W 3"]:
    """One page of one method: a row of an image holds its photo, then a tile for each label, mistakes first.

    The border and the caption of a tile both say its outcome. All tiles of an image share one colour scale, whose bar is
    under the photo. Rows of more labels than `columns` continue below.

    Args:
        images: those that `maps` has no such method of are left out.
        tile_px: the longest side of a photo.
        columns: tiles beside the photo.

    Raises:
        InputError: no image has maps of the method.
    """
    images = [image for image in images if method.name in image.maps and image.places]
    if not images:
        raise InputError(f"grid: no image has maps of {method.name}")
    columns = min(columns, max(len(image.places) for image in images))
    width = (columns + 1) * (tile_px + GAP) + GAP
    if method.magnitudes:
        notes = ["violet to yellow: how much a pixel could change the score, not which way"]
    elif method.signed:
        notes = ["blue: evidence against a label, red: for it"]
    else:
        notes = ["violet to yellow: evidence for a label"]
    if method.description:
        notes.insert(0, method.description.rstrip("."))
    if not method.magnitudes and any(image.rival(place) >= 0 for image in images for place in image.places):
        notes.append("a contrast: red for its first label, blue for its second")
    if not method.label_specific:
        notes.append("not label-specific: one map for all labels of an image")
    blocks = [
        draw_text(" · ".join(filter(None, (title, method.name))), width, bold=True, size=16),
        draw_text("; ".join(notes), width),
    ]
    for image in images:
        blocks += _row(image, classes, method, thresholds, (tile_px, columns, width), opacity)
    return stack(blocks)


def _row(
    image: ExplainedImage,
    classes: Sequence[str],
    method: ShownMethod,
    thresholds: float | Float[np.ndarray, " C"],
    sizes: tuple[int, int, int],
    opacity: float,
) -> list[Image.Image]:
    """The blocks of one image: words over the whole width, then lines of tiles."""
    tile_px, columns, width = sizes
    truth = [short(classes[c], _NAME) for c in np.flatnonzero(image.targets == 1).tolist()]
    known = ", ".join(truth) or ("none" if (image.targets == 0).all() else "none known")
    loss = "" if np.isnan(image.loss) else f" · loss {image.loss:.3f}"
    key = fitted(image.key, width / 2, _SIZE, bold=True, keep_end=True)
    words = draw_text(f"{key}{loss} · ground truth: {known}", width, bold=True)

    native = image.maps[method.name][image.places]
    maps = dict(zip(image.places, shown_part(native, image, method), strict=True))
    silence = {p: _silence(v, image.signed(p, method)) for p, v in zip(image.places, native, strict=True)}
    drawn = [maps[place] for place in image.places if not silence[place]]
    limit = shared_limit(np.stack(drawn)) if drawn else 0.0
    scale = (tile_px - 2 * _BORDER) / max(image.photo.shape[:2])
    size = [max(1, round(side * scale)) for side in image.photo.shape[:2]]
    photo = np.asarray(Image.fromarray(image.photo).resize((size[1], size[0]), Image.Resampling.LANCZOS))
    said = image.outcomes(thresholds)
    has_rivals = any(image.rival(place) >= 0 for place in image.places)

    tiles = [draw_tile(photo, _MUTED, [], tile_px, 2 + has_rivals, _bar(limit, method.signed, tile_px))]
    for place in image.in_order(thresholds):
        c, rival = int(image.labels[place]), image.rival(place)
        lines = [image.name(place, classes), f"p={image.scores[c]:.2f} GT={_truth(float(image.targets[c]))} {said[c]}"]
        if rival >= 0:
            lines += [f"second: p={image.scores[rival]:.2f} GT={_truth(float(image.targets[rival]))}"]
        signed = image.signed(place, method)
        picture = photo if silence[place] else overlay(photo, maps[place], limit, signed, opacity)
        tiles.append(draw_tile(picture, OUTCOME_COLOURS[said[c]], lines, tile_px, 2 + has_rivals, silence[place]))
    blank = draw_tile(np.full_like(photo, 255), _PAPER, [], tile_px, 2 + has_rivals)
    lines_of_tiles = [
        side_by_side([blank if first > 1 else tiles[0], *tiles[first : first + columns]], width)
        for first in range(1, len(tiles), columns)
    ]
    return [words, *lines_of_tiles]


def side_by_side(tiles: Sequence[Image.Image], width: int) -> Image.Image:
    """Tiles of one size in a line."""
    line = Image.new("RGB", (width, tiles[0].height + GAP), _PAPER)
    for number, tile in enumerate(tiles):
        line.paste(tile, (GAP + number * (tile.width + GAP), 0))
    return line


def stack(blocks: Sequence[Image.Image]) -> UInt8[np.ndarray, "H W 3"]:
    """A page of blocks of one width, from the top down."""
    page = Image.new("RGB", (blocks[0].width, sum(block.height for block in blocks) + GAP), _PAPER)
    y = 0
    for block in blocks:
        page.paste(block, (0, y))
        y += block.height
    return np.asarray(page)


def draw_tile(
    picture: UInt8[np.ndarray, "H W 3"],
    border: str,
    lines: list[str],
    width: int,
    num_lines: int,
    extra: "Image.Image | str" = "",
) -> Image.Image:
    """A picture in its border with a caption below; `extra` is a colour bar, or words over the picture."""
    below = num_lines * (_SIZE + 4) + 4
    tile = Image.new("RGB", (width, picture.shape[0] + 2 * _BORDER + below), _PAPER)
    inner = Image.fromarray(picture)
    draw = ImageDraw.Draw(tile)
    outer = (inner.width + 2 * _BORDER - 1, inner.height + 2 * _BORDER - 1)
    draw.rectangle((0, 0, *outer), fill=border)  # around the photo, never on it: an edge cell may be the peak
    tile.paste(inner, (_BORDER, _BORDER))
    y = outer[1] + 4
    if isinstance(extra, Image.Image):
        tile.paste(extra, (0, y))
    elif extra := fitted(extra, inner.width - 8, _SIZE):  # a tall photo is narrow
        draw.rectangle((_BORDER, _BORDER, _BORDER + length(extra, _SIZE) + 8, _BORDER + _SIZE + 8), fill=_INK)
        write(draw, (_BORDER + 4, _BORDER + 2), extra, _SIZE, _PAPER)
    for number, line in enumerate(lines):
        bold = number == 0
        write(draw, (0, y + number * (_SIZE + 4)), fitted(line, width, _SIZE, bold=bold), _SIZE, _INK, bold=bold)
    return tile


def _bar(limit: float, signed: bool, width: int) -> Image.Image:
    """The colour bar, over grey as over a photo, with its numbers."""
    ends = np.linspace(-limit if signed else 0, limit, width)
    grey = np.full((10, width, 3), 200, np.uint8)
    bar = Image.new("RGB", (width, 2 * (_SIZE + 4)), _PAPER)
    bar.paste(Image.fromarray(overlay(grey, ends[None], limit, signed, 1.0)), (0, 2))
    draw = ImageDraw.Draw(bar)
    if not limit > 0:
        write(draw, (0, 14), "nothing to draw", _SIZE, _MUTED)
        return bar
    marks = [(0, number(-limit), "la"), (width / 2, "0", "ma"), (width, "+" + number(limit), "ra")]
    for x, text, anchor in marks if signed else [(0, "0", "la"), (width, number(limit), "ra")]:
        write(draw, (x, 14), text, _SIZE, _INK, anchor=anchor)
    return bar


def number(value: float) -> str:
    """Three significant digits, with a minus that is one."""
    text = f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
    return text.replace("-", MINUS)


def _silence(values: Float[np.ndarray, "h w"], signed: bool) -> str:
    """Why a map has nothing to draw; empty where it has."""
    if values.max() == values.min():
        return "flat map"
    return "" if signed or values.max() > 0 else "no positive evidence"


def _truth(target: float) -> str:
    return "?" if np.isnan(target) else f"{target:.0f}"


def draw_text(text: str, width: int, bold: bool = False, size: int = _SIZE) -> Image.Image:
    """A paragraph over the whole width, of a few lines at most."""
    room, lines = width - 2 * GAP, []
    for word in legible(text).split():
        if lines and length(longer := f"{lines[-1]} {word}", size, bold) <= room:
            lines[-1] = longer
        elif len(lines) == _LINES:
            lines[-1] = fitted(f"{lines[-1]} …", room, size, bold=bold)
            break
        else:
            lines.append(fitted(word, room, size, bold=bold))
    block = Image.new("RGB", (width, max(1, len(lines)) * (size + 5) + GAP), _PAPER)
    draw = ImageDraw.Draw(block)
    for row, line in enumerate(lines):
        write(draw, (GAP, GAP - 2 + row * (size + 5)), line, size, _INK if bold else _MUTED, bold=bold)
    return block
