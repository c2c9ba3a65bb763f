"""Losses: conditional transport."""

import math
from collections.abc import Callable, Iterator

import torch

from mlvision.benchmarks.base import BenchmarkOptions, Row, compare
from mlvision.losses import conditional_transport


def transport(options: BenchmarkOptions) -> Iterator[Row]:
    """Conditional transport, forward and backward, against Sinkhorn's steps and against its own matrix product."""
    torch.manual_seed(0)
    patches = torch.randn(64, 197, 512, device=options.device, requires_grad=True)
    labels = torch.randn(80, 512, device=options.device, requires_grad=True)
    weights = (torch.rand(64, 80, device=options.device) < 0.05).float()
    weights[:, 0] = 1  # no image without a label

    def carried(plan: str) -> Callable[[], None]:
        def run() -> None:
            cost = conditional_transport(patches, labels, weights, plan=plan, tau=0.1).cost.sum()
            torch.autograd.grad(cost, (patches, labels))

        return run

    def unrolled() -> None:
        normalize = torch.nn.functional.normalize
        cosine = normalize(patches, dim=-1) @ normalize(labels, dim=-1).T
        near, log_beta = cosine / 0.1, (weights / weights.sum(1, keepdim=True)).log()
        rows, columns = torch.zeros_like(near[..., 0]), torch.zeros_like(near[:, 0])
        for _ in range(50):
            rows = -torch.logsumexp(near + (log_beta + columns)[:, None], 2)
            columns = -torch.logsumexp(near + rows[:, :, None], 1) + math.log(near.shape[1])
        plan = (near + (log_beta + columns)[:, None]).softmax(2) / near.shape[1]
        torch.autograd.grad((plan * (1 - cosine)).sum(), (patches, labels))

    def product() -> None:
        torch.autograd.grad((patches @ labels.T).sum(), (patches, labels))

    what = "conditional transport, B=64, 197 patches, 80 labels of width 512"
    ours = carried("ct")
    yield Row(what, "50 unrolled Sinkhorn steps", target="8x", **compare(ours, unrolled, options))
    yield Row(what, "`plan=sinkhorn`, marginals within 1e-3", target="", **compare(ours, carried("sinkhorn"), options))
    yield Row(what, "the matrix product", target="at most 2.5x its time: ratio 0.4", **compare(ours, product, options))
