"""Run a method over a loader once and keep every logit."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mlvision.engine.distributed import gather
from mlvision.engine.precision import Precision
from mlvision.methods.base import Method
from mlvision.types import Batch, Predictions


@torch.inference_mode()
def predict(method: Method, loader: Iterable[Batch], precision: Precision) -> Predictions:
    """Logits of every image that the loaders of all ranks yield, on every rank; a row that comes twice is kept once.

    The method is put into eval mode and back into the mode it had.

    Raises:
        InputError: on every rank, where one meets an image that cannot be read.
    """

    def of_this_rank() -> list[tuple[Tensor, Tensor, Tensor]]:
        found = []
        for batch in loader:
            on_device = batch.images.to(precision.device, non_blocking=True)
            with precision.autocast():
                output = method.predict(on_device)
            found.append((output.float().cpu(), batch.targets, batch.index))
        return found

    was_training = method.training
    method.eval()
    try:
        batches = [batch for part in gather(of_this_rank) for batch in part]
    finally:
        method.train(was_training)
    logits, targets, rows = map(torch.cat, zip(*batches, strict=True))
    unique, inverse = torch.unique(rows, return_inverse=True)
    first = torch.full_like(unique, len(rows)).scatter_reduce(0, inverse, torch.arange(len(rows)), reduce="amin")
    return Predictions(logits[first], targets[first], unique, method.space)
