"""The door into this room: tensors or arrays in, checked NumPy arrays inside, the caller's kind out."""

import math

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from mlvision.errors import InputError
from mlvision.space import ArrayT


def to_array(values: Shaped[np.ndarray | Tensor, "..."]) -> Shaped[np.ndarray, "..."]:
    """View as an array; half precision becomes float32, which holds each of its values."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype in (torch.float16, torch.bfloat16) else values).numpy()
    return values.astype(np.float32) if values.dtype == np.float16 else values


def negated(values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """What sorts from the highest to the lowest; integers as float64: unsigned ones wrap around, bools have no sign."""
    return -(values.astype(np.float64) if values.dtype.kind in "bui" else values)


def same_kind(values: np.ndarray, like: ArrayT) -> ArrayT:
    """Give the caller what it came with: an array, or a tensor on the same device."""
    if isinstance(like, Tensor):
        return torch.from_numpy(values).to(like.device)
    return values


def check_scores(scores: Shaped[np.ndarray, "N C"]) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        InputError: Not a table, or a class holds NaN or infinity.
    """
    if scores.ndim != 2:
        raise InputError(f"scores {scores.shape}: expected [images, classes]")
    finite = np.isfinite(scores)
    if not finite.all():
        bad = (~finite).sum(axis=0)
        c = int(bad.argmax())
        raise InputError(f"scores of class {c}: {bad[c]} of {len(scores)} are NaN or infinite, expected finite numbers")


def check_targets(targets: Shaped[np.ndarray, "N C"], shape: tuple[int, ...]) -> None:
    """Refuse targets that are not 1 (present), 0 (absent) or NaN (unknown), such as the -1 of the VOC files.

    Raises:
        InputError: Another shape than `shape`, or another value.
    """
    if targets.shape != shape:
        raise InputError(f"targets {targets.shape}: expected the shape of the scores, {shape}")
    allowed = (targets == 0) | (targets == 1) | (targets != targets)
    if not allowed.all():
        row, c = np.argwhere(~allowed)[0]
        raise InputError(f"targets of class {c}: {targets[row, c]} in row {row}, expected 1, 0 or NaN (unknown)")


def flattened(maps: Shaped[np.ndarray, "N h w"]) -> Shaped[np.ndarray, "N cells"]:
    return maps.reshape(len(maps), math.prod(maps.shape[1:]))  # -1 would not do for N = 0


def check_maps(maps: Shaped[np.ndarray, "..."], name: str = "maps") -> None:
    """Refuse what is no table of maps.

    Raises:
        InputError: Another shape than [N, h, w], no cell, or a map that holds NaN or infinity.
    """
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise InputError(f"{name} {maps.shape}: expected [N, h, w] with at least one cell")
    bad = np.flatnonzero(~np.isfinite(maps).all(axis=(1, 2)))
    if bad.size:
        raise InputError(f"{name}: {bad.size} of {len(maps)} hold NaN or infinity, the first in row {bad[0]}")
