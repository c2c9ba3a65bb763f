"""The shape of maps alone: how simple each is, how well two agree, how far one moves.

One row is one map, rows first. Only the pattern of a map counts here, never its scale; where a map has none (it is 0
everywhere, or the same everywhere and its order is asked for), the value is NaN. Everything is computed in float64 and given
as NumPy arrays.
"""

from io import BytesIO

import numpy as np
from jaxtyping import Float, Float64, Shaped, UInt8
from PIL import Image
from torch import Tensor

from mlvision.errors import InputError
from mlvision.metrics.inputs import check_maps, flattened, to_array

PNG_SIDE = 224  # px
PNG_LEVEL = 9


def gini(maps: Float[np.ndarray | Tensor, "N h w"]) -> Float64[np.ndarray, " N"]:
    """Give the Gini index of |map|: 0 where all cells are equal, 1 - 1 / cells where one holds everything.

    The highest value depends on the number of cells: compare maps of one size.

    Returns:
        NaN for a map that is 0 everywhere.

    Raises:
        InputError: Maps that are no [N, h, w] or not finite.

    Source: Chalasani et al., "Concise Explanations of Neural Networks using Adversarial Training", ICML 2020; Hurley and
        Rickard, "Comparing Measures of Sparsity", IEEE Transactions on Information Theory 2009.
    """
    shares = np.sort(_shares(maps), axis=1)
    cells = shares.shape[1]
    return ((shares * (2 * np.arange(1, cells + 1) - cells - 1)).sum(axis=1) / cells).clip(
        0, 1
    )  # beyond by rounding only


def entropy(maps: Float[np.ndarray | Tensor, "N h w"]) -> Float64[np.ndarray, " N"]:
    """Give the entropy of |map|: 0 where one cell holds everything, 1 where all are equal.

    That is of |map| as shares of its sum, over log(cells).

    Returns:
        NaN for a map that is 0 everywhere, or of a single cell.

    Raises:
        InputError: Maps that are no [N, h, w] or not finite.

    Source: Bhatt et al., "Evaluating and Aggregating Feature-based Model Explanations", IJCAI 2020 (complexity).

    DEVIATION: they do not divide by log(cells); so maps of two sizes would not compare.
    """
    shares = _shares(maps)
    cells = shares.shape[1]
    terms = shares * np.log(np.where(shares == 0, 1, shares))  # NaN stays NaN
    value = np.abs(terms.sum(axis=1)) / (np.log(cells) if cells > 1 else np.nan)  # abs: 0 rather than -0
    return value.clip(0, 1)  # beyond by rounding only


def _shares(maps: Float[np.ndarray | Tensor, "N h w"]) -> Float64[np.ndarray, "N cells"]:
    """|map| as shares of its sum; NaN where that is 0."""
    values = to_array(maps)
    check_maps(values)
    sizes = flattened(np.abs(_scaled(values)))
    return sizes / sizes.sum(axis=1, keepdims=True)


def _scaled(values: Shaped[np.ndarray, "N h w"]) -> Float64[np.ndarray, "N h w"]:
    """Each map over its own highest |value|: -1 to 1; NaN where that is 0."""
    values = values.astype(np.float64)  # an integer may have no positive of its lowest value
    highest = np.abs(values).max(axis=(1, 2), keepdims=True)
    return values / np.where(highest > 0, highest, np.nan)


def png_bytes(maps: Float[np.ndarray | Tensor, "N h w"]) -> Float64[np.ndarray, " N"]:
    """Give the bytes of each map as a PNG file, a measure of its complexity: lower is simpler.

    The map is divided by its own highest |value|, resized to PNG_SIDE x PNG_SIDE (bilinear; larger maps are averaged down;
    the aspect ratio is not kept), and written as 8-bit grey, 128 + 127 value, at zlib level PNG_LEVEL. The encoder is
    Pillow's: compare sizes of one version of it. Coarse maps are smooth here, so they are simpler than fine ones by
    construction.

    Returns:
        Whole numbers; NaN for a map that is 0 everywhere, which has no scale.

    Raises:
        InputError: Maps that are no [N, h, w] or not finite.
    """
    values = to_array(maps)
    check_maps(values)
    scaled = _scaled(values)
    sizes = np.full(len(scaled), np.nan)
    for row, plane in enumerate(scaled):
        if not np.isnan(plane).any():
            sizes[row] = _file_size(_grey(plane))
    return sizes


def _grey(plane: Float64[np.ndarray, "h w"]) -> UInt8[np.ndarray, "H W"]:
    # Resized before it is rounded: a coarse map in grey levels would have steps in its slopes.
    image = Image.fromarray(plane.astype(np.float32)).resize((PNG_SIDE, PNG_SIDE), Image.Resampling.BILINEAR)
    return np.rint(128 + 127 * np.asarray(image, dtype=np.float64)).astype(np.uint8)


