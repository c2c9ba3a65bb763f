"""Benchmarks: one file per subject. A new one is a function that yields rows, and a line in BENCHMARKS."""

from collections.abc import Callable, Iterator

from mlvision.benchmarks.base import BenchmarkOptions, Row
from mlvision.benchmarks.data import loader, views
from mlvision.benchmarks.explainers import explainers
from mlvision.benchmarks.heads import heads
from mlvision.benchmarks.label_maps import annotate, pooling, store
from mlvision.benchmarks.losses import transport
from mlvision.benchmarks.metrics import mean_ap
from mlvision.benchmarks.training import patchct, relabel, train

BENCHMARKS: dict[str, Callable[[BenchmarkOptions], Iterator[Row]]] = {
    "mean_ap": mean_ap,
    "views": views,
    "loader": loader,
    "pooling": pooling,
    "store": store,
    "annotate": annotate,
    "train": train,
    "relabel": relabel,
    "transport": transport,
    "patchct": patchct,
    "heads": heads,
    "explainers": explainers,
}


__all__ = ["BENCHMARKS", "BenchmarkOptions", "Row"]
