"""One training step after another, and all that a checkpoint has to hold for the next one to be the same after a resume."""

import time
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mlvision.engine.distributed import (
    Parallel,
    check_local_state,
    gather,
    gather_rows,
    on_every_rank,
    rank,
    share_buffers,
)
from mlvision.engine.guard import FiniteGuard
from mlvision.engine.log import LogConfig, RunLog, SilentLog
from mlvision.engine.optim import EmaConfig, OptimConfig, build_optimizer, learning_rate_factor
from mlvision.engine.precision import Precision
from mlvision.engine.seed import rng_state, set_rng_state
from mlvision.errors import InputError, first_line
from mlvision.methods.base import Method
from mlvision.types import Batch, EpochPlan, StepOutput


class LossWindow:
    """Means of the logged scalars since the last log step, each over the steps that logged it.

    Summed on the device; a part of the checkpoint for each rank.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        """The means over the steps and ranks that logged each scalar; starts anew."""
        of_ranks = gather(lambda: {name: (total.item(), self.counts[name]) for name, total in self.sums.items()})
        self.sums, self.counts = {}, {}
        means = {}
        for name in dict.fromkeys(name for sums in of_ranks for name in sums):
            totals, counts = zip(*(sums[name] for sums in of_ranks if name in sums), strict=True)
            means[f"train/{name}"] = sum(totals) / sum(counts)
        return means

    def state(self) -> dict[str, Any]:
        return {"sums": {name: total.cpu() for name, total in self.sums.items()}, "counts": self.counts}

    def restore(self, saved: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: total.to(device) for name, total in saved["sums"].items()}
        if "counts" in saved:
            self.counts = saved["counts"]
        else:  # checkpoints used to hold one count of steps for all scalars
            self.counts = {name: int(saved["count"]) for name in self.sums}


_NO_EMA, _LOG = EmaConfig(), LogConfig()


class Trainer:
    """Trains a method, step by step; `fit` runs it over epochs, and callbacks read it.

    Args:
        method: on `precision.device`.
        steps_per_epoch: of `optim.epochs` epochs, which the learning rate follows.
        images_per_step: over all ranks.
        keys: the image key of each training row, to name images in errors.

    Attributes:
        epoch: the epoch under way, from 0; equal to `optim.epochs` once all are done.
        steps_done: optimizer steps since the start of training.
        plan: the method's plan of the epoch under way; None before it is made.
        logged: what the last step wrote to the log; empty where it was no log step.
        validation: the last validation's metrics, by name: `val/raw/mAP`, `val/ema/mAP`, ...
        best: the highest selection metric so far, or None.
        best_epoch: the epoch that gave it, from 0.
        started: when this process began to train, and at which step.
        loss: mean of the training loss up to the last log step, since the one before; None before the first.
        stopped_by: the signal that ended training before its end, on whichever rank it came; else empty.

    Raises:
        InputError: an optimizer that cannot be built.
    """

    def __init__(
        self,
        method: Method,
        optim: OptimConfig,
        precision: Precision,
        *,
        steps_per_epoch: int,
        images_per_step: int,
        keys: list[str],
        ema: EmaConfig = _NO_EMA,
        log: LogConfig = _LOG,
    ):
        self.method, self.optim, self.precision = method, optim, precision
        self.forward = Parallel(method, optim.accumulate)  # first of all: it makes every rank's weights those of rank 0
        self.ema = ModelEmaV3(method, decay=ema.decay, use_warmup=True) if ema.decay else None
        self.optimizer = optimizer_of(method, optim)
        self.scaler = precision.scaler()
        self.guard = FiniteGuard(precision.device, images_per_step)
        self.steps_per_epoch, self.images_per_step, self.keys = steps_per_epoch, images_per_step, keys
        self.total_steps = optim.epochs * steps_per_epoch
        self.log_every = log.steps_between(self.total_steps)
        self.log: RunLog = SilentLog()
        self.epoch, self.steps_done = 0, 0
        self.plan: EpochPlan | None = None
        self.best: float | None = None
        self.best_epoch = 0
        self.logged: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.window = LossWindow()
        self.loss: float | None = None
        self.stopped_by = ""
        self.started: tuple[float, int] = time.perf_counter(), 0
        self._rate = learning_rate_factor(optim, self.total_steps)

    def step(self, batch: Batch) -> None:
        """One step: forward, backward, update, averages, and the log where it is due; `batch` is this rank's part."""
        output, index = self._passes(batch)
        logs = {"loss": output.loss, **output.logs}
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.optimizer, self.optim.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            logs["gradient_norm"] = clip_gradients(self.optimizer, self.optim.clip_norm)
            self.guard.update(self.steps_done + 1, output.loss, logs["gradient_norm"], index)
            self.guard.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        self._after_step(output)
        self.window.add(logs)
        self.logged = {}
        if self.steps_done % self.log_every == 0 or self.steps_done == self.total_steps:
            self._write_log()

    def _passes(self, batch: Batch) -> tuple[StepOutput, Tensor]:
        """Forward and backward pass; nothing is read back to the host."""
        rate = self.optim.lr * self._rate(self.steps_done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        batch = batch.to(self.precision.device)
        batch.images = batch.images.contiguous(memory_format=torch.channels_last)
        parts = batch.split(self.optim.accumulate)
        outputs = []
        for number, part in enumerate(parts, start=1):
            with self.forward.backward_of_part(is_last=number == len(parts)):
                with self.precision.autocast():
                    output = self.forward(part)
                loss = self.guard.poison(output.loss) / len(parts)
                if self.scaler.is_enabled():
                    self.guard.update(self.steps_done + 1, output.loss, None, part.index)
                    loss = self.scaler.scale(loss)
                loss.backward()
            outputs.append(StepOutput(output.loss.detach(), output.logs, output.rows))
        return whole_output(outputs), batch.index

    @torch.no_grad()
    def _after_step(self, output: StepOutput) -> None:
        method = self.method
        if method.helpers:
            share_buffers(method)  # or a helper that follows the method would follow another one on each rank
        method.after_step(gather_rows(output.rows))
        if self.ema:
            self.ema.update(method, step=self.steps_done)
            for name in method.local_state:
                self.ema.module.get_buffer(name).copy_(method.get_buffer(name))

    def _write_log(self) -> None:
        """Write the means since the last log step."""
        self.guard.check(self.keys)
        values = self.window.pop() | {"train/lr": self.optimizer.param_groups[0]["lr"]}
        on_every_rank(lambda: self.log.metrics(self.steps_done, self.epoch, values))
        self.loss = values["train/loss"]
        self.logged = values

    def weights(self) -> dict[str, Any]:
        """What evaluation and prediction need."""
        return {
            "method": self.method.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "epoch": self.epoch,
            "step": self.steps_done,
            "best": self.best,
            "best_epoch": self.best_epoch,
        }

    def checkpoint(self) -> dict[str, Any]:
        """The weights, and everything else that a bit-exact resume needs, of all ranks: each has to call it.

        Raises:
            NonFiniteError: a loss or gradient since the last look was not finite.
            InputError: local state that differs between ranks.
        """
        self.guard.check(self.keys)
        check_local_state(self.method)
        main, *others = gather(
            lambda: {"rng": rng_state(), "window": self.window.state(), "log_position": self.log.position()}
        )
        return self.weights() | {
            "helpers": {name: helper.state_dict() for name, helper in self.method.helpers.items()},
            "plan": None if self.plan is None else vars(self.plan),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "other_ranks": others,
            **main,
        }

    def restore(self, path: Path, saved: dict[str, Any]) -> None:
        """Take over a loaded checkpoint.

        Raises:
            InputError: it belongs to another model.
        """
        try:
            self.method.load_state_dict(saved["method"])
            for name, helper in self.method.helpers.items():
                helper.load_state_dict(saved["helpers"][name])
            if self.ema:
                self.ema.module.load_state_dict(saved["ema"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"{path}: does not fit this model ({first_line(error)})") from error
        self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.steps_done, self.best = saved["epoch"], saved["step"], saved["best"]
        self.best_epoch = saved.get("best_epoch", 0)  # of a run that was begun without patience
        if saved.get("plan") is not None:  # older checkpoints have none
            self.plan = EpochPlan(**saved["plan"])
        self.log.cut(saved["log_position"], self.steps_done)
        of_ranks = [saved, *saved.get("other_ranks", [])]
        if rank() < len(of_ranks):  # a rank that was not there before keeps the generators that it was started with
            own = of_ranks[rank()]
            self.window.restore(own["window"], self.method.mean.device)
            set_rng_state(own["rng"])


def optimizer_of(method: Method, optim: OptimConfig) -> torch.optim.Optimizer:
    """Over the method's groups, and its layers where they learn at rates of their own."""
    return build_optimizer(method.parameter_groups(), optim, method.layers() if optim.layer_decay < 1 else ())


def whole_output(outputs: list[StepOutput]) -> StepOutput:
    """Of the equal parts of one step: each scalar's mean over the parts that log it, and all rows."""
    if len(outputs) == 1:
        return outputs[0]
    names = dict.fromkeys(name for output in outputs for name in output.logs)
    logs = {name: torch.stack([o.logs[name] for o in outputs if name in o.logs]).mean(0) for name in names}
    rows = {name: torch.cat([output.rows[name] for output in outputs]) for name in outputs[0].rows}
    return StepOutput(torch.stack([output.loss for output in outputs]).mean(0), logs, rows)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """The global gradient norm before clipping; gradients are scaled down to `max_norm` where that is above 0."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
