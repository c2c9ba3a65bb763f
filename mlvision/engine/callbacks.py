"""Things that watch a run: handed to `fit(..., callbacks=())` from above, called in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mlvision.engine.distributed import is_main
from mlvision.progress import Progress

if TYPE_CHECKING:
    from mlvision.engine.fit import FitState


@runtime_checkable
class Callback(Protocol):
    """Does nothing at each of the three moments; a callback overrides those that it wants, or has all three of its own.

    `state` is the loop's own FitState: read it, write to `state.log.tensorboard` (None on ranks above 0, where callbacks are
    called as well), leave the rest alone.
    """

    def on_epoch_start(self, state: FitState) -> None:
        """Before the first step of an epoch, or where a resumed run enters it."""

    def on_step_end(self, state: FitState) -> None:
        """After each optimizer step; must not read tensors back to the host."""

    def on_epoch_end(self, state: FitState) -> None:
        """After validation, before the checkpoint; `state.validation` holds its summary."""


class ProgressBar(Callback):
    """Steps of an epoch with the loss of the last log step: a bar on a terminal, else a line every half minute."""

    def __init__(self):
        self._progress: Progress | None = None

    def on_epoch_start(self, state: FitState) -> None:
        self._progress = Progress(
            state.steps_per_epoch,
            f"epoch {state.epoch + 1}/{state.epochs}",
            "steps",
            done=state.step - state.epoch * state.steps_per_epoch,
            more=(state.epochs - state.epoch - 1) * state.steps_per_epoch,
            images=state.images_per_step,
            shown=is_main(),
        )

    def on_step_end(self, state: FitState) -> None:
        assert self._progress is not None
        if state.logged:
            self._progress.note(f"loss {state.logged['train/loss']:.4f}")
        self._progress.update()

    def on_epoch_end(self, state: FitState) -> None:
        assert self._progress is not None
        self._progress.close()
