"""What every loss on a `[B, C]` table of logits shares: unknown labels on the way in, the reduction on the way out."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlvision.errors import InputError

REDUCTIONS = ("image", "sum", "mean", "none")


def mask_unknown(
    logits: Float[Tensor, "B C"], targets: Float[Tensor, "B C"]
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"], Bool[Tensor, "B C"]]:
    """Give `(logits, targets, known)` in at least float32, both tables set to 0 where the target is unknown (NaN).

    The logits are replaced as well as the targets: masking only the finished loss leaves 0 * NaN in its gradient.

    Raises:
        InputError: The two shapes differ (broadcasting would hide it).
    """
    if logits.shape != targets.shape:
        raise InputError(f"targets {tuple(targets.shape)}: expected the shape of the logits, {tuple(logits.shape)}")
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
        reduction: image: sum over classes, mean over images; sum: over all; mean: over the known entries (0 where
            none is known); none: the table.

    Raises:
        InputError: No such reduction, or not one weight for each class.
    """
    if class_weights is not None:
        values = values * per_class("class_weights", class_weights, values)
    values = values.where(known, 0)
    if reduction == "image":
        return values.sum(dim=1).mean()
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
    return weights.to(logits)
