import numpy as np
import pytest
import torch

from mlvision.engine.callbacks import Callback
from mlvision.explain.callback import CamGrids
from mlvision.methods import Baseline, BaselineConfig
from mlvision.models import BackboneConfig, LinearHeadConfig, build_classifier


class Writer:
    def __init__(self):
        self.images = []

    def add_image(self, name, page, step, dataformats):
        self.images.append((name, page, step, dataformats))


class State:
    ema, epoch, step = None, 1, 7

    def __init__(self, method, writer):
        self.method = method
        self.log = type("Log", (), {"tensorboard": writer})()


@pytest.fixture
def method():
    classifier = build_classifier(BackboneConfig("resnet10t"), LinearHeadConfig(), 3, image_size=64)
    return Baseline(BaselineConfig(), classifier, classifier.backbone.preprocessing)


@pytest.fixture
def grids():
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return CamGrids(images, torch.tensor([[1.0, 0, 1], [0, 1, 0]]), ["a.jpg", "b.jpg"], ["x", "y", "z"])


def test_a_page_of_the_same_images_is_written_each_epoch(method, grids):
    method.train()
    writer = Writer()
    state = State(method, writer)
    before, random = {k: v.clone() for k, v in method.state_dict().items()}, torch.get_rng_state()
    grids.on_epoch_end(state)
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items())  # batch statistics too
    assert torch.equal(random, torch.get_rng_state())
    with torch.no_grad():
        method.classifier.head.linear.weight.mul_(-1)
    grids.on_epoch_end(state)
    (name, first, step, layout), (_, second, *_) = writer.images
    assert (name, step, layout) == ("explain/GradCam", 7, "HWC")
    assert first.dtype == np.uint8
    assert first.shape[2] == 3
    assert not np.array_equal(first, second)  # other weights, other labels and maps
    assert method.training


def test_without_tensorboard_nothing_is_computed(method, grids, monkeypatch):
    monkeypatch.setattr(grids, "draw", lambda model: pytest.fail("drawn for nobody"))
    grids.on_epoch_end(State(method, None))


def test_flat_maps_do_not_stop_training(method, grids, caplog):
    with torch.no_grad():
        method.classifier.head.linear.weight.zero_()
    writer = Writer()
    with caplog.at_level("INFO", logger="mlvision"):
        grids.on_epoch_end(State(method, writer))
    assert not writer.images
    assert "no CAM grid after epoch 1" in caplog.text


def test_it_has_every_moment_of_a_callback():
    moments = [name for name in vars(Callback) if name.startswith("on_")]
    assert moments
    assert all(callable(getattr(CamGrids, name)) for name in moments)
