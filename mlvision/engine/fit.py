"""The training loop. It knows the Method interface and nothing of any one method, config file or data set."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mlvision.data.loader import Loader
from mlvision.engine.callbacks import Callback
from mlvision.engine.checkpoint import CheckpointConfig, check_classes, load_checkpoint, save_checkpoint
from mlvision.engine.distributed import (
    InStep,
    gather,
    is_main,
    on_every_rank,
    on_main,
    parallel,
    rank,
    share_buffers,
)
from mlvision.engine.evaluate import predict
from mlvision.engine.guard import FiniteGuard
from mlvision.engine.log import LogConfig, RunLog, SilentLog
from mlvision.engine.optim import EmaConfig, OptimConfig, build_optimizer, learning_rate_factor
from mlvision.engine.precision import Precision
from mlvision.engine.seed import rng_state, set_rng_state
from mlvision.engine.stop import StopSignal
from mlvision.errors import InputError, first_line
from mlvision.losses import binary_cross_entropy, softmax_cross_entropy
from mlvision.methods.base import Method
from mlvision.progress import duration
from mlvision.types import Batch, Predictions, StepOutput

LAST, BEST = "checkpoints/last.pt", "checkpoints/best.pt"


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


@dataclass
class FitState:
    """All that changes while a run trains; callbacks read it.

    Attributes:
        epoch: the epoch under way, from 0; equal to `epochs` once all are done.
        step: optimizer steps done since the start of training.
        logged: what the last step wrote to the log; empty where it was no log step.
        validation: the last validation's metrics, by name: `val/raw/mAP`, `val/ema/mAP`, ...
        best: the highest selection metric so far, or None.
        best_epoch: the epoch that gave it, from 0.
        images_per_step: over all ranks.
        started: when this process began to train, and at which step.
        loss: mean of the training loss up to the last log step, since the one before; None before the first.
        stopped_by: the signal that ended training before its end, on whichever rank it came; else empty.
    """

    method: Method
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    log: RunLog
    steps_per_epoch: int
    epochs: int
    epoch: int = 0
    step: int = 0
    best: float | None = None
    best_epoch: int = 0
    logged: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    window: LossWindow = field(default_factory=LossWindow)
    loss: float | None = None
    stopped_by: str = ""
    images_per_step: int = 1
    started: tuple[float, int] = field(default_factory=lambda: (time.perf_counter(), 0))

    def weights(self) -> dict[str, Any]:
        """What evaluation and prediction need."""
        return {
            "method": self.method.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "best_epoch": self.best_epoch,
        }

    def checkpoint(self) -> dict[str, Any]:
        """The weights, and everything else that a bit-exact resume needs, of all ranks: each has to call it."""
        main, *others = gather(
            lambda: {"rng": rng_state(), "window": self.window.state(), "log_position": self.log.position()}
        )
        return self.weights() | {
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
            if self.ema:
                self.ema.module.load_state_dict(saved["ema"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"{path}: does not fit this model ({first_line(error)})") from error
        self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step, self.best = saved["epoch"], saved["step"], saved["best"]
        self.best_epoch = saved.get("best_epoch", 0)  # of a run that was begun without patience
        self.log.cut(saved["log_position"], self.step)
        of_ranks = [saved, *saved.get("other_ranks", [])]
        if rank() < len(of_ranks):  # a rank that was not there before keeps the generators that it was started with
            own = of_ranks[rank()]
            self.window.restore(own["window"], self.method.mean.device)
            set_rng_state(own["rng"])


def fit(
    method: Method,
    train_loader: Loader,
    val_loader: Loader,
    measure: Callable[[Predictions], dict[str, float]],
    *,
    run_dir: Path,
    classes: Sequence[str],
    keys: list[str],
    data_hashes: dict[str, str],
    precision: Precision,
    optim: OptimConfig,
    ema: EmaConfig,
    checkpoint: CheckpointConfig,
    log: LogConfig,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> FitState:
    """Train `method` (already on `precision.device`) and leave its checkpoints and curves in `run_dir`.

    A validation pass closes each epoch; `checkpoints/best.pt` is the epoch whose selected weights (EMA where there is one,
    else raw) had the highest `checkpoint.select`. SIGTERM and Ctrl-C save and return early. Of several
    processes each has the loaders of its own part, all raise the same errors, and rank 0 writes.

    Args:
        measure: what is measured of the predictions of the validation images, by name.
        classes: class names, kept in the checkpoints.
        keys: the image key of each training row, to name images in errors.
        data_hashes: identity of the training and validation records and what else a run resumes on alone, by name.
        resume: go on from `checkpoints/last.pt`.

    Raises:
        NonFiniteError: a loss or gradient was not finite.
        InputError: an option or the checkpoint to resume from does not fit.
    """
    total_steps = optim.epochs * len(train_loader)
    log_every = log.steps_between(total_steps)
    rate = learning_rate_factor(optim, total_steps)
    identity = {"classes": list(classes), "data_hashes": data_hashes}
    guard = FiniteGuard(precision.device, train_loader.images_per_step)
    forward = parallel(method)  # first of all: it makes every rank's weights those of rank 0

    def begin() -> FitState:
        saved = load_checkpoint(run_dir / LAST, to_resume=True) if resume else None
        state = FitState(
            method=method,
            ema=ModelEmaV3(method, decay=ema.decay, use_warmup=True) if ema.decay else None,
            optimizer=optimizer_of(method, optim),
            scaler=precision.scaler(),
            log=RunLog(run_dir, log.tensorboard, resume) if is_main() else SilentLog(),
            steps_per_epoch=len(train_loader),
            epochs=optim.epochs,
            images_per_step=train_loader.images_per_step,
        )
        if saved is not None:
            check_identity(run_dir / LAST, saved, identity)
            state.restore(run_dir / LAST, saved)
        state.started = time.perf_counter(), state.step
        return state

    def save() -> None:
        guard.check(keys)
        content = state.checkpoint() | identity
        on_main(lambda: save_checkpoint(run_dir / LAST, content))

    state = on_every_rank(begin)
    if checkpoint.ends(state.epoch, optim.epochs, state.best_epoch):
        state.log.line(f"all {state.epoch} epochs are trained already")
    stop = StopSignal()
    try:
        with stop.noted():
            while not checkpoint.ends(state.epoch, optim.epochs, state.best_epoch):
                started, first_step = time.perf_counter(), state.step
                method.on_epoch_start(state.epoch)
                train_loader.set_position(state.epoch, state.step - state.epoch * len(train_loader))
                for callback in callbacks:
                    callback.on_epoch_start(state)
                method.train()
                steps = InStep(stop.ends(train_loader), stop)
                for batch in steps:
                    train_step(state, forward, batch, guard, precision, rate(state.step), optim)
                    at_log_step = state.step % log_every == 0 or state.step == total_steps
                    state.logged = log_step(state, guard, keys) if at_log_step else {}
                    for callback in callbacks:
                        callback.on_step_end(state)
                    if checkpoint.every_steps and state.step % checkpoint.every_steps == 0:
                        save()
                if steps.stopped:
                    save()
                    state.stopped_by = next(filter(None, gather(lambda: stop.name)))
                    state.log.line(
                        f"stopped by {state.stopped_by} at step {state.step}; saved; to go on, give the same command with "
                        f"out={run_dir} resume=auto"
                    )
                    return state
                guard.check(keys)
                images = (state.step - first_step) * train_loader.images_per_step
                # A run that was stopped before a validation goes on with it: no step, no speed.
                speed = images / max(time.perf_counter() - started, 1e-9) if images else None
                improved = validate(state, val_loader, precision, measure, checkpoint.select)
                on_every_rank(partial(close_epoch, state, callbacks, speed, improved))
                state.epoch += 1
                if improved:
                    weights = state.weights() | identity
                    on_main(partial(save_checkpoint, run_dir / BEST, weights))
                save()
            if state.epoch < optim.epochs:
                state.log.line(f"stopped after {checkpoint.patience} epochs without a better {checkpoint.select}")
    finally:
        state.log.close()
    return state


def optimizer_of(method: Method, optim: OptimConfig) -> torch.optim.Optimizer:
    """Over the method's groups, and its layers where they learn at rates of their own."""
    return build_optimizer(method.parameter_groups(), optim, method.layers() if optim.layer_decay < 1 else ())


