"""Things that watch a run: handed to `fit(..., callbacks=())` from above, called in their order."""

from typing import Protocol, runtime_checkable

from mlvision.engine.distributed import is_main
from mlvision.engine.trainer import Trainer
from mlvision.progress import Progress


@runtime_checkable
class Callback(Protocol):
    """Does nothing at each of the three moments; a callback overrides those that it wants, or has all three of its own.

    They may read all of the trainer, and write to `trainer.log.tensorboard` (None on ranks above 0, where callbacks are
    called as well).
    """

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Before the first step of an epoch, or where a resumed run enters it."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After each optimizer step; must not read tensors back to the host."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After validation, before the checkpoint; `trainer.validation` holds its summary."""


class ProgressBar(Callback):
    """Steps of an epoch with the loss of the last log step: a bar on a terminal, else a line every half minute."""

    def __init__(self):
        self._progress: Progress | None = None

    def on_epoch_start(self, trainer: Trainer) -> None:
        self._progress = Progress(
            trainer.steps_per_epoch,
            f"epoch {trainer.epoch + 1}/{trainer.optim.epochs}",
            "steps",
            done=trainer.steps_done - trainer.epoch * trainer.steps_per_epoch,
            more=(trainer.optim.epochs - trainer.epoch - 1) * trainer.steps_per_epoch,
            images=trainer.images_per_step,
            shown=is_main(),
        )

    def on_step_end(self, trainer: Trainer) -> None:
        assert self._progress is not None
        if trainer.logged:
            self._progress.note(f"loss {trainer.logged['train/loss']:.4f}")
        self._progress.update()

    def on_epoch_end(self, trainer: Trainer) -> None:
        assert self._progress is not None
        self._progress.close()
