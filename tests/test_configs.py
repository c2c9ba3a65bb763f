"""Every YAML of configs/ builds and takes one step at tiny size, and every trainable parameter learns from it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from factories import write_label_maps
from layouts import LAYOUTS, make_data

from mlvision.config import Config
from mlvision.data import (
    DATASETS,
)
from mlvision.engine.optim import build_optimizer
from mlvision.options import parse_options, to_plain
from mlvision.runs.build import build_run

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "grids" not in p.parts)
TINY = {"resnet": "test_resnet", "efficientnet": "test_efficientnet", "vit": "test_vit"}
# Parameters that the first step does not train, by head: the adapter's last layer starts at zero.
UNTRAINED: dict[str, set[str]] = {"text": {"classifier.head.adapter.0.weight", "classifier.head.adapter.0.bias"}}


def tiny_backbone(name: str) -> str:
    """timm's own test model of the same family."""
    return next((tiny for family, tiny in TINY.items() if family in name), name)


def test_every_reader_has_a_config():
    read = {parse_options(Config, [str(path)], prog="train.py", description="").data.name for path in CONFIGS}
    assert read == set(DATASETS) == set(LAYOUTS)


def cases():
    """Each config in the precision that it asks for; those for a GPU in both low precisions."""
    for path in CONFIGS:
        precision = parse_options(Config, [str(path)], prog="train.py", description="").precision
        for name in ("auto",) if precision == "auto" else ("bf16", "fp16"):
            yield pytest.param(path, name, id=f"{path.relative_to(ROOT / 'configs')}-{name}")


@pytest.mark.parametrize(("path", "precision"), cases())
def test_config_takes_a_step(path, precision, scenes_root, tmp_path, monkeypatch):
    monkeypatch.setattr("mlvision.engine.precision.cpu_has_bf16", lambda: True)
    config = parse_options(Config, [str(path)], prog="train.py", description="")
    make_data(config.data, scenes_root, tmp_path)
    arguments = [
        f"data.root={tmp_path}",
        "view.size=64",
        f"model.name={tiny_backbone(config.model.name)}",
        "model.pretrained=none",
        "device=cpu",
        f"precision={precision}",
        "loader.num_workers=0",
        "loader.batch_size=4",
    ]
    if config.head.name == "text" and config.head.text.encoder == "open_clip":  # weights of a hub
        arguments += [
            "head.text.encoder=learned",
            "head.text.model=",
            "head.text.weights=",
            "head.text.templates=['{}']",
        ]
    torch.manual_seed(0)
    if config.label_maps:
        write_label_maps([str(path), *arguments], tmp_path / "maps")
        arguments.append(f"label_maps={tmp_path}/maps")
    run = build_run(parse_options(Config, [str(path), *arguments], prog="train.py", description=""))
    optimizer = build_optimizer(run.method.parameter_groups(), run.config.optim)
    batch = next(iter(run.train_loader))
    for norm in run.method.modules():
        # timm starts the last norm of each residual branch at zero, and so the first gradients behind it.
        if isinstance(norm, torch.nn.BatchNorm2d) and not norm.weight.any():
            torch.nn.init.constant_(norm.weight, 0.5)
    before = {name: p.detach().clone() for name, p in run.method.named_parameters()}
    run.method.train()
    scaler = run.precision.scaler()
    for _ in range(6):  # an fp16 scaler starts high, and skips steps until its scale is low enough
        optimizer.zero_grad()
        with run.precision.autocast():
            loss = run.method(batch).loss
        assert loss.isfinite()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if all(p.grad is None or p.grad.isfinite().all() for p in run.method.parameters()):
            break
        scaler.step(optimizer)  # which the scaler skips
        scaler.update()
    for name, parameter in run.method.named_parameters():
        if parameter.requires_grad and name not in UNTRAINED.get(config.head.name, set()):
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
            assert parameter.grad.abs().sum() > 0, f"{name} has a gradient of zero"
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    scaler.step(optimizer)
    assert any(not torch.equal(before[name], p) for name, p in run.method.named_parameters())


def test_a_config_changes_only_what_it_says(tmp_path):
    """Options that a YAML does not name keep the dataclass defaults: no second home for defaults."""
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    config = parse_options(Config, [str(empty)], prog="train.py", description="")
    assert to_plain(dataclasses.replace(config, name="")) == to_plain(Config())
