"""The training loop. It knows the Method interface and nothing of any one method, config file or data set."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlvision.data.loader import Loader
from mlvision.engine.callbacks import Callback
from mlvision.engine.checkpoint import CheckpointConfig, check_classes, load_checkpoint, save_checkpoint
from mlvision.engine.distributed import (
    InStep,
    gather,
    is_main,
    on_every_rank,
    on_main,
    share_buffers,
    unlike,
)
from mlvision.engine.evaluate import predict
from mlvision.engine.log import RunLog
from mlvision.engine.optim import OptimConfig
from mlvision.engine.precision import Precision
from mlvision.engine.stop import StopSignal
from mlvision.engine.trainer import Trainer, optimizer_of
from mlvision.errors import InputError
from mlvision.losses import softmax_cross_entropy
from mlvision.methods.base import Epoch, Method
from mlvision.progress import duration
from mlvision.types import Predictions

LAST, BEST = "checkpoints/last.pt", "checkpoints/best.pt"


def fit(
    trainer: Trainer,
    train_loader: Loader,
    eval_loaders: dict[str, Loader],
    measure: Callable[[Predictions], dict[str, float]],
    *,
    run_dir: Path,
    identity: dict[str, Any],
    checkpoint: CheckpointConfig,
    seed: int = 0,
    tensorboard: bool = True,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train a method and leave its checkpoints and curves in `run_dir`.

    A validation pass closes each epoch; `checkpoints/best.pt` is the epoch whose selected weights (EMA where there is one,
    else raw) had the highest `checkpoint.select`. SIGTERM and Ctrl-C save and return early. Of several
    processes each has the loaders of its own part, all raise the same errors, and rank 0 writes.

    Args:
        eval_loaders: of the roles train and val: their images as at evaluation.
        measure: what is measured of the predictions of the validation images, by name.
        identity: `classes`, their `groups` of which each image shows one class, and `data_hashes` (of the training and
            validation records and what else a run resumes on only, by name), which checkpoints keep and a resumed run must
            have.
        seed: of the run, for what methods draw when they plan an epoch.
        resume: go on from `checkpoints/last.pt`.

    Raises:
        NonFiniteError: a loss or gradient was not finite.
        InputError: an option or the checkpoint to resume from does not fit.
    """
    epochs = trainer.optim.epochs

    def begin() -> None:
        saved = load_checkpoint(run_dir / LAST, to_resume=True) if resume else None
        if is_main():
            trainer.log = RunLog(run_dir, tensorboard, resume)
        if saved is not None:
            check_identity(run_dir / LAST, saved, identity)
            trainer.restore(run_dir / LAST, saved)
        trainer.started = time.perf_counter(), trainer.steps_done

    def save() -> None:
        content = trainer.checkpoint() | identity
        on_main(lambda: save_checkpoint(run_dir / LAST, content))

    on_every_rank(begin)
    if checkpoint.ends(trainer.epoch, epochs, trainer.best_epoch):
        trainer.log.line(f"all {trainer.epoch} epochs are trained already")
    stop = StopSignal()
    try:
        with stop.noted():
            while not checkpoint.ends(trainer.epoch, epochs, trainer.best_epoch):
                begin_epoch(trainer, train_loader, eval_loaders, seed)
                started, first_step = time.perf_counter(), trainer.steps_done
                for callback in callbacks:
                    callback.on_epoch_start(trainer)
                trainer.method.train()
                steps = InStep(stop.ends(train_loader), stop)
                for batch in steps:
                    trainer.step(batch)
                    for callback in callbacks:
                        callback.on_step_end(trainer)
                    if checkpoint.every_steps and trainer.steps_done % checkpoint.every_steps == 0:
                        save()
                if steps.stopped:
                    save()
                    trainer.stopped_by = next(filter(None, gather(lambda: stop.name)))
                    trainer.log.line(
                        f"stopped by {trainer.stopped_by} at step {trainer.steps_done}; saved; to go on, give the same "
                        f"command with out={run_dir} resume=auto"
                    )
                    return
                trainer.guard.check(trainer.keys)
                images = (trainer.steps_done - first_step) * train_loader.images_per_step
                # A run that was stopped before a validation goes on with it: no step, no speed.
                speed = images / max(time.perf_counter() - started, 1e-9) if images else None
                improved = validate(trainer, eval_loaders["val"], measure, checkpoint.select)
                on_every_rank(partial(close_epoch, trainer, callbacks, speed, improved))
                trainer.epoch, trainer.plan = trainer.epoch + 1, None
                if improved:
                    weights = trainer.weights() | identity
                    on_main(partial(save_checkpoint, run_dir / BEST, weights))
                save()
            if trainer.epoch < epochs:
                trainer.log.line(f"stopped after {checkpoint.patience} epochs without a better {checkpoint.select}")
    finally:
        trainer.log.close()