def _file_size(grey: UInt8[np.ndarray, "H W"]) -> int:
    file = BytesIO()
    Image.fromarray(grey).save(file, format="PNG", optimize=False, compress_level=PNG_LEVEL)
    return file.tell()


def spearman(
    a: Float[np.ndarray | Tensor, "N h w"], b: Float[np.ndarray | Tensor, "N h w"]
) -> Float64[np.ndarray, " N"]:
    """Give the rank correlation of each pair of maps, -1 to 1; equal cells have the mean of their ranks.

    Returns:
        NaN where one of the two is flat (the same in all cells): it has no order.

    Raises:
        InputError: Maps of different shapes, that are no [N, h, w], or not finite.
    """
    first, second = to_array(a), to_array(b)
    if first.shape != second.shape:
        raise InputError(f"maps of shapes {first.shape} and {second.shape}: expected one shape")
    check_maps(first, "a")
    check_maps(second, "b")
    return (_unit_ranks(first) * _unit_ranks(second)).sum(axis=1).clip(-1, 1)  # beyond by rounding only


def map_discrimination(maps: Float[np.ndarray | Tensor, "L h w"]) -> float:
    """Give 1 - the mean rank correlation over all pairs of one image's maps: 0 where all labels have the same map, to 2.

    Flat maps have no order and are left out. High values are no proof of quality: random maps come to 1.

    Args:
        maps: Of the labels that are compared, without empty places.

    Returns:
        NaN with fewer than two maps that are not flat.

    Raises:
        InputError: Maps that are no [L, h, w] or not finite.
    """
    values = to_array(maps)
    check_maps(values)
    ranks = _unit_ranks(values)
    ranks = ranks[~np.isnan(ranks).any(axis=1)]
    if len(ranks) < 2:
        return float("nan")
    upper = np.triu_indices(len(ranks), k=1)
    return float(1 - (ranks @ ranks.T)[upper].clip(-1, 1).mean())


def _unit_ranks(maps: Shaped[np.ndarray, "N h w"]) -> Float64[np.ndarray, "N cells"]:
    """The ranks of each map's cells, shifted to mean 0 and scaled to norm 1; NaN for a flat map."""
    flat = flattened(maps)
    order = np.argsort(flat, axis=1)
    ordered = np.take_along_axis(flat, order, axis=1)
    # Equal cells form a group; a row's first cell always begins one, so that no group spans two rows.
    begins = np.ones(flat.shape, dtype=bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = np.cumsum(begins.ravel()) - 1
    place = np.tile(np.arange(flat.shape[1]), len(flat))
    mean = np.bincount(group, weights=place) / np.bincount(group)
    ranks = np.empty(flat.shape)
    np.put_along_axis(ranks, order, mean[group].reshape(flat.shape), axis=1)
    ranks -= (flat.shape[1] - 1) / 2  # the mean rank, whatever the ties
    norm = np.sqrt((ranks**2).sum(axis=1, keepdims=True))
    return ranks / np.where(norm > 0, norm, np.nan)


def max_sensitivity(
    maps: Float[np.ndarray | Tensor, "N h w"], perturbed: Float[np.ndarray | Tensor, "n N h w"]
) -> Float64[np.ndarray, " N"]:
    """Give how far each map moves at most when its image is perturbed a little: max of ||perturbed - map|| / ||map||.

    Args:
        perturbed: n maps for each row, of the same label and method on its perturbed images.

    Returns:
        In units of the map's own L2 norm; NaN where that is 0.

    Raises:
        InputError: Maps that are no [N, h, w] or not finite, or perturbed ones that are no n >= 1 of their shape.

    Source: Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019, definition 2.

    DEVIATION: divided by the map's norm, without which methods of other scales do not compare.
    """
    values, moved = to_array(maps), to_array(perturbed)
    check_maps(values)
    if moved.ndim != 4 or len(moved) < 1 or moved.shape[1:] != values.shape:
        raise InputError(f"perturbed {moved.shape}: expected [n, *{values.shape}] with n at least 1")
    highest = np.zeros(len(values))
    values = values.astype(np.float64)
    for sample, planes in enumerate(moved):
        check_maps(planes, f"perturbed[{sample}]")
        highest = np.maximum(highest, np.sqrt(((planes - values) ** 2).sum(axis=(1, 2))))
    norm = np.sqrt((values**2).sum(axis=(1, 2)))
    return highest / np.where(norm > 0, norm, np.nan)
