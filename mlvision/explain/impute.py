"""What takes the place of hidden pixels."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy import sparse
from scipy.sparse.linalg import spsolve
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from mlvision.errors import InputError

BASELINES = ("black", "mean", "blur", "impute", "drop")
_BLUR = 0.08  # sigma, as a share of the shorter side
_NOISE = 0.01  # of imputed pixels, in [0, 1]

Fill = Callable[[Int64[Tensor, " n"], Float[Tensor, "n H W"]], Float[Tensor, "n in_chans H W"]]


def fill_in(pixels: Float[Tensor, "B in_chans H W"], baseline: str) -> Fill:
    """A function of (rows of images, what is kept of them) that gives copies with the rest replaced.

    `black` is 0; `mean` the image's mean colour; `blur` the image without its detail; `impute` solves for each hidden pixel
    to be the weighted mean of its eight neighbours, and adds a little noise, so that neither a colour nor an edge gives the
    mask away.

    Raises:
        InputError: an unknown baseline.

    Source of `impute`: Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods" (ROAD), ICML
    2022, section 4.2.
    """
    if baseline == "impute":
        return lambda images, keep: _imputed(pixels[images], keep)
    if baseline == "black":
        base = torch.zeros_like(pixels)
    elif baseline == "mean":
        base = pixels.mean((2, 3), keepdim=True).expand_as(pixels)
    elif baseline == "blur":
        sigma = _BLUR * min(pixels.shape[2:])
        size = 2 * min(round(3 * sigma), min(pixels.shape[2:]) - 1) + 1  # reflection reaches no further than the image
        base = gaussian_blur(pixels, [size, size], [sigma, sigma])
    else:
        raise InputError(f"baseline: expected one of {', '.join(BASELINES)}, got '{baseline}'")
    return lambda images, keep: torch.lerp(base[images], pixels[images], keep[:, None].to(pixels))


def _imputed(pixels: Float[Tensor, "n in_chans H W"], keep: Float[Tensor, "n H W"]) -> Float[Tensor, "n in_chans H W"]:
    """A soft mask hides what it keeps less than half of."""
    hidden = keep < 0.5
    filled = pixels.clone()
    for copy, mask in zip(filled, hidden, strict=True):
        where = mask.cpu().numpy()
        if where.any():
            copy[:, mask] = torch.from_numpy(_solve(copy.cpu().double().numpy(), where)).to(copy)
    noise = _NOISE * torch.randn(pixels.shape, device=pixels.device)
    return (filled + noise.to(filled) * hidden[:, None]).clamp(0, 1)


def _solve(
    image: Float[np.ndarray, "in_chans H W"], hidden: Bool[np.ndarray, "H W"]
) -> Float[np.ndarray, "in_chans hidden"]:
    """The values of the hidden pixels that make each the weighted mean of its neighbours: 1/6 beside it, 1/12 across."""
    if hidden.all():
        return np.broadcast_to(image.mean((1, 2))[:, None], (len(image), hidden.size)).copy()
    height, width = hidden.shape
    number = np.full(hidden.shape, -1)
    number[hidden] = np.arange(hidden.sum())
    y, x = np.nonzero(hidden)
    total, known = np.zeros(len(y)), np.zeros((len(image), len(y)))
    rows, columns, values = [], [], []
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            if dy == dx == 0:
                continue
            weight = 1 / 12 if dy and dx else 1 / 6
            inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
            place = np.nonzero(inside)[0]
            ny, nx = y[place] + dy, x[place] + dx
            total[place] += weight
            unknown = number[ny, nx] >= 0
            rows.append(place[unknown])
            columns.append(number[ny, nx][unknown])
            values.append(np.full(unknown.sum(), -weight))
            known[:, place[~unknown]] += weight * image[:, ny[~unknown], nx[~unknown]]
    matrix = sparse.coo_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), (len(y),) * 2)
    return spsolve((matrix + sparse.diags(total)).tocsc(), known.T).reshape(len(y), -1).T
