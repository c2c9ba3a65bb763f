"""What every loss of LOSSES keeps: precision, unknown labels, extremes, odd input, no side effects."""

import math

import jaxtyping
import pytest
import torch
from factories import context

from mlvision.errors import InputError
from mlvision.losses import LOSSES as CONFIGS
from mlvision.losses import smooth_labels


def of_any_classes(config):
    """The loss of a config, built for as many classes as each call has."""
    return lambda logits, targets, **options: config.build(context(logits.shape[-1]))(logits, targets, **options)


LOSSES = {name: of_any_classes(config()) for name, config in CONFIGS.items()}
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
    with pytest.raises(InputError, match=r"logits \(3,\): expected \[images, classes\]"):
        loss(torch.zeros(3), torch.zeros(3))


@every_loss
@pytest.mark.parametrize("value", [-1.0, -0.01, math.inf, -math.inf])
def test_targets_that_are_none_are_refused(loss, value):
    targets = torch.zeros(2, 3)
    targets[1, 2] = value
    with pytest.raises(InputError, match=rf"targets {value:g} at \[1, 2\]: expected .*, or NaN for unknown"):
        loss(torch.zeros(2, 3), targets)


@every_loss
def test_only_a_softmax_takes_targets_above_one(loss):
    targets = torch.tensor([[2.0, 0.0, 1.0]])
    if loss is LOSSES["softmax"]:
        expected = (2 / 3 + 1 / 3) * math.log(3)
        assert loss(torch.zeros(1, 3), targets).item() == pytest.approx(expected)
    else:
        with pytest.raises(InputError, match=r"targets 2 at \[0, 0\]: expected 0 to 1"):
            loss(torch.zeros(1, 3), targets)


@every_loss
def test_targets_that_were_rounded_are_taken(loss, table):
    """A pooled probability may end a rounding error beyond 0 or 1."""
    logits, targets = table
    beyond = torch.where(targets == 1, targets + 1e-6, targets - 1e-6)
    torch.testing.assert_close(loss(logits, beyond), loss(logits, targets), rtol=1e-4, atol=1e-4)


@every_loss
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_class_weights_that_are_none_are_refused(loss, value, table):
    weights = torch.ones(6)
    weights[4] = value
    with pytest.raises(InputError, match=rf"class_weights {value:g} at \[4\]: expected 0 or more"):
        loss(*table, class_weights=weights)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_positive_weights_that_are_none_are_refused(value, table):
    weights = torch.ones(6)
    weights[0] = value
    with pytest.raises(InputError, match=rf"positive_weights {value:g} at \[0\]: expected 0 or more"):
        LOSSES["bce"](*table, positive_weights=weights)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_targets_of_any_dtype(loss, dtype, table, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as a user runs it
    logits, targets = table
    targets = targets.nan_to_num(1.0)
    value = loss(logits, targets.to(dtype))
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(logits, targets))


@every_loss
def test_integer_logits_are_numbers(loss, table, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    _, targets = table
    logits = torch.arange(24).reshape(4, 6) % 7 - 3
    assert torch.equal(loss(logits, targets), loss(logits.float(), targets))


@every_loss
def test_a_class_that_no_image_knows_changes_nothing(loss, table):
    logits, targets = table
    logits = torch.cat([logits, torch.randn(4, 1)], 1).requires_grad_()
    targets = torch.cat([targets, torch.full((4, 1), math.nan)], 1)
    value = loss(logits, targets)
    torch.testing.assert_close(value, loss(logits[:, :-1], targets[:, :-1]))
    value.backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[:, -1].any()


@every_loss
@pytest.mark.parametrize("num_images", [0, 3])
def test_a_single_class_and_no_image(loss, num_images):
    targets = torch.tensor([[1.0], [0.0], [math.nan]])[:num_images]
    logits = torch.tensor([[-2.0], [0.5], [3.0]])[:num_images].requires_grad_()
    for reduction in ("image", "sum", "mean", "none"):
        value = loss(logits, targets, reduction=reduction)
        assert value.isfinite().all()
        assert value.shape == (logits.shape if reduction == "none" else ())
        assert num_images or not value.any()
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert gradient.isfinite().all()


@every_loss
@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_never_a_finite_gradient(loss, logit, table):
    """The loop stops at a loss or gradient that is not finite; a clean number would train on."""
    logits, targets = table
    targets[1, :2] = torch.tensor([1.0, 0.0])
    for column in (0, 1):
        bad = logits.clone()
        bad[1, column] = logit
        value = loss(bad.requires_grad_(), targets)
        (gradient,) = torch.autograd.grad(value, bad)
        assert not (value.isfinite() and gradient.isfinite().all())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("asl", {"gamma_neg": math.inf}, "gamma_neg inf, gamma_pos 0.0: expected exponents of at least 0, finite"),
        ("asl", {"gamma_pos": math.nan}, "gamma_neg 4.0, gamma_pos nan: expected exponents of at least 0, finite"),
        ("asl", {"clip": math.nan}, "clip nan: expected 0, or a probability margin"),
        ("focal", {"gamma": math.inf}, "gamma inf: expected an exponent of at least 0, finite"),
        ("soft_top_k", {"alpha": math.inf}, "alpha inf: expected more than 0, finite"),
        ("soft_top_k", {"k": math.nan}, "k nan: expected more than 0 and less than the number of classes, 6"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message, table, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match=message):
        LOSSES[name](*table, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("asl", {"gamma_neg": -1.0}, "method.loss.gamma_neg: expected 0 or more, got -1.0"),
        ("asl", {"gamma_pos": math.nan}, "method.loss.gamma_pos: expected finite numbers"),
        ("asl", {"clip": 1e-7}, "method.loss.clip: expected 0, or a probability margin in [1e-6, 1), got 1e-07"),
        ("focal", {"gamma": -0.5}, "method.loss.gamma: expected 0 or more, got -0.5"),
        ("soft_top_k", {"alpha": 0.0}, "method.loss.alpha: expected more than 0, got 0.0"),
        ("soft_top_k", {"k": -1}, "method.loss.k: expected 0 or more, got -1"),
    ],
)
def test_ranges_are_those_of_the_config(name, options, message):
    with pytest.raises(InputError) as raised:
        CONFIGS[name](**options)
    assert message in str(raised.value)


def test_the_name_is_the_key():
    assert {name: config().name for name, config in CONFIGS.items()} == {name: name for name in CONFIGS}


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_label_smoothing_takes_a_share(share):
    with pytest.raises(InputError, match=f"share {share}: expected 0 to 1"):
        smooth_labels(torch.zeros(1, 4), share)
