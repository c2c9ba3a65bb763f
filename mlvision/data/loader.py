"""From a manifest to batches: the same images and views for any number of workers and ranks, and after a resume.

Nothing here keeps a random state. The order of an epoch follows from (seed, epoch), a view from (seed, epoch, index), a
batch from its step: a loader can be set to any step of any epoch at once.
"""

import itertools
import math
import multiprocessing
import multiprocessing.queues
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Annotated, NoReturn

import cv2
import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from mlvision.data.images import read_record
from mlvision.data.manifest import Manifest
from mlvision.data.samplers import SAMPLERS, EpochOrder, describe_samplers
from mlvision.data.views import EvalView, TrainView, View
from mlvision.errors import InputError, check_fields
from mlvision.label_maps.store import LabelMapStore
from mlvision.options import EVALUATION, INERT
from mlvision.progress import track
from mlvision.types import Batch, CropBox, EpochPlan

MOST_WORKERS = 256  # of one process: each holds the whole program


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made."""

    batch_size: Annotated[int, "images per optimizer step, over all ranks"] = 64
    eval_batch_size: Annotated[int, "images per step of each rank in evaluation", EVALUATION] = 128
    num_workers: Annotated[int, "loader processes of each rank; 0: its main process loads", INERT, EVALUATION] = 2
    prefetch: Annotated[int, "batches that each loader process keeps ready", INERT, EVALUATION] = 2
    sampling: Annotated[str, describe_samplers()] = "shuffled"

    def __post_init__(self) -> None:
        rules = (
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("eval_batch_size", self.eval_batch_size >= 1, "at least 1"),
            ("num_workers", 0 <= self.num_workers <= MOST_WORKERS, f"0 to {MOST_WORKERS}"),
            ("prefetch", 1 <= self.prefetch <= 1000, "1 to 1000"),
            ("sampling", self.sampling in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
        )
        check_fields(self, "loader.", rules)


@dataclass(frozen=True)
class Sample:
    """The views of one image, and what is known of it: `target` is its row of `Manifest.targets`, or else its `labels`."""

    views: list[View]
    target: Float32[Tensor, " C"]
    index: int
    labels: Int64[Tensor, " l"] | None = None


class ImageDataset(Dataset):
    """The images of a manifest, seen through a view.

    An item is (epoch, index): the epoch reaches workers that live through many epochs with the work itself.
    """

    def __init__(
        self,
        manifest: Manifest,
        view: TrainView | EvalView,
        seed: int = 0,
        num_views: int = 1,
        label_maps: LabelMapStore | None = None,
        sparse_targets: bool = False,
    ) -> None:
        self.manifest = manifest
        self.view = view
        self.seed = seed
        self.num_views = num_views
        self.label_maps = label_maps
        self.sparse_targets = sparse_targets

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        image = read_record(self.manifest.records[index], self.manifest.max_pixels)
        views = [self.view(image, _view_seed(self.seed, epoch, index, number)) for number in range(self.num_views)]
        if self.sparse_targets:
            return Sample(
                views, torch.empty(0), index, torch.tensor(self.manifest.records[index].labels, dtype=torch.int64)
            )
        return Sample(views, torch.from_numpy(self.manifest.target(index)), index)

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[Sample] | InputError:
        # What DataLoader calls. A bad file travels to the main process as a value: raised here, it would arrive with
        # the worker's traceback in its message.
        try:
            return [self[item] for item in items]
        except InputError as error:
            return error


def _view_seed(seed: int, epoch: int, index: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, index, number]).generate_state(1, np.uint64)[0])


def rank_slice(rows: Int64[np.ndarray, " n"], rank: int, world_size: int) -> Int64[np.ndarray, " m"]:
    """This rank's contiguous part; together the ranks have each row once, and their parts differ by one row at most."""
    return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The batches of one epoch for one rank, as lists of (epoch, index).

    Batch g of all ranks is `order(epoch)[g * batch_size : (g + 1) * batch_size]`; each rank takes its slice of it. With
    `drop_last` a short last batch is left out, and with it those images for this epoch.

    Raises:
        InputError: `batch_size` cannot be divided over the ranks, or no batch is full.
    """

    def __init__(
        self, order: EpochOrder, batch_size: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.num_images = len(order(0))
        self.epoch = 0
        self.start_step = 0
        self.rows: Int64[np.ndarray, " n"] | None = None
        if batch_size % world_size:
            raise InputError(f"loader.batch_size: {batch_size} images cannot be divided over {world_size} ranks")
        if drop_last and batch_size > self.num_images:
            raise InputError(
                f"loader.batch_size: expected at most the {self.num_images:,} images of an epoch, got {batch_size:,}"
            )

    def set_position(self, epoch: int, start_step: int = 0, rows: Int64[np.ndarray, " n"] | None = None) -> None:
        """The next iteration is that of `epoch`, without its first `start_step` batches.

        Args:
            rows: the epoch's order, in place of `order(epoch)`.
        """
        assert 0 <= start_step <= len(self), f"step {start_step} of an epoch of {len(self)}"
        self.epoch = epoch
        self.start_step = start_step
        self.rows = rows

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.num_images // self.batch_size if self.drop_last else -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, rows = self.epoch, self.order(self.epoch) if self.rows is None else self.rows
        assert len(rows) == self.num_images, f"epoch {epoch} has {len(rows)} images, epoch 0 has {self.num_images}"
        for step in range(self.start_step, len(self)):
            yield [(epoch, int(index)) for index in rows[self.positions(step)]]

    def positions(self, step: int) -> Int64[np.ndarray, " m"]:
        """Where in the epoch's order the rows of this rank's part of a batch stand."""
        end = min((step + 1) * self.batch_size, self.num_images)
        return rank_slice(np.arange(step * self.batch_size, end), self.rank, self.world_size)


def collate(samples: list[Sample] | InputError, label_maps: LabelMapStore | None = None) -> Batch | InputError:
    """Samples to one Batch, with a row for each view; an InputError passes through."""
    if isinstance(samples, InputError):
        return samples
    rows = [(view, sample) for sample in samples for view in sample.views]
    # Stacked in the memory order that views have, channels last: several times faster than turning each image round.
    images = default_collate([view.image.permute(1, 2, 0) for view, _ in rows]).permute(0, 3, 1, 2)
    index = torch.tensor([sample.index for _, sample in rows])
    return Batch(
        images=images,
        targets=torch.stack([sample.target for _, sample in rows]),
        index=index,
        view=CropBox(
            boxes=torch.tensor([view.box for view, _ in rows], dtype=torch.float32),
            flipped=torch.tensor([view.flipped for view, _ in rows]),
            quarter_turns=torch.tensor([view.quarter_turns for view, _ in rows]),
        ),
        label_map=label_maps.read(index.numpy()) if label_maps else None,
        labels=_padded([sample.labels for _, sample in rows]),
    )


def _padded(labels: Sequence[Int64[Tensor, " _"] | None]) -> Int64[Tensor, "B L"] | None:
    """A row per sample, filled up with -1; None where samples have targets in place of labels."""
    some = [row for row in labels if row is not None]
    return pad_sequence(some, batch_first=True, padding_value=-1) if some else None


class Loader:
    """Batches of one epoch after another.

    The epoch is the one last set: iterating twice without `set_position` gives the same batches twice. Iterating uses
    no global random state.

    Attributes:
        images_per_step: images of a full step, over all ranks.

    Raises:
        InputError: while iterating, an image that cannot be read.
    """

    def __init__(self, dataset: ImageDataset, batches: EpochBatches, config: LoaderConfig) -> None:
        self.dataset = dataset
        self.batches = batches
        self.images_per_step = batches.batch_size
        self.plan = EpochPlan()
        self._num_workers = config.num_workers
        has_workers = config.num_workers > 0
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=config.num_workers,
            collate_fn=partial(collate, label_maps=dataset.label_maps),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            prefetch_factor=config.prefetch if has_workers else None,
            persistent_workers=has_workers,
            # DataLoader draws a seed for its workers, which nothing here uses: not from the global generator, or a run
            # that was resumed would differ in whatever else draws from that.
            generator=torch.Generator(),
        )

    def set_position(self, epoch: int, start_step: int = 0, plan: EpochPlan | None = None) -> None:
        """The next iteration is that of `epoch`, without its first `start_step` batches, as the plan has it.

        Raises:
            InputError: a plan that does not fit the images.
        """
        self.plan = plan or EpochPlan()
        self._check_plan(self.plan)
        order = self.plan.order
        self.batches.set_position(epoch, start_step, None if order is None else order.numpy())

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        with self._one_line_for_workers():
            iterator = self._start()
        patience = _Patience()
        with patience.started() if self._num_workers else nullcontext():
            for step in itertools.count(self.batches.start_step):
                with patience, self._one_line_for_workers():
                    batch = next(iterator, None)
                if batch is None:
                    return
                if isinstance(batch, InputError):
                    raise InputError(f"{batch} (data.on_bad_image=skip leaves out such images)") from batch
                yield self._planned(batch, step)

    def tracked(self, what: str, *, shown: bool = True) -> Iterator[Batch]:
        """One iteration, with its progress shown; arguments as of Progress."""
        return track(self, len(self), what, "batches", images=self.images_per_step, shown=shown)

    def _planned(self, batch: Batch, step: int) -> Batch:
        """The batch with what the plan says of its rows. The workers, which live through many epochs, know no plan."""
        targets, extra = self.plan.targets, self.plan.extra
        if targets is not None:
            batch.targets = targets[batch.index]
        if extra:
            rows = torch.from_numpy(self.batches.positions(step)).repeat_interleave(self.dataset.num_views)
            batch.extra = {name: column[rows] for name, column in extra.items()}
        return batch

    def _check_plan(self, plan: EpochPlan) -> None:
        num_rows, num_images, classes = self.batches.num_images, len(self.dataset), self.dataset.manifest.classes
        if plan.order is not None:
            shape = list(plan.order.shape)
            if plan.order.dtype != torch.int64 or shape != [num_rows]:
                raise InputError(
                    f"plan of an epoch: expected an order of {num_rows} rows, got {plan.order.dtype} {shape}"
                )
            if not 0 <= int(plan.order.min()) <= int(plan.order.max()) < num_images:
                raise InputError(f"plan of an epoch: its order has rows beyond the {num_images} training images")
        if plan.targets is not None and self.dataset.sparse_targets:
            raise InputError("plan of an epoch: expected no targets for a method that asks for labels in place of them")
        if plan.targets is not None and plan.targets.shape != (num_images, len(classes)):
            raise InputError(
                f"plan of an epoch: expected targets {[num_images, len(classes)]}, got {list(plan.targets.shape)}"
            )
        for name, column in plan.extra.items():
            if plan.order is None or len(column) != num_rows:
                raise InputError(
                    f"plan of an epoch: expected extra '{name}' for each of the {num_rows} rows of an order"
                )

    def _start(self) -> Iterator[Batch | InputError]:
        # DataLoader has a dead worker raise an error wherever the main process is just then, in the midst of a step or of
        # saving. It also looks after its workers, every five seconds, while it waits for them: that is enough.
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            iterator = iter(self._loader)
        except OSError as error:
            raise InputError(
                f"loader.num_workers: {self._num_workers} processes cannot be started ({error})"
            ) from error
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)
        return iterator

    @contextmanager
    def _one_line_for_workers(self) -> Iterator[None]:
        """Report a worker's death in one line; errors of the code that it runs stay tracebacks."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            codes = _exit_codes(getattr(self._loader._iterator, "_workers", ()))
            # A batch that was announced by a worker that has died since is an error of the connection, of no one name.
            unfetched = not isinstance(error, RuntimeError) and codes and _RAISED_IN_WORKER not in str(error)
            if not (unfetched or _WORKERS_FAIL.search(str(error))):
                raise
            raise InputError(f"{_cause(codes, str(error))}; loader.num_workers=0 needs none of this") from error


