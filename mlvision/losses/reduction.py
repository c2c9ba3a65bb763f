"""What every loss on a `[B, C]` table of logits shares: unknown labels on the way in, the reduction on the way out."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlvision.errors import InputError

REDUCTIONS = ("image", "sum", "mean", "none")
SLACK = 1e-3  # soft targets and weights were rounded on their way


def mask_unknown(
    logits: Float[Tensor, "B C"], targets: Float[Tensor, "B C"], highest: float = 1.0
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"], Bool[Tensor, "B C"]]:
    """Give `(logits, targets, known)` in at least float32, both tables set to 0 where the target is unknown (NaN).

    The logits are replaced as well as the targets: masking only the finished loss leaves 0 * NaN in its gradient.

    Raises:
        InputError: No table, the two shapes differ (broadcasting would hide it), or, on a CPU, a target outside 0 to
            `highest`.
    """
    if logits.ndim != 2:
        raise InputError(f"logits {tuple(logits.shape)}: expected [images, classes]")
    if logits.shape != targets.shape:
        raise InputError(f"targets {tuple(targets.shape)}: expected the shape of the logits, {tuple(logits.shape)}")
    check_values("targets", targets, highest)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    known = ~targets.isnan()
    return logits.to(dtype).where(known, 0), targets.to(dtype).where(known, 0), known


def reduce_loss(
    values: Float[Tensor, "B C"],
    known: Bool[Tensor, "B C"],
    class_weights: Float[Tensor, " C"] | None = None,
    reduction: str = "image",
) -> Float[Tensor, ""] | Float[Tensor, "B C"]:
    """Weight a table of losses by class, set unknown entries to exactly 0 and reduce it.

    Args:
        values: Loss of each image and class; finite also at unknown entries.
        known: True where the label is known.
        class_weights: Factor of each class; the mean divides by the number of entries, not by their weights.
        reduction: image: sum over classes, mean over images (0 without images); sum: over all; mean: over the known
            entries (0 if none is known); none: the table.

    Raises:
        InputError: No such reduction, or not one weight for each class.
    """
    if class_weights is not None:
        values = values * per_class("class_weights", class_weights, values)
    values = values.where(known, 0)
    if reduction == "image":
        return values.sum(dim=1).mean() if len(values) else values.sum()
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.sum() / known.sum().clamp(min=1)
    if reduction == "none":
        return values
    raise InputError(f"reduction '{reduction}': expected one of {', '.join(REDUCTIONS)}")


def per_class(name: str, weights: Float[Tensor, " C"], logits: Float[Tensor, "B C"]) -> Float[Tensor, " C"]:
    """Bring one factor a class to the logits' device and dtype, refusing any other number of factors."""
    if weights.shape != logits.shape[1:]:
        raise InputError(f"{name} {tuple(weights.shape)}: expected one for each class, {tuple(logits.shape[1:])}")
    check_values(name, weights, unknown=False)
    return weights.to(logits)


def check_values(name: str, values: Tensor, highest: float = math.inf, *, unknown: bool = True) -> None:
    """Refuse values outside 0 to `highest`, infinities, and NaN if nothing can be `unknown`; on a CPU only.

    Reading them back would stall a GPU.

    Raises:
        InputError: Naming the first such value.
    """
    if values.device.type != "cpu":
        return
    bad = (values < -SLACK) | (values > highest + SLACK) | values.isinf()
    if not unknown:
        bad |= values.isnan()
    if bad.any():
        place = tuple(bad.nonzero()[0].tolist())
        expected = "0 or more" if highest == math.inf else f"0 to {highest:g}"
        expected += ", or NaN for unknown" if unknown else ""
        raise InputError(f"{name} {values[place].item():g} at {list(place)}: expected {expected}")
