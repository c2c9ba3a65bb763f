"""A run that is killed and resumed equals one that was left alone, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlvision.engine.checkpoint import load_checkpoint
from mlvision.engine.fit import BEST, LAST

ROOT = Path(__file__).parents[2]
INTERRUPT = Path(__file__).with_name("interrupt.py")


def interrupt(end, moments, arguments, folder):
    command = [sys.executable, str(INTERRUPT), end, str(moments), "0", *arguments, f"out={folder}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for train.py
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()[-1].split()
    return int(words[1]), [int(code) for code in words[3:]], result.stdout


def assert_equal_state(a, b, path=""):
    """Tensors bit for bit, everything else by ==, however deep."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal_state(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal_state(*pair, f"{path}/{i}")
    else:
        assert a == b, path


@pytest.mark.parametrize(("end", "moments"), [("KILL", 5), ("TERM", 2)])
def test_an_interrupted_run_equals_an_undisturbed_one(end, moments, smoke_arguments, tmp_path):
    folder = tmp_path / "run"
    arguments = [*smoke_arguments, "optim.epochs=4"]
    hits, codes, output = interrupt(end, moments, arguments, folder)
    assert hits >= moments / 2, f"only {hits} of {moments} interruptions hit a running process"
    if end == "KILL":
        assert set(codes) == {0, -9}
    else:
        assert set(codes) <= {0, -15}  # -15: it hit the start-up, when there is nothing to save
        assert "stopped by SIGTERM" in output
    alone = Path(f"{folder}-undisturbed")
    assert (folder / "metrics.csv").read_bytes() == (alone / "metrics.csv").read_bytes()
    for name in (LAST, BEST):
        assert_equal_state(load_checkpoint(folder / name), load_checkpoint(alone / name))