# What torch raises when its processes fail, other than what the code in them raises.
_SHARED_MEMORY = "shared memory(shm)"
_WORKERS_FAIL = re.compile(
    r"DataLoader worker \(pid|Pin memory thread|Too many open files|items of ancdata|" + re.escape(_SHARED_MEMORY)
)
_RAISED_IN_WORKER = "in DataLoader worker process"
_NO_SHARED_MEMORY = 74  # exit code of a worker
_IMPATIENT_AFTER = 30.0  # seconds


def _exit_codes(workers: Sequence[BaseProcess]) -> set[int]:
    """Of those that have ended. One that is just ending has closed its connections and gets the moment that it needs."""
    ending = wait([worker.sentinel for worker in workers], timeout=1.0) if workers else []
    for worker in workers:
        if worker.sentinel in ending:
            worker.join(1.0)
    return {worker.exitcode for worker in workers if worker.exitcode is not None}


def _cause(codes: set[int], message: str) -> str:
    if codes & {_NO_SHARED_MEMORY, -signal.SIGBUS} or _SHARED_MEMORY in message:
        return f"the loader's processes hand batches over in shared memory, and that is full ({_shared_memory()})"
    if -signal.SIGKILL in codes:
        return "a loader process was killed, most often because memory ran out: fewer loader.num_workers take less"
    died_of = [signal.Signals(-code).name for code in codes if code < 0]
    if died_of:
        return f"a loader process was ended by {', '.join(died_of)}"
    return f"the loader's processes failed ({message.splitlines()[0]})"


