"""Conditional transport between the patches of an image and its labels, and the plan that Sinkhorn's steps lead to."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlvision.errors import InputError
from mlvision.losses.reduction import check_values

PLANS = ("ct", "sinkhorn")
STEPS_PER_CHECK = 10  # reading the error back waits for a GPU


class Transport(NamedTuple):
    """What it costs to carry patches to labels and labels to patches, and which goes where.

    Attributes:
        cost: `[B]`; 0 for an image without a label or without a patch of positive weight.
        forward_plan: `[B, N, C]`: where each patch goes. A row sums to 1, with a sink to 1 less what the sink takes; to 0 in
            an image whose cost is 0 for that reason.
        backward_plan: `[B, N, C]`: where each label goes, also one without weight. Columns sum to 1.
    """

    cost: Float[Tensor, " B"]
    forward_plan: Float[Tensor, "B N C"]
    backward_plan: Float[Tensor, "B N C"]


def conditional_transport(
    patches: Float[Tensor, "B N D"],
    labels: Float[Tensor, "C D"] | Float[Tensor, "B C D"],
    label_weights: Float[Tensor, "B C"],
    patch_weights: Float[Tensor, "B N"] | None = None,
    *,
    plan: str = "ct",
    tau: float | Tensor = 0.07,
    rho: float = 0.5,
    navigator: Callable[[Tensor, Tensor], Tensor] | None = None,
    sink: Float[Tensor, " D"] | None = None,
    sink_mass: float = 0.5,
    tolerance: float = 1e-3,
    max_steps: int = 1000,
) -> Transport:
    """The expected cost `1 - cos` of going from patches to labels and back, each by a softmax of how near they are.

        forward_plan[n, m]  = beta_m exp(-d[n, m]) / sum_j beta_j exp(-d[n, j])
        backward_plan[n, m] = theta_n exp(-d[n, m]) / sum_i theta_i exp(-d[i, m])
        cost = rho sum_n theta_n sum_m forward_plan c[n, m] + (1 - rho) sum_m beta_m sum_n backward_plan c[n, m]

    theta and beta are the weights of patches and labels, divided by their sums, and d = -cos / tau. Labels without weight
    (absent or unknown) draw nothing. Both plans keep one marginal each, their own; Sinkhorn's steps make them one plan that
    keeps both.

    Args:
        patches: Any float dtype; computed in at least float32, also under autocast.
        labels: One set for all images, or one for each.
        label_weights: 0 or more; NaN, an unknown label, counts as 0. In training the targets.
        patch_weights: 0 or more; all alike by default. Both weights are checked on a CPU only: reading them back would
            stall a GPU.
        plan: ct; or sinkhorn, with steps in the log domain until each patch's share is met within `tolerance`.
        tau: Temperature of the default navigator; may be learnt.
        rho: Share of the way from patches to labels, 0 to 1.
        navigator: Gives d `[B, N, C]` of patches and labels in the place of -cos / tau.
        sink: A prototype of what no label is about: one more label of the weight `sink_mass`, the others have the rest.
            Patches of the background need not go to a label then.
        sink_mass: Share of the labels' weight, at least 0 and less than 1.
        tolerance: Of Sinkhorn's plan: the largest relative error of a marginal (float32 resolves about 1e-7 / tau).
        max_steps: Of Sinkhorn's plan: where an image ends that does not get there. 50 steps at tau 0.01 miss a marginal by
            some percent; a few hundred are usual there, about 10 at 0.07.

    Raises:
        InputError: Shapes do not fit, no such plan, a number out of range, or a weight that is negative or infinite.

    Source: Zheng & Zhou, "Exploiting Chain Rule and Bayes' Theorem to Compare Probability Distributions", NeurIPS 2021;
    between patches and labels Li et al., "PatchCT", ICCV 2023. Cuturi, "Sinkhorn Distances", NeurIPS 2013.

    DEVIATION: the sink is ours. Without it all of the background goes to the labels that are there.
    """
    _check(patches, labels, label_weights, patch_weights, plan, sink)
    _check_numbers(tau, rho, sink_mass, tolerance, max_steps)
    with torch.autocast(patches.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(patches.dtype, labels.dtype), torch.float32)
        patches, labels = patches.to(dtype), labels.to(dtype)
        if sink is not None:
            extra = sink.to(dtype).expand(*labels.shape[:-2], 1, -1)
            labels = torch.cat([labels, extra], -2)
        weights = torch.ones_like(patches[..., 0]) if patch_weights is None else patch_weights.to(dtype)
        theta, carried = _masses(weights.clamp(min=0))
        beta, known = _masses(label_weights.to(dtype).nan_to_num(0.0, posinf=math.inf).clamp(min=0))
        if sink is not None:
            beta = torch.cat([beta * (1 - sink_mass), beta.new_full((len(beta), 1), sink_mass)], 1)

        cosine = F.normalize(patches, dim=-1) @ F.normalize(labels, dim=-1).mT
        near = cosine / tau if navigator is None else -navigator(patches, labels).to(dtype)
        log_theta, log_beta = _log(theta), _log(beta)
        # Conditional transport is where Sinkhorn's steps start: its potentials are 0, and a plan is half a step from them.
        rows, columns = torch.zeros_like(theta), torch.zeros_like(beta)
        if plan == "sinkhorn":
            rows, columns = _Potentials.apply(near, log_theta, log_beta, tolerance, max_steps)
        forward = (near + (log_beta + columns)[:, None]).softmax(2)
        backward = (near + (log_theta + rows)[:, :, None]).softmax(1)
        there = ((forward * (1 - cosine)).sum(2) * theta).sum(1)
        back = ((backward * (1 - cosine)).sum(1) * beta).sum(1)
        moves = known & carried
        cost = torch.where(moves, rho * there + (1 - rho) * back, 0)
        num = label_weights.shape[1]
        return Transport(cost, torch.where(moves[:, None, None], forward[..., :num], 0), backward[..., :num])


class _Potentials(torch.autograd.Function):
    """The potentials of patches `[B, N]` and labels `[B, M]` at which one plan keeps both marginals; differentiable.

    An image whose error is within the tolerance stays as it is, so that its plan does not depend on the rest of its batch.
    Gradients are those of the fixed point: the same steps, transposed, through the plan that was reached. Nothing is stored
    for each step.
    """

    @staticmethod
    def forward(
        ctx: Any, near: Tensor, log_theta: Tensor, log_beta: Tensor, tolerance: float, max_steps: int
    ) -> tuple[Tensor, Tensor]:
        rows, columns = torch.zeros_like(log_theta), torch.zeros_like(log_beta)
        moving = torch.ones_like(rows[:, :1], dtype=torch.bool)
        ctx.steps = 0
        while ctx.steps < max_steps:
            moved = -torch.logsumexp(near + (log_beta + columns)[:, None], 2)
            if ctx.steps and ctx.steps % STEPS_PER_CHECK == 0:
                # The columns are met exactly, and each row but for the factor by which it moves now.
                error = (moved - rows).masked_fill(log_theta == -torch.inf, 0).abs().amax(1, keepdim=True)
                moving = moving & (error > tolerance)
                if not moving.any():
                    break
            rows = torch.where(moving, moved, rows)
            columns = torch.where(moving, -torch.logsumexp(near + (log_theta + rows)[:, :, None], 1), columns)
            ctx.steps += 1
        ctx.save_for_backward(near, log_theta + rows, log_beta + columns)
        return rows, columns

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, of_rows: Tensor, of_columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        near, of_patches, of_labels = ctx.saved_tensors
        with torch.autocast(near.device.type, enabled=False):
            forward = (near + of_labels[:, None]).softmax(2)
            backward = (near + of_patches[:, :, None]).softmax(1)
            to_rows, to_columns = torch.zeros_like(of_rows), torch.zeros_like(of_columns)
            for _ in range(ctx.steps):
                to_rows = of_rows - torch.einsum("bnm,bm->bn", backward, to_columns)
                to_columns = of_columns - torch.einsum("bnm,bn->bm", forward, to_rows)
            to_near = -(to_rows[:, :, None] * forward + to_columns[:, None] * backward)
            to_theta = -torch.einsum("bnm,bm->bn", backward, to_columns)
            to_beta = -torch.einsum("bnm,bn->bm", forward, to_rows)
        return to_near, to_theta, to_beta, None, None


def _masses(weights: Float[Tensor, "B N"]) -> tuple[Float[Tensor, "B N"], Bool[Tensor, " B"]]:
    """Weights divided by their sum, and which images have any. In others all weigh alike: finite."""
    some = weights.sum(1) > 0
    weights = torch.where(some[:, None], weights, 1)
    return weights / weights.sum(1, keepdim=True), some


def _log(weights: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """-inf where there is no weight, without its infinite gradient."""
    return torch.where(weights > 0, weights, 1).log().masked_fill(weights == 0, -torch.inf)


def _check(
    patches: Tensor,
    labels: Tensor,
    label_weights: Tensor,
    patch_weights: Tensor | None,
    plan: str,
    sink: Tensor | None,
) -> None:
    if patches.ndim != 3 or patches.shape[1] == 0:
        raise InputError(f"patches {tuple(patches.shape)}: expected [images, patches, width] with at least one patch")
    if labels.ndim not in (2, 3) or labels.shape[-2] == 0:
        raise InputError(
            f"labels {tuple(labels.shape)}: expected [labels, width] or [images, labels, width], not empty"
        )
    batch, num_patches, width = patches.shape
    num_labels = labels.shape[-2]
    if labels.shape[-1] != width:
        raise InputError(f"labels of width {labels.shape[-1]}: expected the patches' width, {width}")
    if labels.ndim == 3 and len(labels) != batch:
        raise InputError(f"labels of {len(labels)} images: expected {batch}")
    if label_weights.shape != (batch, num_labels):
        raise InputError(
            f"label_weights {tuple(label_weights.shape)}: expected one per image and label, {(batch, num_labels)}"
        )
    check_values("label_weights", label_weights)
    if patch_weights is not None:
        if patch_weights.shape != (batch, num_patches):
            raise InputError(
                f"patch_weights {tuple(patch_weights.shape)}: expected one per patch, {(batch, num_patches)}"
            )
        check_values("patch_weights", patch_weights, unknown=False)
    if sink is not None and sink.shape != (width,):
        raise InputError(f"sink {tuple(sink.shape)}: expected the patches' width, {width}")
    if plan not in PLANS:
        raise InputError(f"plan '{plan}': expected one of {', '.join(PLANS)}")


def _check_numbers(tau: float | Tensor, rho: float, sink_mass: float, tolerance: float, max_steps: int) -> None:
    if isinstance(tau, Tensor) and tau.numel() != 1:
        raise InputError(f"tau {tuple(tau.shape)}: expected one number")
    for name, value, fits, expected in (
        ("tau", tau, isinstance(tau, Tensor) or tau > 0, "more than 0"),
        ("rho", rho, 0 <= rho <= 1, "0 to 1"),
        ("sink_mass", sink_mass, 0 <= sink_mass < 1, "at least 0, less than 1"),
        ("tolerance", tolerance, tolerance > 0, "more than 0"),
        ("max_steps", max_steps, max_steps >= 0, "0 or more"),
    ):
        if not fits:
            raise InputError(f"{name} {value}: expected {expected}")
