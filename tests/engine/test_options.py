"""Options of the engine, each by the effect that it is there for."""

import contextlib
import csv
import os

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from mlvision import load_run
from mlvision.commands import eval as eval_script
from mlvision.commands import train as train_script
from mlvision.config import Config
from mlvision.data.samplers import class_balanced
from mlvision.engine.checkpoint import CheckpointConfig, load_checkpoint
from mlvision.engine.optim import OptimConfig, parameter_groups
from mlvision.errors import InputError
from mlvision.losses import asymmetric_loss, binary_cross_entropy, focal_loss
from mlvision.models import build_backbone
from mlvision.options import parse_options
from mlvision.runs.build import build_run

# A network without batch statistics, in plain SGD: what is the same in exact arithmetic is the same but for rounding.
PLAIN = ["model.name=test_vit", "view.size=48", "ema.decay=0", "optim.name=momentum", "loader.num_workers=0"]


def weights(folder):
    return load_checkpoint(folder / "checkpoints/last.pt")["method"]


def test_a_batch_in_parts_gives_the_update_of_the_whole(smoke_arguments, tmp_path):
    for parts in (1, 4):
        train_script.main([*smoke_arguments, *PLAIN, f"optim.accumulate={parts}", f"out={tmp_path / str(parts)}"])
    whole, divided = weights(tmp_path / "1"), weights(tmp_path / "4")
    start = build_run(parse_options(Config, [*smoke_arguments, *PLAIN], prog="", description="")).method.state_dict()
    assert any((start[name] - whole[name]).abs().max() > 1e-3 for name in whole)  # it has learnt
    for name, value in whole.items():
        torch.testing.assert_close(divided[name], value, atol=1e-5, rtol=1e-5)
    logged = [list(csv.DictReader(open(tmp_path / folder / "metrics.csv"))) for folder in ("1", "4")]
    for one, other in zip(*logged, strict=True):
        if "images_per_second" not in one["name"]:
            assert float(one["value"]) == pytest.approx(float(other["value"]), abs=1e-4), one["name"]
    with pytest.raises(InputError, match=r"optim.accumulate: the 16 images .* cannot be divided into 3"):
        train_script.main([*smoke_arguments, *PLAIN, "loader.batch_size=16", "optim.accumulate=3"])


def test_training_ends_early_without_a_better_value_and_counts_as_finished(smoke_arguments, tmp_path, capsys):
    """A rate of almost nothing: no epoch after the first is better."""
    still = [*smoke_arguments, *PLAIN, "optim.lr=1e-20", "optim.epochs=9", "checkpoint.patience=2"]
    folder = tmp_path / "run"
    train_script.main([*still, f"out={folder}"])
    assert "stopped after 2 epochs without a better mAP" in capsys.readouterr().out
    saved = load_checkpoint(folder / "checkpoints/last.pt")
    assert (saved["epoch"], saved["best_epoch"]) == (3, 0)
    eval_script.main([str(folder)])
    assert (folder / "record.json").is_file()  # which only a run that has come to its end has
    train_script.main([*still, f"out={folder}", "resume=auto"])
    assert "all 3 epochs are trained already" in capsys.readouterr().out
    assert load_checkpoint(folder / "checkpoints/last.pt")["step"] == saved["step"]


def test_the_last_epoch_can_be_chosen_whatever_validation_says(smoke_arguments, tmp_path):
    still = [*smoke_arguments, *PLAIN, "optim.lr=1e-20", "optim.epochs=2"]
    for select, epoch in (("mAP", 0), ("last", 1)):
        train_script.main([*still, f"checkpoint.select={select}", f"out={tmp_path / select}"])
        assert load_checkpoint(tmp_path / select / "checkpoints/best.pt")["epoch"] == epoch + 1
    with pytest.raises(InputError, match="checkpoint.patience: expected 0 or more, and 0 with checkpoint.select=last"):
        CheckpointConfig(select="last", patience=1)


def test_other_evaluators_measure_each_epoch_and_choose(smoke_arguments, tmp_path, capsys):
    """Medium objects, of which there are few, are not found better after the second epoch; all objects are."""
    arguments = [*smoke_arguments, *PLAIN, "optim.epochs=4", "data.val_fraction=0.3"]
    train_script.main([*arguments, f"out={tmp_path / 'plain'}"])
    more = ["evaluators=[multilabel,calibration,by_size]", "checkpoint.select=mAP_medium"]
    train_script.main([*arguments, *more, f"out={tmp_path / 'more'}"])
    plain, logged = (list(csv.DictReader(open(tmp_path / name / "metrics.csv"))) for name in ("plain", "more"))
    added = [row for row in logged if row not in plain]
    assert [row for row in logged if row in plain] == plain
    names = ("ECE", "mAP_small", "mAP_medium")
    assert {row["name"] for row in added} == {f"val/raw/{name}" for name in names}
    values = [float(row["value"]) for row in added if row["name"] == "val/raw/mAP_medium"]
    best = load_checkpoint(tmp_path / "more/checkpoints/best.pt")
    assert len(values) == 4
    assert best["epoch"] == values.index(max(values)) + 1
    assert load_checkpoint(tmp_path / "more/checkpoints/last.pt")["best"] == pytest.approx(max(values))
    assert "val mAP (plain): raw" in capsys.readouterr().out
    few = ["evaluators=[calibration]", "checkpoint.select=last", "optim.epochs=1"]
    train_script.main([*arguments, *few, f"out={tmp_path / 'few'}"])
    assert "mAP" not in capsys.readouterr().out