def _shared_memory() -> str:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return "there is no /dev/shm"
    free, total = usage.free / 2**20, usage.total / 2**20
    return f"{free:,.0f} of {total:,.0f} MiB are free in /dev/shm; docker run --shm-size=8g gives 8 GiB"


class _Patience:
    """A context to wait for workers in; when that takes long, a line on stderr says so. They may only be slow: nothing ends.

    One thread looks, for as long as `started` lasts; a wait costs two assignments.
    """

    def __init__(self) -> None:
        self._since = math.inf

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = math.inf

    @contextmanager
    def started(self) -> Iterator[None]:
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(ended,), daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(_IMPATIENT_AFTER / 30):
            if time.monotonic() - self._since > _IMPATIENT_AFTER:
                self._since = math.inf  # once for each wait
                print(
                    f"still waiting for the loader's processes after {_IMPATIENT_AFTER:.0f} s: slow storage, few cores, or "
                    f"no room in shared memory ({_shared_memory()}); loader.num_workers=0 needs no processes",
                    file=sys.stderr,
                    flush=True,
                )


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_leave)  # pyright: ignore[reportAttributeAccessIssue]
    # A process group of its own: a signal sent to the run's whole group (Ctrl-C, timeout, torchrun) reaches the main
    # process, which still needs this one to end its epoch in order.
    os.setpgrp()
    # DataLoader's worker leaves when its parent is another than it finds from here on. Where the run was killed before
    # (the imports above this take a while), that is init, and the worker would stay for ever.
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


