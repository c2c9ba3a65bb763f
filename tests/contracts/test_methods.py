"""What every method of METHODS keeps. Of two processes and of a resume: engine/test_method_life.py; of waiting for a GPU:
engine/test_waits.py."""

import copy

import pytest
import torch
from factories import build_method, head_of, small_batch, small_classifier

from mlvision.methods import METHODS
from mlvision.types import Batch

every_method = pytest.mark.parametrize("name", METHODS)


def built(name, num_classes=3):
    return build_method(METHODS[name](), small_classifier(head_of(name), num_classes))


def step(method, batch):
    """The loss, and the gradient of each parameter that has one."""
    method.train().zero_grad()
    torch.manual_seed(1)
    output = method(batch)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


@every_method
@pytest.mark.parametrize("num_classes", [3, 1])
def test_a_step_has_a_finite_loss_and_gradients(name, num_classes):
    method = built(name, num_classes)
    output, gradients = step(method, small_batch(num_classes))
    assert output.loss.shape == ()
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    backbone, head = (
        sum(float(g.abs().sum()) for key, g in gradients.items() if key.startswith(f"classifier.{part}"))
        for part in ("backbone", "head")
    )
    assert backbone > 0
    assert head > 0
    for value in output.logs.values():
        assert not value.requires_grad
        assert value.isfinite()


@every_method
def test_unknown_labels_train_nothing(name):
    """Those of the loss: what a label map says of an image is known, whatever its labels are."""
    batch = small_batch(3)
    batch.targets[:] = torch.nan
    output, gradients = step(built(name), batch)
    assert output.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if not built(name).needs_label_map:
        assert not any(gradient.any() for key, gradient in gradients.items() if key.startswith("classifier.head"))


@every_method
def test_a_batch_is_left_as_it_is(name):
    batch = small_batch(3)
    before = copy.deepcopy(batch)
    step(built(name), batch)
    for field in ("images", "targets", "index"):
        assert torch.equal(getattr(batch, field).nan_to_num(7.0), getattr(before, field).nan_to_num(7.0))
    assert torch.equal(batch.view.boxes, before.view.boxes)
    assert torch.equal(batch.label_map.values, before.label_map.values)


@every_method
def test_predictions_are_of_each_image_in_float32(name):
    method = built(name).eval()
    images = small_batch(3).images
    with torch.no_grad():
        logits = method.predict(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = method.predict(images)
    assert logits.shape == (4, 3)
    assert logits.dtype == low.dtype == torch.float32
    assert (logits[0] != logits[1]).any()
    with torch.no_grad():
        torch.testing.assert_close(method.predict(images.float() / 255), logits)
        torch.testing.assert_close(method.predict(images[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
    given = (images.float() / 255).requires_grad_()
    method.predict(given).sum().backward()
    assert given.grad.isfinite().all()
    assert given.grad.any()


@every_method
def test_its_state_holds_all_that_it_learnt(name):
    first, second = built(name), built(name)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    second.load_state_dict(first.state_dict())
    images = small_batch(3).images
    with torch.no_grad():
        assert torch.equal(first.eval().predict(images), second.eval().predict(images))


@every_method
def test_every_parameter_is_in_one_group(name):
    method = built(name)
    groups = method.parameter_groups()
    grouped = [id(p) for parameters in groups.values() for p in parameters]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters())
    assert "backbone" in groups


@every_method
def test_its_map_is_used_if_it_needs_one(name):
    method = built(name)
    batch = small_batch(3)
    other = Batch(batch.images, batch.targets, batch.index, batch.view, copy.deepcopy(batch.label_map))
    other.label_map.values.mul_(0.5)
    losses = [float(step(built(name), given)[0].loss.detach()) for given in (batch, other)]
    assert (losses[0] != losses[1]) == method.needs_label_map
