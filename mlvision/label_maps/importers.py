"""Label maps that others published: one `.pt` file an image, in the layout of ReLabel and of Token Labeling.

`<root>/<folder>/<stem>.pt` holds one tensor `[2, K, ., .]`: at 0 the logits of each cell's K best classes, at 1 their class
ids as floats; float32 on 15 x 15 cells (ReLabel), float16 on 18 x 18 (Token Labeling).

The files say neither which of the two map axes is the height nor what a class is worth that they leave out; both readings
of the axes are in use. So the axes are demanded, and `detect_axes` finds them by comparison with maps of the same images.

The importer takes the maps to cover the whole image. Token Labeling's script may have made them of a centre crop (timm's
evaluation transform, at any crop_pct), which the files do not say either: read as maps of the whole image, such maps lie
beside their objects towards the image's edges.

Sources: Yun et al., "Re-labeling ImageNet: from Single to Multi-Labels, from Global to Localized Labels", CVPR 2021; Jiang
et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021; their published loaders.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from mlvision.errors import InputError
from mlvision.files import read_torch
from mlvision.types import LabelMap

AXES = ("hw", "wh")
FILLS = ("zero", "floor")
_CHANCE = 1e-3  # how probable a coin may make the verdict of `detect_axes`
_SLICES = "logits at 0, class ids at 1"


class PublishedMap(NamedTuple):
    """One image's map: `values` are logits, `fill` what a class that is not stored is worth in each cell."""

    row: int
    values: Float32[Tensor, "K h w"]
    ids: Int64[Tensor, "K h w"]
    fill: Float32[Tensor, "h w"]


def import_published(
    root: str, keys: Sequence[str], num_classes: int, *, axes: str, fill: str = "zero"
) -> Iterator[PublishedMap]:
    """The published maps of the images `keys`, in their order, with `row` counting them.

    Args:
        root: folder of the tree.
        keys: paths of the images; the last folder and the name up to its first dot say which file, as in both loaders.
        axes: order of the stored map axes, hw (rows first) or wh; see `detect_axes`.
        fill: zero: a class that is not stored has logit 0, as in both loaders, or the least stored logit of its cell where
            that is negative, so that no stored class ranks below the others; floor: the least stored logit.

    Raises:
        InputError: no such option, files that are missing or serve two images (before anything is read), or a file that
            is not in the layout (when it is reached); the message names it.
    """
    if axes not in AXES:
        raise InputError(
            f"axes: expected hw (rows first) or wh, got {axes!r}; the files do not say, but another teacher's maps of the "
            "same images tell them apart (reference=)"
        )
    if fill not in FILLS:
        raise InputError(f"fill: expected one of {', '.join(FILLS)}, got '{fill}'")
    paths = _find(root, keys)
    return _read_all(paths, num_classes, axes, fill)


