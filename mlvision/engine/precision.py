"""Devices and number formats: what was asked for, and what this machine really does."""

import os
from dataclasses import dataclass

import torch

from mlvision.errors import InputError

MOST_THREADS = 1024  # of torch: it starts each of them, and takes any number
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A resolved number format: `name` is fp32, bf16 or fp16; weights stay float32 in each (mixed precision)."""

    name: str
    device: torch.device

    def autocast(self) -> torch.autocast:
        """The context that forward passes run in; does nothing in fp32."""
        return torch.autocast(self.device.type, dtype=_DTYPES[self.name], enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, enabled for fp16 alone: bf16 has the exponent range of fp32."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU. Under torchrun `cuda` is this process's own GPU, by its number.

    Raises:
        InputError: an unknown name, a GPU asked for where there is none, or one GPU for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:<number>, got '{name}'") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:<number>, got '{name}'")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"device: '{name}' was asked for, but torch sees no GPU on this machine; use device=cpu")
        processes, own = (int(os.environ.get(n, d)) for n, d in (("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", -1)))
        if device.index is None and own >= 0:
            device = torch.device("cuda", own)
        elif device.index is not None and processes > 1:
            raise InputError(f"device: {processes} processes cannot share '{name}'; device=cuda gives each its own")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise InputError(
                f"device: '{device}' was asked for, but there are {torch.cuda.device_count()} GPUs (from 0)"
            )
    return device


def resolve_precision(name: str, device: torch.device) -> Precision:
    """`auto` is fp32 on a CPU, bf16 on a GPU that has it, else fp16.

    Raises:
        InputError: an unknown name, or bf16 on a CPU or GPU that does not have it.
    """
    if name != "auto" and name not in _DTYPES:
        raise InputError(f"precision: expected auto, {', '.join(_DTYPES)}, got '{name}'")
    if device.type == "cpu":
        if name == "bf16" and not cpu_has_bf16():
            raise InputError("precision: bf16 was asked for, but this CPU computes it by emulation only; use fp32")
        return Precision("fp32" if name == "auto" else name, device)
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)  # below Ampere torch emulates it, slowly
    if name == "bf16" and not has_bf16:
        raise InputError("precision: bf16 was asked for, but this GPU computes it by emulation only; use fp16")
    if name == "auto":
        name = "bf16" if has_bf16 else "fp16"
    return Precision(name, device)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without it bf16 is slower than fp32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
