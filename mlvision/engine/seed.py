"""Global random state: seeding it, and carrying it through a checkpoint.

The data path never draws from it (each view is seeded by itself); what is left is initialisation, dropout and drop path.
"""

import os
import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed the global generators of Python, numpy and torch (all devices); ranks above 0 have numbers of their own."""
    if rank:
        seed = int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint32)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(on: bool) -> None:
    """Let torch take deterministic algorithms alone, or whatever is fast."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS sums in a fixed order only with it
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on


def rng_state() -> dict[str, Any]:
    """All global generator states, in types that `torch.load(weights_only=True)` accepts."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave; states of CUDA devices that are not there any more are left out."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state, device)