def _leave(error: Exception, _batch: object) -> NoReturn:
    """A worker that cannot hand over a batch ends. It would go on without it, and the main process wait for ever."""
    if isinstance(error, OSError) or _SHARED_MEMORY in str(error):
        os._exit(_NO_SHARED_MEMORY)
    traceback.print_exception(error)
    os._exit(1)


def train_loader(
    manifest: Manifest,
    view: TrainView | EvalView,
    config: LoaderConfig,
    seed: int,
    *,
    num_views: int = 1,
    label_maps: LabelMapStore | None = None,
    sparse_targets: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Full batches in the order of `config.sampling`; several views give a batch that many times the rows.

    Args:
        label_maps: a store whose rows are those of the manifest; every batch then has the maps of its images.
        sparse_targets: every batch has `labels` in place of `targets`.

    Raises:
        InputError: `sparse_targets` of images of which some labels are unknown.
    """
    if sparse_targets and manifest.num_unknown:
        raise InputError(
            f"split {manifest.split!r}: expected every label to be known, {manifest.num_unknown:,} are not: a list of the "
            "present ones cannot say so"
        )
    order = SAMPLERS[config.sampling](manifest, seed)
    batches = EpochBatches(order, config.batch_size, rank, world_size)
    dataset = ImageDataset(manifest, view, seed, num_views, label_maps, sparse_targets)
    return Loader(dataset, batches, config)


def eval_loader(
    manifest: Manifest,
    view: TrainView | EvalView,
    config: LoaderConfig,
    *,
    rows: Int64[np.ndarray, " n"] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Every image once, or `rows` alone, in that order and without padding.

    Batches go round the ranks whole. So they hold the same images for any number of ranks, and what a network says of an
    image, whose last bits may depend on its batch, is the same too. A rank may have none.
    """
    rows = np.arange(len(manifest)) if rows is None else rows
    size = config.eval_batch_size
    rows = np.concatenate([rows[:0], *(rows[i : i + size] for i in range(rank * size, len(rows), world_size * size))])
    batches = EpochBatches(lambda epoch: rows, config.eval_batch_size, drop_last=False)
    return Loader(ImageDataset(manifest, view), batches, config)


def evenly(num: int, total: int) -> Int64[np.ndarray, " n"]:
    """Rows spread evenly over all of them, the first and the last included; all where there are no more than `num`."""
    return np.arange(total) if num >= total else np.linspace(0, total - 1, num).round().astype(np.int64)
