"""Several processes, as torchrun starts them, and how they agree. The only file that knows torch.distributed.

Every process (rank) runs the same script on its part of each batch. What may fail on one of them alone, such as reading an
image, is done within `gather`, `on_every_rank`, `on_main` or `InStep`: its InputError is then raised on all, so that nobody
waits for a rank that has stopped, and rank 0 alone says it. In a single process all of them just call what they are given.

Messages go through gloo on the CPU: they wait for no GPU. Gradients of models on GPUs go through NCCL.
"""

import atexit
import contextlib
import hashlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Generic, TypeVar

import torch
from timm.layers import convert_sync_batchnorm
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlvision.errors import InputError, describe_os_error
from mlvision.methods.base import Method
from mlvision.types import Batch, StepOutput

T = TypeVar("T")

# A dead rank is noticed at once. This is for a live one: rank 0 may decode all images while the others wait.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class DdpConfig:
    sync_bn: Annotated[bool, "batch statistics of all ranks together (GPUs only); false: of each rank's images"] = False


def is_launched() -> bool:
    """Whether torchrun, or what sets the same environment, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


@contextlib.contextmanager
def session() -> Iterator[None]:
    """While it lasts the processes that torchrun started know each other, and what ranks but 0 print is dropped.

    Such a process ends with its session: with the code of a SystemExit, with 1 after the traceback of any other exception,
    else with 0. It skips the interpreter's own end: a thread of gloo that still holds a tensor by then, which happens on
    busy cores, asks for the lock of an interpreter that is gone and aborts the process, whatever its code was to be.

    Does nothing in a process that was started alone, or within another session.
    """
    if dist.is_initialized() or not is_launched():
        yield
        return
    if torch.cuda.is_available():  # or what names no device, such as pinned memory, would take a part of GPU 0 each
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    store, own, size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store outlives the processes that it restarts, with the addresses of the dead in it. On several machines
        # the count may differ; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun itself take a new store each time.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=_PATIENCE)
    with contextlib.ExitStack() as stack:
        if not is_main():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    if code == 0:
        dist.destroy_process_group()  # not after a failure: it may wait for ranks that are no more
    atexit._run_exitfuncs()  # such as multiprocessing's, which ends the loader's workers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))


def wait_for_all() -> None:
    """Return once every rank has come here."""
    _exchange(None)


def gather(function: Callable[[], T]) -> list[T]:
    """What `function` gives on each rank, by rank.

    Raises:
        InputError: on every rank, where it fails on one: the error of the first that it fails on.
    """
    if world_size() == 1:
        return [function()]
    value, failure = _attempt(function)
    return _exchange(value, failure)


def on_every_rank(function: Callable[[], T]) -> T:
    """What `function` gives on this rank; nothing is sent.

    Raises:
        InputError: as `gather`.
    """
    if world_size() == 1:
        return function()
    value, failure = _attempt(function)
    _exchange(None, failure)
    return value  # pyright: ignore[reportReturnType]


def on_main(function: Callable[[], T]) -> T:
    """What `function` gives on rank 0, which alone calls it; it is sent to all.

    Raises:
        InputError: on every rank, where it fails.
    """
    if world_size() == 1:
        return function()
    return _exchange(*(_attempt(function) if is_main() else (None, None)))[0]


def check_same(values: dict[str, str]) -> None:
    """Refuse to go on when ranks differ in one of the values: each was given its own command and reads its own files.

    Raises:
        InputError: on every rank; names the first value that differs, and a rank.
    """
    of_ranks = gather(lambda: values)
    for number, own in enumerate(of_ranks):
        name = next((name for name, value in of_ranks[0].items() if own.get(name) != value), None)
        if name is not None:
            first, other = of_ranks[0][name][:40], own.get(name, "nothing")[:40]
            error = InputError(
                f"{name}: {first} on rank 0, but {other} on rank {number}; expected the same command for every process, "
                "and the same files"
            )
            error.on_every_rank = True
            raise error


def _attempt(function: Callable[[], T]) -> tuple[T | None, InputError | None]:
    try:
        return function(), None
    except InputError as error:
        if error.on_every_rank:
            raise
        return None, error
    except OSError as error:
        return None, InputError(describe_os_error(error))


def _exchange(value: Any, failure: InputError | None = None) -> list[Any]:
    """Every rank's value, or the first rank's failure where any has one.

    The one way in which ranks talk, so that one that failed early is heard by the others wherever they talk next.
    """
    outcomes: list[Any] = [(value, failure and str(failure))]
    if world_size() > 1:
        outcomes *= world_size()
        dist.all_gather_object(outcomes, (value, failure and str(failure)))
    failed = [number for number, (_, message) in enumerate(outcomes) if message is not None]
    if failed:
        error = failure if failure and failed[0] == rank() else InputError(outcomes[failed[0]][1])
        error.on_every_rank = True
        raise error
    return [value for value, _ in outcomes]


class InStep(Generic[T]):
    """Batches, while all ranks are at the same one.

    Costs one small message a batch, which waits for no GPU.

    Args:
        batches: of this rank; equally many on each.
        told_to_stop: asked before each batch. Where one rank says yes, the iteration ends on all, and `stopped` is true.

    Raises:
        InputError: while iterating, on every rank, where a batch of one cannot be had.
    """

    def __init__(self, batches: Iterable[T], told_to_stop: Callable[[], bool]):
        self.batches = batches
        self.told_to_stop = told_to_stop
        self.stopped = False

    def __iter__(self) -> Iterator[T]:
        iterator = iter(self.batches)
        while True:
            batch, failure = _attempt(lambda: next(iterator, None))
            self.stopped, failed = _any_rank(self.told_to_stop(), failure is not None)
            if self.stopped:
                return
            if failed:
                _exchange(None, failure)
            if batch is None:
                return
            yield batch


def _any_rank(*flags: bool) -> list[bool]:
    """Each flag: whether it is true on any rank."""
    if world_size() == 1:
        return list(flags)
    on_cpu = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(on_cpu, dist.ReduceOp.MAX)
    return [bool(flag) for flag in on_cpu]


def sync_batch_norm(method: nn.Module, device: torch.device) -> None:
    """Take batch statistics over all ranks from now on; parameters and state keep their names.

    Raises:
        InputError: several processes on CPUs, where torch has no such layer.
    """
    if device.type == "cpu":
        if world_size() > 1:
            raise InputError("ddp.sync_bn: torch computes batch statistics over several processes on GPUs only")
        return  # nothing to share
    convert_sync_batchnorm(method)


class Parallel:
    """The method's forward pass, whose backward pass gives every rank the gradients' mean over all.

    From here on all ranks have rank 0's weights, and before each pass they take its buffers, but for local state.
    Parameters that get no gradient (a norm that timm has behind the map of a head that reads the map) are found in the
    first step, and left alone as they are in a single process; a method must train the same parameters in every step.

    DistributedDataParallel lays its buckets out anew after the first step of each start, and they decide in which order the
    gradients of three or more ranks are added: a resumed run of three or more differs from an undisturbed one in last bits.

    Args:
        num_parts: of each step, one after the other, which exchange their gradients once.
    """

    def __init__(self, method: Method, num_parts: int = 1):
        self.method = method
        self.wrapped: DistributedDataParallel | None = None
        if dist.is_initialized():
            # Of a dimension of size 1, whose stride means nothing; and said by every rank.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            plain = _PlainOutput(method)
            own = [f"method.{name}" for name in method.local_state]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(plain, own)
            if num_parts == 1:
                self.wrapped = DistributedDataParallel(plain, static_graph=True)
            else:  # a static graph would have to exchange the gradients of the very first part
                plain.unused = nn.Parameter(torch.zeros((), device=method.mean.device))  # it warns where it finds none
                self.wrapped = DistributedDataParallel(plain, find_unused_parameters=True)

    def __call__(self, batch: Batch) -> StepOutput:
        return self.method(batch) if self.wrapped is None else StepOutput(*self.wrapped(batch))

    def backward_of_part(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Forward and backward pass of one part of a step; only that of the last part exchanges gradients, those of all."""
        return contextlib.nullcontext() if self.wrapped is None or is_last else self.wrapped.no_sync()


