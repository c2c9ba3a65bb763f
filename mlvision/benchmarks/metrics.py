"""Metrics: mean average precision."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlvision.benchmarks.base import BenchmarkOptions, Row, compare
from mlvision.metrics import average_precision


def mean_ap(options: BenchmarkOptions) -> Iterator[Row]:
    """Exact mAP with ties of 40,504 images and 80 classes (COCO val), against torchmetrics and scikit-learn."""
    from sklearn.metrics import average_precision_score
    from torchmetrics.functional.classification import multilabel_average_precision

    noise = torch.Generator().manual_seed(0)
    prevalence = torch.logspace(-2.5, -1, 80)
    targets = (torch.rand(40_504, 80, generator=noise) < prevalence).float()
    scores = (torch.randn(targets.shape, generator=noise) + 2 * targets).sigmoid()
    labels, (s, t) = targets.long(), (scores.numpy(), targets.numpy())
    peers: dict[str, tuple[str, Callable[[], Any]]] = {
        "torchmetrics": ("2x", lambda: multilabel_average_precision(scores, labels, 80, average="none")),
        "scikit-learn": ("2.5x", lambda: average_precision_score(t, s, average=None)),  # pyright: ignore[reportArgumentType]
    }

    def ours() -> Tensor:
        return average_precision(scores, targets)

    for name, (target, peer) in peers.items():
        yield Row(
            what="mAP, 40,504 x 80",
            peer=name,
            target=f"{target}, error 1e-9 to scikit-learn",
            difference=float(np.abs(np.asarray(peer()) - ours().numpy()).max()),
            **compare(ours, peer, options),
        )