def test_rates_by_layer_are_those_of_timm():
    """timm's own groups of the same network, whose last, of scale 1, is the classifier's."""
    backbone, head = build_backbone("test_vit", image_size=48), nn.Linear(64, 3)
    groups = {"backbone": list(backbone.parameters()), "head": list(head.parameters())}
    config = OptimConfig(lr=0.1, layer_decay=0.5, lr_scales={"head": 3.0})
    ours = {id(p): g["lr"] for g in parameter_groups(groups, config, backbone.layers()) for p in g["params"]}
    model = timm.create_model("test_vit", num_classes=3, img_size=48)
    theirs = {id(p): g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]}
    of_model = dict(model.named_parameters())
    rates = {name: ours[id(p)] for name, p in backbone.model.named_parameters()}
    for name, rate in rates.items():
        assert rate == pytest.approx(0.1 * theirs[id(of_model[name])]), name
    assert len(set(rates.values())) > 5
    assert ours[id(head.weight)] == pytest.approx(0.3)
    plain = parameter_groups(groups, OptimConfig(lr=0.1), backbone.layers())
    assert {g["lr"] for g in plain} == {0.1}


def test_focal_loss_is_torchvisions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64) * 4
    targets = (torch.rand(5, 4, generator=generator) < 0.4).double()
    for gamma in (0.0, 1.0, 2.5):
        expected = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=gamma, reduction="none")
        torch.testing.assert_close(focal_loss(logits, targets, gamma=gamma, reduction="none"), expected)
    torch.testing.assert_close(focal_loss(logits, targets, gamma=0.0), binary_cross_entropy(logits, targets))
    targets[0, 0] = torch.nan
    both = asymmetric_loss(logits, targets, gamma_neg=2.0, gamma_pos=2.0, clip=0.0)
    assert torch.equal(focal_loss(logits, targets), both)


def test_the_option_chooses_the_order(smoke_arguments):
    def rows(*more):
        run = build_run(parse_options(Config, [*smoke_arguments, *PLAIN, *more], prog="", description=""))
        return [row for batch in run.train_loader.batches for _, row in batch], run.train

    shuffled, _ = rows()
    assert len(set(shuffled)) == len(shuffled)
    balanced, manifest = rows("loader.sampling=class_balanced")
    assert balanced == class_balanced(manifest, 0)(0)[: len(balanced)].tolist()
    with pytest.raises(InputError, match="loader.sampling: expected one of shuffled, class_balanced"):
        rows("loader.sampling=balanced")


def test_one_cell_of_one_image_has_no_batch_statistics(smoke_arguments):
    """test_resnet makes one cell of 32 pixels or fewer; another image, another pixel or no batch norm gives statistics."""

    def build(*more):
        quiet = ["loader.num_workers=0", "view.size=32", "optim.accumulate=1"]
        return build_run(parse_options(Config, [*smoke_arguments, *quiet, *more], prog="", description=""))

    for refused in (["loader.batch_size=1"], ["loader.batch_size=4", "optim.accumulate=4"]):
        with pytest.raises(InputError, match=r"^loader.batch_size: expected 2 images or more .* view.size=32"):
            build(*refused)
    for fine in (["loader.batch_size=2"], ["loader.batch_size=1", "view.size=64"]):
        run = build(*fine)
        run.method.train()(next(iter(run.train_loader)))
    build("loader.batch_size=1", "model.name=test_vit")


def test_deterministic_algorithms_are_switched_on_and_off(smoke_arguments, monkeypatch):
    """An operation whose result depends on the order in which it writes is refused; GPU libraries are told as well."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    twice, values = torch.zeros(2, dtype=torch.int64), torch.tensor([1.0, 2.0])
    for on in (True, False):
        build_run(parse_options(Config, [*smoke_arguments, f"deterministic={on}"], prog="", description=""))
        assert torch.backends.cudnn.deterministic == on
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="deterministic") if on else contextlib.nullcontext():
            torch.zeros(3).put_(twice, values)


def test_a_compiled_backbone_learns_the_same_and_is_saved_under_the_same_names(smoke_arguments, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    arguments = [*smoke_arguments, *PLAIN, "ema.decay=0.9", "optim.epochs=1"]
    train_script.main([*arguments, f"out={tmp_path / 'eager'}"])
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    train_script.main([*arguments, "compile=aot_eager", f"out={tmp_path / 'compiled'}"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-5)
    load_run(tmp_path / "compiled", device="cpu")
    with pytest.raises(InputError, match="compile: torch has no backend 'fast'; expected one of"):
        train_script.main([*arguments, "compile=fast"])
