"""Non-finite losses: noticed on the device, reported later, never trained on."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mlvision.engine.distributed import gather
from mlvision.errors import InputError


class NonFiniteError(InputError):
    """A loss or gradient was NaN or infinite; the message names the step and the images."""


class FiniteGuard:
    """Remembers the first step whose loss or gradient was not finite, without a host synchronisation a step.

    `tripped` is 0 or 1 on the device. Once it is 1, no update takes place any more, so the weights stay those of the last
    good step until `check` reads the flag and raises. Of several processes none goes on alone: the gradients that they share
    are made NaN by `poison` on the rank whose loss was not finite.
    """

    def __init__(self, device: torch.device, batch_size: int):
        self.tripped = torch.zeros((), device=device)
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._by_loss = torch.zeros((), dtype=torch.bool, device=device)
        self._index = torch.full((batch_size,), -1, dtype=torch.int64, device=device)

    def update(
        self, step: int, loss: Float[Tensor, ""], gradient_norm: Float[Tensor, ""] | None, index: Int64[Tensor, " b"]
    ) -> None:
        """Look at one step; `gradient_norm` is None where a loss scaler deals with overflowing gradients itself."""
        finite = loss.isfinite() if gradient_norm is None else loss.isfinite() & gradient_norm.isfinite()
        first = ~finite & (self.tripped == 0)
        self._step = torch.where(first, step, self._step)
        self._by_loss = torch.where(first, ~loss.isfinite(), self._by_loss)
        rows = torch.full_like(self._index, -1)
        rows[: len(index)] = index[: len(rows)]
        self._index = torch.where(first, rows, self._index)
        self.tripped = torch.where(first, 1.0, self.tripped)

    def poison(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The loss; with NaN gradients where it is not finite or the guard has tripped, so that no rank makes an update."""
        return loss * torch.where((self.tripped > 0) | ~loss.isfinite(), torch.nan, 1.0)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer.step()`, which does nothing once the guard has tripped.

        Fused optimizers are told on the device; others cost one synchronisation a step.
        """
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            vars(optimizer).update(grad_scale=None, found_inf=self.tripped)  # where the fused kernels look
            optimizer.step()
        elif self.tripped.item() == 0:
            optimizer.step()

    def check(self, keys: list[str]) -> None:
        """Read the flag (the one synchronisation).

        Args:
            keys: the image key of every manifest row.

        Raises:
            NonFiniteError: on every rank, naming step and images, if the guard of one has tripped.
        """
        tripped = [what for what in gather(self._tripped_on) if what is not None]
        if not tripped:
            return
        step = min(step for step, _, _ in tripped)
        at_step = [(by_loss, rows) for found, by_loss, rows in tripped if found == step]
        # A gradient is that of all ranks; a loss tells whose images they were.
        rows = [row for by_loss, rows in at_step if by_loss or not any(flag for flag, _ in at_step) for row in rows]
        named = ", ".join(keys[row] for row in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        error = NonFiniteError(
            f"step {step}: the loss or its gradient is not finite, for a batch with {named}; "
            "training stopped, the last checkpoint is from before; a lower optim.lr or optim.clip_norm may help"
        )
        error.on_every_rank = True
        raise error

    def _tripped_on(self) -> tuple[int, bool, list[int]] | None:
        """Step, whether the loss itself was not finite, and the rows of this rank's batch."""
        if self.tripped.item() == 0:
            return None
        return int(self._step), bool(self._by_loss), [row for row in self._index.tolist() if row >= 0]
