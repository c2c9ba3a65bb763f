"""Runs that an older version left behind load, evaluate and go on.

tests/old_runs/done.tar.xz is a run that train.py of commit 9b57feb finished and its eval.py evaluated, and the data set, 16
images of 32x24 pixels; stopped.tar.xz is the same run ended by SIGTERM in the middle of the second of its three epochs.
"""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet

from mlvision import load_run
from mlvision.commands import eval as eval_script
from mlvision.commands import train as train_script
from mlvision.engine.checkpoint import load_checkpoint
from mlvision.losses import AslConfig
from mlvision.methods import BaselineConfig

FOLDER = Path(__file__).parent / "old_runs"
# How both were started, in today's names.
ARGUMENTS = (
    *("data.name=csv", "data.file=labels.csv", "data.images=images", "data.image_column=image"),
    *("data.split_column=part", "data.val_fraction=0.25", "model.name=tiny_net", "head.dropout=0.1"),
    *("method.loss=asl", "method.loss.gamma_neg=2", "view.size=32", "view.scale=[0.5,1]"),
    *("loader.batch_size=3", "loader.num_workers=0", "optim.epochs=3", "optim.lr=1e-2", "ema.decay=0.9"),
    *("log.every_steps=1", "log.tensorboard=false", "device=cpu", "threads=1", "seed=3"),
)

default_cfgs = generate_default_cfgs(
    {
        "tiny_net.untrained": {
            **{"input_size": (3, 32, 32), "pool_size": (4, 4), "crop_pct": 1.0, "interpolation": "bilinear"},
            **{"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 3},
            **{"first_conv": "conv_stem", "classifier": "classifier"},
        }
    }
)


@register_model
def tiny_net(pretrained=False, **kwargs):
    """Three convolutions with batch norms: weights of a few kilobytes, which timm's smallest network does not have."""
    blocks = decode_arch_def([["cn_r1_k3_s2_e1_c6"]])
    sizes = {"stem_size": 4, "num_features": 8, "round_chs_fn": lambda channels: channels}
    return build_model_with_cfg(EfficientNet, "tiny_net", pretrained, block_args=blocks, **sizes, **kwargs)


def unpack(name, folder):
    """The run folder, and the options that say where its data are now."""
    with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run", [f"data.root={folder / 'data'}"]


def logged(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return {(row["step"], row["name"]): float(row["value"]) for row in csv.DictReader(file)}


def test_a_finished_run_loads(tmp_path):
    folder, _ = unpack("done", tmp_path)
    run = load_run(folder, device="cpu")
    assert (run.classes, run.weights) == (("bright", "wide", "green"), "ema")
    assert (run.config.data.name, run.config.optim.lr, run.config.ema.decay) == ("csv", 0.01, 0.9)
    assert run.config.method == BaselineConfig(loss=AslConfig(gamma_neg=2.0))
    saved = load_checkpoint(folder / "checkpoints/best.pt")["ema"]
    assert all(torch.equal(value, saved[name]) for name, value in run.method.state_dict().items())


def evaluate(folder, data):
    """Find the numbers that the run's own version wrote."""
    metrics = eval_script.main([str(folder), *data])
    with tarfile.open(FOLDER / "done.tar.xz") as archive:
        expected = json.load(archive.extractfile("run/metrics.json"))["test"]
    for weights in ("raw", "ema"):
        numbers = {key: value for key, value in expected[weights].items() if value is not None}
        assert {key: metrics[weights][key] for key in numbers} == pytest.approx(numbers, abs=1e-6)
        assert len(numbers) > 20
    assert (folder / "record.json").is_file()


def test_a_finished_run_is_evaluated(tmp_path):
    folder, data = unpack("done", tmp_path)
    (folder / "record.json").unlink()
    evaluate(folder, data)


def test_a_stopped_run_goes_on(tmp_path):
    """To the numbers of the run that was never stopped."""
    stopped, data = unpack("stopped", tmp_path / "stopped")
    done, _ = unpack("done", tmp_path / "done")
    assert load_checkpoint(stopped / "checkpoints/last.pt")["step"] == 5
    assert train_script.main([*ARGUMENTS, *data, f"out={stopped}", "resume=auto"]) == 0
    found, expected = logged(stopped), logged(done)
    assert expected.keys() <= found.keys()
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    last, of_done = (load_checkpoint(folder / "checkpoints/last.pt") for folder in (stopped, done))
    assert (last["step"], last["epoch"]) == (of_done["step"], of_done["epoch"]) == (9, 3)
    for weights in ("method", "ema"):
        for name, value in of_done[weights].items():
            np.testing.assert_allclose(last[weights][name].numpy(), value.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
    evaluate(stopped, data)
