import numpy as np
import pytest
import torch
from factories import build_method

from mlvision.engine.callbacks import Callback
from mlvision.methods import BaselineConfig
from mlvision.models import BackboneConfig, LinearHeadConfig, build_classifier
from mlvision.study import callback
from mlvision.study.callback import CamGrids


class Writer:
    def __init__(self):
        self.images = []

    def add_image(self, name, page, step, dataformats):
        self.images.append((name, page, step, dataformats))


class State:
    ema, epoch, steps_done = None, 1, 7

    def __init__(self, method, writer):
        self.method = method
        self.log = type("Log", (), {"tensorboard": writer})()


@pytest.fixture
def method():
    classifier = build_classifier(BackboneConfig("resnet10t"), LinearHeadConfig(), 3, image_size=64)
    return build_method(BaselineConfig(), classifier)


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


def test_no_picture_ends_a_training(method, monkeypatch, caplog):
    """The title of a page cannot be a text of several lines, and a disk can be full."""
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    writer, random = Writer(), torch.get_rng_state()
    grids = CamGrids(images, torch.ones(1, 3), ["a.jpg"], ["x", "y", "z"])

    def fail(*_, **__):
        raise ValueError("can't measure length of multiline text")

    monkeypatch.setattr(callback, "draw_grid", fail)
    method.train()
    with caplog.at_level("INFO", logger="mlvision"):
        grids.on_epoch_end(State(method, writer))
        grids.on_epoch_end(State(method, writer))
    assert not writer.images
    assert caplog.text.count("no CAM grid after epoch 1 (ValueError: can't measure length of multiline text)") == 1
    assert "in fail" in caplog.text  # the traceback
    assert method.training
    assert torch.equal(random, torch.get_rng_state())
    monkeypatch.undo()
    monkeypatch.setattr(writer, "add_image", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
    grids.on_epoch_end(State(method, writer))
    monkeypatch.undo()
    grids.on_epoch_end(State(method, writer))
    assert len(writer.images) == 1
    monkeypatch.setattr(callback, "draw_grid", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        grids.on_epoch_end(State(method, writer))


@pytest.mark.parametrize(("key", "name"), [("a\nb.jpg", "x"), ("a.jpg", "x\ny"), ("a\r\n.jpg", "")])
def test_names_of_several_lines_do_not_end_a_training(key, name, method):
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    CamGrids(images, torch.ones(1, 3), [key], [name, "y", "z"]).on_epoch_end(State(method, Writer()))


def test_it_has_every_moment_of_a_callback():
    moments = [name for name in vars(Callback) if name.startswith("on_")]
    assert moments
    assert all(callable(getattr(CamGrids, name)) for name in moments)
