"""Conditional transport between the patches of an image and its labels, and the plan that Sinkhorn's steps lead to."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mlvision.errors import InputError

PLANS = ("ct", "sinkhorn")


class Transport(NamedTuple):
    """What it costs to carry patches to labels and labels to patches, and which goes where.

    Attributes:
        cost: `[B]`; 0 for an image without a label of positive weight.
        forward_plan: `[B, N, C]`: where each patch goes. A row sums to 1, with a sink to 1 less what the sink takes; to 0 in
            an image without a label of positive weight.
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
    iterations: int = 50,
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
        patch_weights: 0 or more; all alike by default.
        plan: ct; or sinkhorn: `iterations` steps in the log domain, through which gradients flow.
        tau: Temperature of the default navigator; may be learnt.
        rho: Share of the way from patches to labels, 0 to 1.
        navigator: Gives d `[B, N, C]` of patches and labels in the place of -cos / tau.
        sink: A prototype of what no label is about: one more label of the weight `sink_mass`, the others have the rest.
            Patches of the background need not go to a label then.
        sink_mass: Share of the labels' weight, at least 0 and less than 1.

    Raises:
        InputError: Shapes do not fit, no such plan, or a number out of range.

    Source: Zheng & Zhou, "Exploiting Chain Rule and Bayes' Theorem to Compare Probability Distributions", NeurIPS 2021;
    between patches and labels Li et al., "PatchCT", ICCV 2023. Cuturi, "Sinkhorn Distances", NeurIPS 2013.

    DEVIATION: the sink is ours. Without it all of the background goes to the labels that are there.
    """
    _check(patches, labels, label_weights, patch_weights, plan, tau, rho, sink, sink_mass)
    with torch.autocast(patches.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(patches.dtype, labels.dtype), torch.float32)
        patches, labels = patches.to(dtype), labels.to(dtype)
        if sink is not None:
            extra = sink.to(dtype).expand(*labels.shape[:-2], 1, -1)
            labels = torch.cat([labels, extra], -2)
        theta = _normalised(torch.ones_like(patches[..., 0]) if patch_weights is None else patch_weights.to(dtype))
        beta, known = _label_masses(label_weights.to(dtype), None if sink is None else sink_mass)

        cosine = F.normalize(patches, dim=-1) @ F.normalize(labels, dim=-1).mT
        near = cosine / tau if navigator is None else -navigator(patches, labels).to(dtype)
        forward, backward = _plans(near, _log(theta), _log(beta), iterations if plan == "sinkhorn" else 0)
        there = ((forward * (1 - cosine)).sum(2) * theta).sum(1)
        back = ((backward * (1 - cosine)).sum(1) * beta).sum(1)
        cost = torch.where(known, rho * there + (1 - rho) * back, 0)
        num = label_weights.shape[1]
        return Transport(cost, torch.where(known[:, None, None], forward[..., :num], 0), backward[..., :num])


def _plans(
    near: Float[Tensor, "B N M"], log_theta: Float[Tensor, "B N"], log_beta: Float[Tensor, "B M"], iterations: int
) -> tuple[Float[Tensor, "B N M"], Float[Tensor, "B N M"]]:
    """Conditional transport is where Sinkhorn's steps start: its potentials are 0, and a plan is half a step from them."""
    rows, columns = torch.zeros_like(log_theta), torch.zeros_like(log_beta)
    for _ in range(iterations):
        rows = -torch.logsumexp(near + (log_beta + columns)[:, None], 2)
        columns = -torch.logsumexp(near + (log_theta + rows)[:, :, None], 1)
    forward = (near + (log_beta + columns)[:, None]).softmax(2)
    return forward, (near + (log_theta + rows)[:, :, None]).softmax(1)


def _normalised(weights: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    return weights / weights.sum(1, keepdim=True)


def _label_masses(
    weights: Float[Tensor, "B C"], sink_mass: float | None
) -> tuple[Float[Tensor, "B M"], Bool[Tensor, " B"]]:
    """The labels' masses, with the sink's last; and which images have any. In others all labels weigh alike: finite."""
    weights = weights.nan_to_num(0.0)
    known = weights.sum(1) > 0
    masses = _normalised(torch.where(known[:, None], weights, 1))
    if sink_mass is not None:
        masses = torch.cat([masses * (1 - sink_mass), masses.new_full((len(masses), 1), sink_mass)], 1)
    return masses, known


def _log(weights: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """-inf where there is no weight, without its infinite gradient."""
    return torch.where(weights > 0, weights, 1).log().masked_fill(weights == 0, -torch.inf)


def _check(
    patches: Tensor,
    labels: Tensor,
    label_weights: Tensor,
    patch_weights: Tensor | None,
    plan: str,
    tau: float | Tensor,
    rho: float,
    sink: Tensor | None,
    sink_mass: float,
) -> None:
    batch, num_patches, width = patches.shape
    num_labels = labels.shape[-2]
    if labels.shape[-1] != width:
        raise InputError(f"labels of width {labels.shape[-1]}: expected the patches' width, {width}")
    if labels.ndim == 3 and len(labels) != batch:
        raise InputError(f"labels of {len(labels)} images: expected {batch}")
    if label_weights.shape != (batch, num_labels):
        raise InputError(
            f"label_weights {tuple(label_weights.shape)}: expected one an image and label, {(batch, num_labels)}"
        )
    if patch_weights is not None and patch_weights.shape != (batch, num_patches):
        raise InputError(f"patch_weights {tuple(patch_weights.shape)}: expected one a patch, {(batch, num_patches)}")
    if sink is not None and sink.shape != (width,):
        raise InputError(f"sink {tuple(sink.shape)}: expected the patches' width, {width}")
    if plan not in PLANS:
        raise InputError(f"plan '{plan}': expected one of {', '.join(PLANS)}")
    for name, value, fits, expected in (
        ("tau", tau, isinstance(tau, Tensor) or tau > 0, "more than 0"),
        ("rho", rho, 0 <= rho <= 1, "0 to 1"),
        ("sink_mass", sink_mass, 0 <= sink_mass < 1, "at least 0, less than 1"),
    ):
        if not fits:
            raise InputError(f"{name} {value}: expected {expected}")
