"""How ours and a peer are timed: interleaved in one process, as ratios, because times of a shared machine are not stable."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch

from mlvision.data.loader import MOST_WORKERS
from mlvision.engine.precision import MOST_THREADS, Precision, resolve_device, resolve_precision
from mlvision.errors import check_fields
from mlvision.methods import Method, MethodConfig
from mlvision.models import Classifier
from mlvision.parts import Context
from mlvision.space import LabelSpace


@dataclass(frozen=True)
class BenchmarkOptions:
    pairs: Annotated[int, "interleaved measurements of ours and the peer"] = 30
    threads: Annotated[int, "CPU threads of torch; 0: torch's own choice"] = 0
    device: Annotated[str, "cpu, cuda or cuda:<number>"] = "cpu"
    workers: Annotated[int, "loader: processes that read images; 0: the main process"] = 1
    out: Annotated[str, "JSON to write; empty: none"] = ""

    def __post_init__(self) -> None:
        rules = (
            ("pairs", 1 <= self.pairs <= 100_000, "1 to 100000"),
            ("threads", 0 <= self.threads <= MOST_THREADS, f"0 to {MOST_THREADS}"),
            ("workers", 0 <= self.workers <= MOST_WORKERS, f"0 to {MOST_WORKERS}"),
        )
        check_fields(self, "", rules)

    def precision(self) -> Precision:
        """What train.py takes by itself on the device."""
        return resolve_precision("auto", resolve_device(self.device))


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` is the peer's time over ours: above 1, ours is faster.

    Attributes:
        interval: the 10th and 90th percentile of the pairs' ratios.
        difference: largest difference of the results, where both give the same thing.
    """

    what: str
    peer: str
    ratio: float
    interval: tuple[float, float]
    ours_ms: float
    peer_ms: float
    target: str
    difference: float | None = None
    note: str = ""


def compare(
    ours: Callable[[], Any], peer: Callable[[], Any], options: BenchmarkOptions, peer_calls: int = 1
) -> dict[str, Any]:
    """Times of interleaved pairs, in alternating order, after a warm-up of each.

    A call shorter than 20 ms is repeated to last about that: alone it would measure the caches that the other left.

    Args:
        peer_calls: the peer does what ours does in so many equal calls, of which one is timed.
    """

    def seconds(call: Callable[[], Any], repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        if options.device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / repeats

    for call in (ours, peer):
        seconds(call, 1)
    repeats = [max(1, round(0.02 / seconds(call, 1))) for call in (ours, peer)]
    times = np.empty((options.pairs, 2))
    for pair in range(options.pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            times[pair, which] = seconds((ours, peer)[which], repeats[which])
    times[:, 1] *= peer_calls
    ratios = times[:, 1] / times[:, 0]
    low, high = np.quantile(ratios, [0.1, 0.9])
    return {
        "ratio": float(np.median(ratios)),
        "interval": (float(low), float(high)),
        "ours_ms": 1e3 * float(np.median(times[:, 0])),
        "peer_ms": 1e3 * float(np.median(times[:, 1])),
    }


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that a call holds at once, of what it allocates itself."""
    call()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events: list[Any] = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())


def build_method(config: MethodConfig, classifier: Classifier) -> Method:
    """The method of classes without names or statistics, which none of these needs."""
    return config.build(Context(LabelSpace.of(None, classifier.num_classes)), classifier)