class _PlainOutput(nn.Module):
    """DistributedDataParallel looks for the loss in tuples and dicts, not in dataclasses."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        output = self.method(batch)
        return output.loss, output.logs, output.rows


def gather_rows(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor's rows of all ranks, by rank; equally many on each."""
    if world_size() == 1:
        return rows
    gathered = {}
    for name, own in rows.items():
        content = _bytes_of(own)
        of_ranks = [torch.empty_like(content) for _ in range(world_size())]
        dist.all_gather(of_ranks, content)
        gathered[name] = torch.cat([part.view(own.dtype).view(own.shape) for part in of_ranks])
    return gathered


def check_local_state(method: Method) -> None:
    """Refuse to save local state that is not the same on every rank: only one rank's would be kept.

    Raises:
        InputError: on every rank; names the state.
    """
    name = unlike({name: method.get_buffer(name) for name in sorted(method.local_state)})
    if name is not None:
        error = InputError(
            f"{type(method).__name__}: its local state '{name}' differs between processes; only after_step and "
            "begin_epoch may change it, from the rows of all processes"
        )
        error.on_every_rank = True
        raise error


def unlike(tensors: dict[str, torch.Tensor]) -> str | None:
    """Name of the first tensor that is not the same on every rank, found on all of them; None: there is no such one."""
    if world_size() == 1:
        return None
    digests = {
        name: f"{value.dtype} {list(value.shape)} {hashlib.sha256(_bytes_of(value).cpu().numpy().tobytes()).hexdigest()}"
        for name, value in tensors.items()
    }
    of_ranks = gather(lambda: digests)
    names = dict.fromkeys(name for own in of_ranks for name in own)
    return next((name for name in names if len({own.get(name) for own in of_ranks}) > 1), None)


def share_buffers(method: Method) -> None:
    """Give every rank the buffers of rank 0, such as the running statistics of batch norm, but for local state."""
    if world_size() == 1:
        return
    with torch.no_grad():
        for name, buffer in method.named_buffers():
            if name not in method.local_state:
                content = _bytes_of(buffer).clone()
                dist.broadcast(content, src=0)
                buffer.copy_(content.view(buffer.dtype).view(buffer.shape))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Its content in a form that every backend sends: not every one sends every type."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)
