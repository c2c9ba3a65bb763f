"""Non-finite losses: noticed on the device, reported later, never trained on."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mlvision.errors import InputError


class NonFiniteError(InputError):
    """A loss or gradient was NaN or infinite; the message names the step and the images."""


class FiniteGuard:
    """Remembers the first step whose loss or gradient was not finite, without a host synchronisation a step.

    `tripped` is 0 or 1 on the device. Once it is 1, no update takes place any more, so the weights stay those of the last
    good step until `check` reads the flag and raises.
    """

    def __init__(self, device: torch.device, batch_size: int):
        self.tripped = torch.zeros((), device=device)
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._index = torch.full((batch_size,), -1, dtype=torch.int64, device=device)

    def update(
        self, step: int, loss: Float[Tensor, ""], gradient_norm: Float[Tensor, ""] | None, index: Int64[Tensor, " b"]
    ) -> None:
        """Look at one step; `gradient_norm` is None where a loss scaler deals with overflowing gradients itself."""
        finite = loss.isfinite() if gradient_norm is None else loss.isfinite() & gradient_norm.isfinite()
        first = ~finite & (self.tripped == 0)
        self._step = torch.where(first, step, self._step)
        rows = torch.full_like(self._index, -1)
        rows[: len(index)] = index[: len(rows)]
        self._index = torch.where(first, rows, self._index)
        self.tripped = torch.where(first, 1.0, self.tripped)

    def poison(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The loss, with NaN gradients once the guard has tripped: a loss scaler then skips this and every later update."""
        return loss * torch.where(self.tripped > 0, torch.nan, 1.0)

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
            NonFiniteError: naming step and images, if the guard has tripped.
        """
        if self.tripped.item() == 0:
            return
        rows = [int(row) for row in self._index if row >= 0]
        named = ", ".join(keys[row] for row in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        raise NonFiniteError(
            f"step {int(self._step)}: the loss or its gradient is not finite, for a batch with {named}; "
            "training stopped, the last checkpoint is from before; a lower optim.lr or optim.clip_norm may help"
        )