def check_identity(path: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse to go on with other classes or data than a checkpoint was trained on.

    Raises:
        InputError: names what differs.
    """
    check_classes(path, saved["classes"], tuple(identity["classes"]))
    then, now = saved["data_hashes"], identity["data_hashes"]
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name, "none"), now.get(name, "none")
        if before != after:
            raise InputError(
                f"{path}: the {name} have changed since it was saved (then {before[:12]}, now {after[:12]})"
            )


def train_step(
    state: FitState,
    forward: Callable[[Batch], StepOutput],
    batch: Batch,
    guard: FiniteGuard,
    precision: Precision,
    rate: float,
    optim: OptimConfig,
) -> None:
    """Forward, backward, one update, EMA; nothing is read back to the host."""
    for group in state.optimizer.param_groups:
        group["lr"] = optim.lr * rate * group["lr_scale"]
    batch = batch.to(precision.device)
    batch.images = batch.images.contiguous(memory_format=torch.channels_last)
    parts = batch.split(optim.accumulate)
    outputs = []
    for part in parts:
        with precision.autocast():
            output = forward(part)
        loss = guard.poison(output.loss) / len(parts)
        if state.scaler.is_enabled():
            guard.update(state.step + 1, output.loss, None, part.index)
            loss = state.scaler.scale(loss)
        loss.backward()
        outputs.append(StepOutput(output.loss.detach(), output.logs))
    output = mean_output(outputs)
    logs = {"loss": output.loss, **output.logs}
    if state.scaler.is_enabled():
        state.scaler.unscale_(state.optimizer)
        clip_gradients(state.optimizer, optim.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        logs["gradient_norm"] = clip_gradients(state.optimizer, optim.clip_norm)
        guard.update(state.step + 1, output.loss, logs["gradient_norm"], batch.index)
        guard.step(state.optimizer)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.method.after_step(output)
    if state.ema:
        state.ema.update(state.method, step=state.step)
    state.window.add(logs)


def mean_output(outputs: list[StepOutput]) -> StepOutput:
    """Of the equal parts of one step, each scalar over the parts that log it; their graphs are gone."""
    if len(outputs) == 1:
        return outputs[0]
    names = dict.fromkeys(name for output in outputs for name in output.logs)
    logs = {name: torch.stack([o.logs[name] for o in outputs if name in o.logs]).mean(0) for name in names}
    return StepOutput(torch.stack([output.loss for output in outputs]).mean(0), logs)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """The global gradient norm before clipping; gradients are scaled down to `max_norm` where that is above 0."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def log_step(state: FitState, guard: FiniteGuard, keys: list[str]) -> dict[str, float]:
    """Write the means since the last log step."""
    guard.check(keys)
    values = state.window.pop() | {"train/lr": state.optimizer.param_groups[0]["lr"]}
    on_every_rank(lambda: state.log.metrics(state.step, state.epoch, values))
    state.loss = values["train/loss"]
    return values


def validate(
    state: FitState,
    loader: Loader,
    precision: Precision,
    measure: Callable[[Predictions], dict[str, float]],
    select: str,
) -> bool:
    """Measure raw and EMA weights apart on the validation split; True where the selected ones are the best so far."""
    state.validation = {}
    for weights, method in (("raw", state.method), ("ema", state.ema.module if state.ema else None)):
        if method is not None:
            share_buffers(method)
            predictions = predict(method, loader.tracked(f"validating {weights} weights", shown=is_main()), precision)
            metrics = measure(predictions) | {"loss": validation_loss(predictions)}
            state.validation |= {f"val/{weights}/{name}": value for name, value in metrics.items()}
    on_every_rank(lambda: state.log.metrics(state.step, state.epoch, state.validation))
    if select == "last":
        return True
    value = state.validation[f"val/{'ema' if state.ema else 'raw'}/{select}"]
    improved = state.best is None or math.isnan(state.best) or value > state.best
    if improved:
        state.best, state.best_epoch = value, state.epoch
    return improved


def validation_loss(predictions: Predictions) -> float:
    """Cross-entropy with the labels as they are, whatever the method trains: summed over classes, mean over images."""
    loss = softmax_cross_entropy if predictions.activation == "softmax" else binary_cross_entropy
    return float(loss(predictions.logits, predictions.targets))


def check_options(
    method: Method,
    optim: OptimConfig,
    checkpoint: CheckpointConfig,
    images_per_rank: int,
    metrics: Sequence[str],
) -> None:
    """Find, before anything is written, what `fit` would stumble over.

    Args:
        metrics: names of what validation gives, of those that are better the higher they are.

    Raises:
        InputError: an optimizer that cannot be built, a batch that cannot be divided, or a selection metric that validation
            does not give.
    """
    optimizer_of(method, optim)
    if images_per_rank % optim.accumulate:
        raise InputError(
            f"optim.accumulate: the {images_per_rank} images of a step and process cannot be divided into {optim.accumulate}"
        )
    if checkpoint.select not in ("last", *metrics):
        raise InputError(
            f"checkpoint.select: no metric '{checkpoint.select}' by which the evaluators could choose; expected one of "
            + ", ".join(("last", *metrics))
        )


def close_epoch(
    state: FitState, callbacks: Sequence[Callback], images_per_second: float | None, improved: bool
) -> None:
    """Callbacks, one line for people, and the throughput for TensorBoard."""
    for callback in callbacks:
        callback.on_epoch_end(state)
    found = {weights: state.validation.get(f"val/{weights}/mAP") for weights in ("raw", "ema")}
    measured = "  ".join(f"{weights} {value:.4f}" for weights, value in found.items() if value is not None)
    measured = f"  val mAP (plain): {measured}" if measured else ""
    loss = "" if state.loss is None else f"  loss {state.loss:.4f}"
    pace = ""
    if images_per_second is not None:
        state.log.timings(state.step, {"time/images_per_second": images_per_second})
        since, first_step = state.started
        per_step = (time.perf_counter() - since) / (state.step - first_step)
        left = duration((state.epochs * state.steps_per_epoch - state.step) * per_step)
        pace = f"  {images_per_second:.0f} images/s  {left} left"
    state.log.line(
        f"epoch {state.epoch + 1}/{state.epochs}  step {state.step}{loss}{measured}{pace}{'  best' if improved else ''}"
    )
