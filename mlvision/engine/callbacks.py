"""Things that watch a run: handed to `fit(..., callbacks=())` from above, called in their order."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tqdm import tqdm

from mlvision.engine.distributed import is_main

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
    """A tqdm bar over the steps of an epoch, with the loss of the last log step; silent where stderr is no terminal."""

    def __init__(self):
        self._bar = tqdm(disable=True)

    def on_epoch_start(self, state: FitState) -> None:
        self._bar = tqdm(
            total=state.steps_per_epoch,
            initial=state.step - state.epoch * state.steps_per_epoch,
            desc=f"epoch {state.epoch + 1}/{state.epochs}",
            unit="step",
            leave=False,
            disable=not (is_main() and sys.stderr.isatty()),
        )

    def on_step_end(self, state: FitState) -> None:
        self._bar.update()
        if state.logged:
            self._bar.set_postfix(loss=f"{state.logged['train/loss']:.4f}", refresh=False)

    def on_epoch_end(self, state: FitState) -> None:
        self._bar.close()