def begin_epoch(trainer: Trainer, train_loader: Loader, eval_loaders: dict[str, Loader], seed: int) -> None:
    """Put method and loader where the trainer is: into an epoch that begins, or that a resumed run goes on with.

    Raises:
        InputError: a plan that does not fit the data, or that differs between processes.
    """
    method, number = trainer.method, trainer.epoch
    method.epoch = number
    if trainer.plan is None:
        epoch_seed = int(np.random.SeedSequence([seed, number], spawn_key=(2,)).generate_state(1, np.uint64)[0])

        def predictions_of(role: str) -> Predictions:
            return predict_together(method, eval_loaders[role], trainer.precision, f"predicting {role} images")

        epoch = Epoch(number, epoch_seed, train_loader.dataset.manifest, predictions_of)
        trainer.plan = on_every_rank(lambda: method.begin_epoch(epoch)).to("cpu")
        columns = {"order": trainer.plan.order, "targets": trainer.plan.targets, **trainer.plan.extra}
        name = unlike({name: column for name, column in columns.items() if column is not None})
        if name is not None:
            error = InputError(
                f"{type(method).__name__}: '{name}' of its plan of epoch {number} differs between processes"
            )
            error.on_every_rank = True
            raise error
    if trainer.plan.order is not None and not method.has_order:
        raise InputError(f"{type(method).__name__}: begin_epoch plans an order, which takes has_order = True")
    start_step = trainer.steps_done - number * len(train_loader)
    on_every_rank(lambda: train_loader.set_position(number, start_step, trainer.plan))


def predict_together(method: Method, loader: Loader, precision: Precision, what: str) -> Predictions:
    """`predict` with the buffers of rank 0 on all ranks, and `what` for its progress."""
    share_buffers(method)
    return predict(method, loader.tracked(what, shown=is_main()), precision)


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


def validate(
    trainer: Trainer,
    loader: Loader,
    measure: Callable[[Predictions], dict[str, float]],
    select: str,
) -> bool:
    """Measure raw and EMA weights apart on the validation split; True where the selected ones are the best so far."""
    trainer.validation = {}
    for weights, method in (("raw", trainer.method), ("ema", trainer.ema.module if trainer.ema else None)):
        if method is not None:
            predictions = predict_together(method, loader, trainer.precision, f"validating {weights} weights")
            metrics = measure(predictions) | {"loss": validation_loss(predictions)}
            trainer.validation |= {f"val/{weights}/{name}": value for name, value in metrics.items()}
    on_every_rank(lambda: trainer.log.metrics(trainer.steps_done, trainer.epoch, trainer.validation))
    if select == "last":
        return True
    value = trainer.validation[f"val/{'ema' if trainer.ema else 'raw'}/{select}"]
    improved = trainer.best is None or math.isnan(trainer.best) or value > trainer.best
    if improved:
        trainer.best, trainer.best_epoch = value, trainer.epoch
    return improved


def validation_loss(predictions: Predictions) -> float:
    """Cross-entropy with the labels as they are, whatever the method trains: summed over classes, mean over images."""
    return float(softmax_cross_entropy(predictions.logits, predictions.targets, groups=predictions.space.groups))


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
    trainer: Trainer, callbacks: Sequence[Callback], images_per_second: float | None, improved: bool
) -> None:
    """Callbacks, one line for people, and the throughput for TensorBoard."""
    for callback in callbacks:
        callback.on_epoch_end(trainer)
    found = {weights: trainer.validation.get(f"val/{weights}/mAP") for weights in ("raw", "ema")}
    measured = "  ".join(f"{weights} {value:.4f}" for weights, value in found.items() if value is not None)
    measured = f"  val mAP (plain): {measured}" if measured else ""
    loss = "" if trainer.loss is None else f"  loss {trainer.loss:.4f}"
    pace = ""
    if images_per_second is not None:
        trainer.log.timings(trainer.steps_done, {"time/images_per_second": images_per_second})
        since, first_step = trainer.started
        per_step = (time.perf_counter() - since) / (trainer.steps_done - first_step)
        left = duration((trainer.optim.epochs * trainer.steps_per_epoch - trainer.steps_done) * per_step)
        pace = f"  {images_per_second:.0f} images/s  {left} left"
    trainer.log.line(
        f"epoch {trainer.epoch + 1}/{trainer.optim.epochs}  step {trainer.steps_done}{loss}{measured}{pace}"
        f"{'  best' if improved else ''}"
    )
