"""What a result depends on besides its config: command, commit, packages and machine."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mlvision.engine import distributed

_PACKAGES = ("torch", "torchvision", "timm", "albumentations", "numpy", "pillow", "opencv-python-headless")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside its config: command, code, packages and machine."""
    return {
        "command": f"{_program()} {shlex.join(sys.argv[1:])}",
        "commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": _cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "ranks": distributed.world_size(),
        "started": datetime.now().isoformat(timespec="seconds"),
    }


def _program() -> str:
    """What was started: a script by its path from the repository's root, or as it was called where it lies elsewhere."""
    ranks = distributed.world_size()
    launcher = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', ranks)}" if ranks > 1 else "python"
    if sys.argv[0].startswith("mlvision "):
        return f"{launcher} -m {sys.argv[0]}"
    root, script = Path(__file__).resolve().parents[2], Path(sys.argv[0]).resolve()
    name = script.relative_to(root).as_posix() if script.is_relative_to(root) else sys.argv[0]
    return f"{launcher} {shlex.quote(name)}"


def _git_commit() -> str:
    """The checkout's commit, with `-dirty` where files differ from it; `unknown` outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, encoding="utf-8", check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(sorted(names)) or platform.processor() or platform.machine()}, {os.cpu_count()} cores"
