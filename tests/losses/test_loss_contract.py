"""What design.md asks of every loss: precision, unknown labels, extremes, no side effects."""

import math

import jaxtyping
import pytest
import torch

from mlvision.errors import InputError
from mlvision.losses import LOSSES

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 6, generator=generator) * 4
    targets = torch.randint(0, 2, (4, 6), generator=generator).float()
    targets[0, 1] = targets[2, 5] = math.nan
    targets[1] = 0.0
    targets[3] = math.nan
    return logits, targets


@every_loss
def test_unknown_labels_change_nothing(loss, table):
    logits, targets = table
    unknown = targets.isnan()
    logits.requires_grad_()
    value = loss(logits, targets, reduction="none")
    assert (value[unknown] == 0).all()
    # The worst that can stand there: no trace of it in the values, the sum or the gradient.
    poisoned = logits.detach().masked_fill(unknown, math.nan).requires_grad_()
    assert torch.equal(loss(poisoned, targets), loss(logits, targets))
    loss(poisoned, targets).backward()
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[unknown] == 0).all()
    assert (poisoned.grad[3] == 0).all()


@every_loss
def test_reductions_agree_with_the_table(loss, table):
    logits, targets = table
    values = loss(logits, targets, reduction="none")
    known = (~targets.isnan()).sum()
    for reduction, expected in {"sum": values.sum(), "image": values.sum() / 4, "mean": values.sum() / known}.items():
        torch.testing.assert_close(loss(logits, targets, reduction=reduction), expected)


@every_loss
def test_images_without_any_label_are_finite(loss):
    logits = torch.randn(3, 5, requires_grad=True)
    for targets in (torch.full((3, 5), math.nan), torch.zeros(3, 5)):
        for reduction in ("image", "sum", "mean"):
            value = loss(logits, targets, reduction=reduction)
            (gradient,) = torch.autograd.grad(value, logits)
            assert value.isfinite()
            assert gradient.isfinite().all()
    assert loss(logits, torch.full((3, 5), math.nan), reduction="mean") == 0


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_are_finite(loss, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0, 60.0, -60.0]], dtype=dtype, requires_grad=True)
    for targets in (torch.zeros(1, 5), torch.ones(1, 5), torch.full((1, 5), 0.5)):
        values = loss(logits, targets, reduction="none")
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [LOSSES["bce"], LOSSES["asl"]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_present_label_at_logit_minus_x_costs_x(loss, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0, 60.0, -60.0]], dtype=dtype)
    present = loss(logits, torch.ones(1, 5), reduction="none")[0]
    torch.testing.assert_close(present[[1, 4]].double(), -logits[0, [1, 4]].double())
    assert present[0] == 0


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(loss, dtype, table):
    logits, targets = table
    half = logits.to(dtype)
    assert torch.equal(loss(half, targets), loss(half.float(), targets))


@every_loss
def test_autocast_changes_nothing(loss, table):
    logits, targets = table
    logits.requires_grad_()
    plain = loss(logits, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = loss(logits, targets)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(plain, under_autocast)
    assert torch.equal(torch.autograd.grad(plain, logits)[0], torch.autograd.grad(under_autocast, logits)[0])


@every_loss
def test_inputs_and_global_state_are_left_alone(loss, table):
    logits, targets = table
    weights = torch.linspace(0.5, 2, 6)
    before = [tensor.clone() for tensor in (logits, targets, weights)]
    with torch.no_grad():
        loss(logits, targets, class_weights=weights)
        assert not torch.is_grad_enabled()
    loss(logits.requires_grad_(), targets, class_weights=weights).backward()
    assert torch.is_grad_enabled()
    for tensor, copy in zip((logits, targets, weights), before, strict=True):
        assert torch.equal(tensor.detach().nan_to_num(7), copy.nan_to_num(7))


@every_loss
def test_class_weights_scale_each_column(loss, table):
    logits, targets = table
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 1.0])
    plain = loss(logits, targets, reduction="none")
    torch.testing.assert_close(loss(logits, targets, class_weights=weights, reduction="none"), plain * weights)


@every_loss
def test_shapes_that_would_broadcast_are_refused(loss, monkeypatch):
    # Without the suite's own shape checker, as a user runs it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match=r"targets \(4, 1\): expected the shape of the logits, \(4, 3\)"):
        loss(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(InputError, match=r"class_weights \(1,\): expected one for each class, \(3,\)"):
        loss(torch.zeros(4, 3), torch.zeros(4, 3), class_weights=torch.ones(1))
    with pytest.raises(InputError, match="reduction 'batchmean': expected one of image, sum, mean, none"):
        loss(torch.zeros(4, 3), torch.zeros(4, 3), reduction="batchmean")