def fingerprint(root: str, keys: Sequence[str], samples: int = 64) -> str:
    """sha256 of the published files' names and sizes, and of the content of some: tells one tree from another.

    Raises:
        InputError: as `import_published`, of files that are missing.
    """
    paths, digest = _find(root, keys), hashlib.sha256()
    for path in paths:
        digest.update(f"{os.path.relpath(path, root)} {os.path.getsize(path)}\n".encode())
    for place in {round(i * (len(paths) - 1) / max(samples - 1, 1)): None for i in range(samples)}:
        with open(paths[place], "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def _read_all(paths: Sequence[str], num_classes: int, axes: str, fill: str) -> Iterator[PublishedMap]:
    expected = None
    for row, path in enumerate(paths):
        values, ids = read_published(path, num_classes)
        expected = expected or values.shape
        if values.shape != expected:
            raise InputError(f"{path}: holds maps {list(values.shape)}, {paths[0]} has {list(expected)}")
        if axes == "wh":
            values, ids = values.mT.contiguous(), ids.mT.contiguous()
        floor = values.amin(dim=0)
        yield PublishedMap(row, values, ids, floor if fill == "floor" else floor.clamp(max=0))


def read_published(path: str, num_classes: int) -> tuple[Float32[Tensor, "K a b"], Int64[Tensor, "K a b"]]:
    """(logits, class ids) of one file, its map axes as they are stored.

    Raises:
        InputError: not the published layout, or one that can be read in two ways.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file, expected one tensor [2, K, h, w] ({_SLICES})")
    stored = read_torch(path)
    _check_layout(stored, path)
    faults = [_not_ids(part, num_classes) for part in stored]
    if not any(faults):
        raise InputError(
            f"{path}: ambiguous, either slice can be the class ids: {_reading(stored, 1)}, or {_reading(stored, 0)}"
        )
    if faults[1]:
        reverse = "" if faults[0] else f"; slice 0 can: {_reading(stored, 0)}, the reverse of the published layout"
        raise InputError(f"{path}: slice 1 cannot be the class ids, {faults[1]}{reverse}")
    return stored[0].float(), stored[1].long()


def _check_layout(stored: object, path: str) -> None:
    if not isinstance(stored, Tensor):
        raise InputError(f"{path}: holds a {type(stored).__name__}, expected one tensor [2, K, h, w] ({_SLICES})")
    shape = list(stored.shape)
    if stored.ndim == 4 and shape[0] == 3:
        raise InputError(
            f"{path}: holds {shape}, expected [2, K, h, w] ({_SLICES}); a third slice is what Token Labeling's training "
            "adds for the crop's coordinates, not a stored map"
        )
    if stored.ndim != 4 or shape[0] != 2 or not stored.numel():
        raise InputError(f"{path}: holds {shape}, expected [2, K, h, w] ({_SLICES})")
    if stored.dtype not in (torch.float32, torch.float16):
        raise InputError(f"{path}: holds {stored.dtype}, expected torch.float32 or torch.float16")
    if not stored.isfinite().all():
        bad = int((~stored.isfinite()).sum())
        raise InputError(f"{path}: {bad} of its {stored.numel()} numbers are NaN or infinite")


def _not_ids(part: Float[Tensor, "K a b"], num_classes: int) -> str:
    """Why a slice cannot be the class ids; empty where it can."""
    if not (part == part.round()).all():
        return f"it has {part[part != part.round()][0].item():g}, which is not whole"
    # As numbers: next to a float16 tensor num_classes would be rounded too.
    low, high = part.min().item(), part.max().item()
    if low < 0 or high >= num_classes:
        return f"it has {low if low < 0 else high:g}, expected 0 to {num_classes - 1}"
    # float16 rounds 2049 to 2048.
    exact = 2048 if num_classes <= 2049 else 2047
    if part.dtype == torch.float16 and high > exact:
        return f"it has {high:g} in float16, which is exact up to {exact} only"
    ordered = part.sort(dim=0).values
    twice = ordered[1:][ordered.diff(dim=0) == 0]
    if len(twice):
        return f"class {twice[0].item():g} occurs twice in one cell"
    return ""


def _reading(stored: Float[Tensor, "2 K a b"], ids_at: int) -> str:
    """What the first cell says where slice `ids_at` holds the ids."""
    ids, values = stored[ids_at, :, 0, 0].tolist(), stored[1 - ids_at, :, 0, 0].tolist()
    return f"ids at {ids_at}: class {ids[0]:g} has {values[0]:g} in the first cell"


def _find(root: str, keys: Sequence[str]) -> list[str]:
    """The file of each image; each folder is listed once, a question a file takes minutes on network storage."""
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such folder of published label maps")
    places = [(os.path.basename(os.path.dirname(key)), os.path.basename(key).split(".")[0] + ".pt") for key in keys]
    owner: dict[tuple[str, str], str] = {}
    for key, place in zip(keys, places, strict=True):
        if place in owner:
            raise InputError(f"{os.path.join(root, *place)}: is the file of two images, {owner[place]} and {key}")
        owner[place] = key
    folders = {folder: os.path.join(root, folder) for folder, _ in places}
    found = {name: set(os.listdir(path)) if os.path.isdir(path) else set() for name, path in folders.items()}
    missing = [place for place in places if place[1] not in found[place[0]]]
    if missing:
        raise InputError(
            f"{os.path.join(root, *missing[0])}: no such file, expected one tensor [2, K, h, w] for image "
            f"{owner[missing[0]]}; {len(missing):,} of {len(keys):,} files are missing"
        )
    return [os.path.join(root, *place) for place in places]


def detect_axes(maps: LabelMap, references: LabelMap, num_classes: int) -> str:
    """hw or wh: the order of the stored map axes of published maps.

    Each image's map is read both ways and compared with its reference; an image is for the reading that agrees better, and
    a reading wins where a coin would hardly show so many images for it (probability 0.001; 11 images of 11 suffice) and
    it also agrees better on average. Agreement is the correlation over cells and stored classes after each class's mean
    over the image is taken off: how much a class is supported at all says nothing about axes.

    Args:
        maps: some images' maps as they are stored, a row for each (`read_published`, stacked), with the fill of the import.
        references: maps of the same images by any teacher, rows first, of any layout, kind and grid.

    Raises:
        InputError: the images differ in number, or no reading wins; the message shows both with their scores.
    """
    if len(maps.values) != len(references.values):
        raise InputError(f"{len(maps.values)} maps and {len(references.values)} references: expected one for each")
    scores = torch.tensor([_agreement(maps, references, row, num_classes) for row in range(len(maps.values))])
    scores = scores.reshape(-1, len(AXES))
    better = [int((scores[:, i] > scores[:, 1 - i]).sum()) for i in range(2)]
    winner = int(better[1] > better[0])
    decided = sum(better)
    chance = 2 * sum(math.comb(decided, k) for k in range(better[winner], decided + 1)) / 2**decided
    means = scores.mean(dim=0).tolist() if len(scores) else [math.nan] * 2
    if chance > _CHANCE or not means[winner] > means[1 - winner]:
        readings = ", ".join(f"{AXES[i]} agrees {means[i]:.3f} and better in {better[i]} images" for i in range(2))
        raise InputError(
            f"the axes of the {len(scores)} published maps are ambiguous: {readings}; give more references"
        )
    return AXES[winner]


def _agreement(maps: LabelMap, references: LabelMap, row: int, num_classes: int) -> tuple[float, float]:
    """One image's agreement with its reference, its map read as hw and as wh."""
    classes = torch.arange(num_classes) if maps.ids is None else maps.ids[row].long().unique()
    classes = classes[None, classes >= 0]
    reference, stored = (one.rows(slice(row, row + 1)).of_labels(classes)[0].float() for one in (references, maps))
    scores = []
    for reading in (stored, stored.mT):
        target = F.interpolate(reference[None], size=tuple(reading.shape[1:]), mode="area")[0]
        a, b = (one - one.mean(dim=(1, 2), keepdim=True) for one in (reading, target))
        scores.append(float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)))
    return scores[0], scores[1]
