"""The optimizer, its parameter groups, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import nn

from mlvision.errors import InputError, check_fields

SCHEDULES = ("one_cycle", "cosine", "constant")
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # one kernel a step: 10x the default on a CPU


@dataclass(frozen=True)
class OptimConfig:
    name: Annotated[str, "any timm optimizer: adamw, sgd (Nesterov), momentum, lamb, lion, ..."] = "adamw"
    lr: Annotated[float, "peak learning rate"] = 1e-3
    lr_scales: Annotated[dict[str, float], "factor on lr by parameter group, e.g. {head: 10}"] = field(
        default_factory=dict
    )
    weight_decay: Annotated[float, "decay of weights with two or more dimensions; biases and norms have none"] = 0.01
    epochs: Annotated[int, "passes over the training images"] = 10
    schedule: Annotated[str, "one_cycle (Smith & Topin), cosine (linear warm-up, then half a cosine) or constant"] = (
        "one_cycle"
    )
    warmup: Annotated[float, "share of all steps spent rising to lr"] = 0.1
    start_factor: Annotated[float, "learning rate of the first step, as a share of lr"] = 0.04
    final_factor: Annotated[float, "learning rate of the last step, as a share of lr"] = 1e-4
    clip_norm: Annotated[float, "gradients are scaled down to this global norm; 0: no clipping"] = 0.0
    layer_decay: Annotated[
        float, "factor on lr from each layer of the backbone to the one before it, as timm groups layers; 1: none"
    ] = 1.0
    accumulate: Annotated[
        int,
        "parts into which a batch is divided, one after the other, for less memory: the update is that of the whole",
    ] = 1

    def __post_init__(self) -> None:
        rules = (
            ("lr", self.lr > 0, "a number above 0"),
            ("lr_scales", all(scale >= 0 for scale in self.lr_scales.values()), "factors of 0 or more"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("warmup", 0 <= self.warmup < 1, "a share in [0, 1)"),
            ("start_factor", 0 <= self.start_factor <= 1, "a share in [0, 1]"),
            ("final_factor", 0 <= self.final_factor <= 1, "a share in [0, 1]"),
            ("clip_norm", self.clip_norm >= 0, "0 or more"),
            ("layer_decay", 0 < self.layer_decay <= 1, "above 0, at most 1"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
        )
        check_fields(self, "optim.", rules)


@dataclass(frozen=True)
class EmaConfig:
    decay: Annotated[float, "decay of the averaged weights (timm ModelEmaV3, with its warm-up); 0: none"] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "ema.", [("decay", 0 <= self.decay < 1, "0, or a number below 1")])


def parameter_groups(
    groups: dict[str, list[nn.Parameter]], config: OptimConfig, layers: Sequence[Sequence[nn.Parameter]] = ()
) -> list[dict]:
    """Split each named group by the rule "no weight decay on tensors with fewer than two dimensions", and by layers.

    Args:
        layers: from the first on, those whose rates `optim.layer_decay` makes smaller: the last of n layers by the factor
            itself, the first by its n-th power. Parameters in none of them keep their rate.

    Source: for the layers Bao et al., "BEiT", ICLR 2022, and Clark et al., "ELECTRA", ICLR 2020.

    Raises:
        InputError: `optim.lr_scales` names a group that the method does not have.
    """
    unknown = sorted(set(config.lr_scales) - set(groups))
    if unknown:
        raise InputError(f"optim.lr_scales: no parameter group '{unknown[0]}'; this method has {', '.join(groups)}")
    if config.layer_decay == 1:
        layers = ()
    above = {id(p): len(layers) - depth for depth, layer in enumerate(layers) for p in layer}
    result = []
    for name, parameters in groups.items():
        for steps in range(len(layers), -1, -1):
            members = [p for p in parameters if p.requires_grad and above.get(id(p), 0) == steps]
            scale = config.lr_scales.get(name, 1.0) * config.layer_decay**steps
            for weight_decay, params in (
                (config.weight_decay, [p for p in members if p.ndim >= 2]),
                (0.0, [p for p in members if p.ndim < 2]),
            ):
                if params:
                    result.append(
                        {"params": params, "weight_decay": weight_decay, "lr": config.lr * scale, "lr_scale": scale}
                    )
    return result


def build_optimizer(
    groups: dict[str, list[nn.Parameter]], config: OptimConfig, layers: Sequence[Sequence[nn.Parameter]] = ()
) -> torch.optim.Optimizer:
    """A timm optimizer over the groups, fused where torch has a fused kernel; `layers` as in `parameter_groups`.

    Raises:
        InputError: an unknown optimizer name, or one that cannot be built here (its package is missing, say).
    """
    known = [str(name) for name in list_optimizers()]
    if config.name not in known:
        raise InputError(f"optim.name: timm has no optimizer '{config.name}'; it has {', '.join(known)}")
    fused: dict[str, Any] = {"fused": True} if get_optimizer_class(config.name, bind_defaults=False) in _FUSED else {}
    chosen = parameter_groups(groups, config, layers)
    try:
        return create_optimizer_v2(chosen, opt=config.name, lr=config.lr, weight_decay=config.weight_decay, **fused)
    except (
        AssertionError,
        ImportError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # timm's checks are of all kinds
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"optim.name: timm cannot build '{config.name}' here ({cause})") from error


def learning_rate_factor(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate at each step as a share of `lr`: a function of the step alone, so nothing has to be saved.

    Source: one_cycle is torch's OneCycleLR with cosine annealing and constant momentum.
    """
    peak = config.warmup * total_steps - 1  # the step that has the full rate
    last = max(total_steps - 1, 1)

    def half_cosine(start: float, end: float, progress: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    def decay(step: int) -> float:
        return half_cosine(1.0, config.final_factor, (step - max(peak, 0)) / max(last - max(peak, 0), 1e-9))

    def one_cycle(step: int) -> float:
        return half_cosine(config.start_factor, 1.0, step / peak) if step < peak else decay(step)

    def cosine(step: int) -> float:
        return config.start_factor + (1 - config.start_factor) * step / peak if step < peak else decay(step)

    return {"one_cycle": one_cycle, "cosine": cosine, "constant": lambda step: 1.0}[config.schedule]
