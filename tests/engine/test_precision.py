import pytest
import torch

from mlvision.engine.precision import resolve_device, resolve_precision
from mlvision.errors import InputError

CPU = torch.device("cpu")


def test_auto_on_a_cpu_is_fp32():
    precision = resolve_precision("auto", CPU)
    assert precision.name == "fp32"
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_low_precision_on_request(name, dtype, monkeypatch):
    monkeypatch.setattr("mlvision.engine.precision.cpu_has_bf16", lambda: True)
    precision = resolve_precision(name, CPU)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert precision.scaler().is_enabled() == (name == "fp16")


def test_bf16_on_a_cpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(InputError, match="this CPU computes it by emulation only; use fp32"):
        resolve_precision("bf16", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_where_there_is_none():
    with pytest.raises(InputError, match="'cuda' was asked for, but torch sees no GPU"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", ""])
def test_unknown_devices(name):
    with pytest.raises(InputError, match="device: expected auto, cpu, cuda"):
        resolve_device(name)


def test_unknown_precision():
    with pytest.raises(InputError, match="precision: expected auto, fp32, bf16, fp16, got 'half'"):
        resolve_precision("half", CPU)


def test_each_process_of_torchrun_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("auto", "cuda"):
        assert resolve_device(name) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    for name in ("auto", "cuda"):
        assert resolve_device(name) == torch.device("cuda:3")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device: 5 processes cannot share 'cuda:1'; device=cuda gives each its own"):
        resolve_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(InputError, match="'cuda:4' was asked for, but there are 4 GPUs"):
        resolve_device("auto")
