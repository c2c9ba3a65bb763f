import math

import numpy as np
import pytest
import torch
from reference.losses_reference import asymmetric_gradient, asymmetric_loss_table
from timm.loss import AsymmetricLossMultiLabel

from mlvision.errors import InputError
from mlvision.losses import asymmetric_loss, binary_cross_entropy

NAN = math.nan
SETTINGS = [
    {"gamma_neg": 4.0, "gamma_pos": 0.0, "clip": 0.05},
    {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05},
    {"gamma_neg": 2.0, "gamma_pos": 0.0, "clip": 0.0},
    {"gamma_neg": 0.5, "gamma_pos": 0.25, "clip": 0.2},
    {"gamma_neg": 0.0, "gamma_pos": 3.0, "clip": 0.0},
]


def example(seed=0, num_images=5, num_classes=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, num_classes, generator=generator, dtype=dtype) * 3
    targets = torch.randint(0, 2, (num_images, num_classes), generator=generator).to(dtype)
    return logits, targets


def with_soft_and_unknown(targets):
    targets = targets.clone()
    targets[0, 1], targets[2, 3] = 0.3, 0.9
    targets[1, 2], targets[3, 6] = NAN, NAN
    return targets


@pytest.mark.parametrize("setting", SETTINGS)
def test_matches_the_equation_with_soft_unknown_and_weighted_labels(setting):
    logits, targets = example()
    targets = with_soft_and_unknown(targets)
    weights = torch.linspace(0.2, 3, 7).double()
    expected = asymmetric_loss_table(logits.numpy(), targets.numpy(), **setting, class_weights=weights.numpy())
    table = asymmetric_loss(logits, targets, **setting, class_weights=weights, reduction="none")
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-11, atol=1e-15)


def test_by_hand():
    # p = 3/4 for a logit of log 3, and 1/4 for its negative.
    logits = torch.tensor([[math.log(3), math.log(3), -math.log(3)], [math.log(3), 0.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0, 0.0], [NAN, 0.5, 0.0]], dtype=torch.float64)
    present = 0.25 * math.log(4 / 3)
    table = [
        [present, 0.5**2 * math.log(2), 0.0],  # p_m = 3/4 - 1/4; the third is exactly at the margin
        [0.0, 0.5 * (0.5 * math.log(2)) + 0.5 * (0.25**2 * math.log(4 / 3)), 0.25**2 * math.log(4 / 3)],
    ]
    ours = asymmetric_loss(logits, targets, gamma_neg=2.0, gamma_pos=1.0, clip=0.25, reduction="none")
    torch.testing.assert_close(ours, torch.tensor(table, dtype=torch.float64), rtol=1e-14, atol=1e-15)
    image = asymmetric_loss(logits, targets, gamma_neg=2.0, gamma_pos=1.0, clip=0.25)
    assert image.item() == pytest.approx(sum(map(sum, table)) / 2, rel=1e-14)


@pytest.mark.parametrize("detach_focal", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_matches_timm_on_hard_labels(setting, detach_focal):
    logits, targets = example(dtype=torch.float32)
    peer = AsymmetricLossMultiLabel(**setting, disable_torch_grad_focal_loss=detach_focal)
    ours_at, peer_at = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours, theirs = asymmetric_loss(ours_at, targets, **setting, detach_focal=detach_focal), peer(peer_at, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.backward()
    theirs.backward()
    # timm's 0^gamma is not differentiable for gamma < 1: where it gives NaN, the equation's gradient is 0.
    assert (ours_at.grad[peer_at.grad.isnan()] == 0).all()
    torch.testing.assert_close(ours_at.grad, peer_at.grad.nan_to_num(0.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("detach_focal", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradient_matches_the_hand_derivative(setting, detach_focal):
    logits, targets = example()
    logits.requires_grad_()
    asymmetric_loss(logits, targets, **setting, detach_focal=detach_focal, reduction="sum").backward()
    expected = [
        asymmetric_gradient(x, y, **setting, detach_focal=detach_focal)
        for x, y in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True)
    ]
    np.testing.assert_allclose(logits.grad.flatten().numpy(), expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradcheck_with_soft_and_unknown_labels(setting):
    logits, targets = example(seed=1)
    targets = with_soft_and_unknown(targets)
    assert torch.autograd.gradcheck(lambda x: asymmetric_loss(x, targets, **setting), logits.requires_grad_())


def test_is_bce_bit_for_bit_without_focusing_and_margin():
    logits, targets = example(dtype=torch.float32)
    targets = with_soft_and_unknown(targets)
    for reduction in ("image", "sum", "mean", "none"):
        ours = asymmetric_loss(logits, targets, gamma_neg=0.0, gamma_pos=0.0, clip=0.0, reduction=reduction)
        assert torch.equal(ours, binary_cross_entropy(logits, targets, reduction=reduction))


def test_an_easy_absent_label_costs_nothing_and_has_no_gradient():
    logits = torch.logit(torch.tensor([[0.049, 0.01, 0.051, 0.3]])).requires_grad_()
    table = asymmetric_loss(logits, torch.zeros(1, 4), reduction="none")
    table.sum().backward()
    assert (table[0, :2] == 0).all()
    assert (logits.grad[0, :2] == 0).all()
    assert (table[0, 2:] > 0).all()
    assert (logits.grad[0, 2:] > 0).all()


def test_a_hopeless_present_label_can_still_be_learnt():
    # Where log(max(p, 1e-8)) of the authors is flat.
    logits = torch.tensor([[-25.0]], requires_grad=True)
    asymmetric_loss(logits, torch.ones(1, 1)).backward()
    assert logits.grad.item() == pytest.approx(-1.0, rel=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.25])
def test_gammas_below_one_have_finite_gradients_where_a_probability_is_zero_or_at_the_margin(clip):
    # 0^gamma has an infinite slope there, the loss has none.
    logits = torch.tensor([[-1e4, 1e4, -math.log(3), 0.0]], dtype=torch.float64, requires_grad=True)
    for targets in (torch.zeros(1, 4).double(), torch.ones(1, 4).double()):
        loss = asymmetric_loss(logits, targets, gamma_neg=0.5, gamma_pos=0.5, clip=clip)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()
        assert (gradient[targets == 0] >= 0).all()
        assert (gradient[targets == 1] <= 0).all()


def test_float32_stays_close_to_float64_for_the_smallest_margin():
    logits = torch.linspace(-40, 40, 101)[None]
    for target in (0.0, 1.0):
        targets = torch.full_like(logits, target)
        single = asymmetric_loss(logits, targets, clip=1e-6, reduction="none")
        double = asymmetric_loss(logits.double(), targets.double(), clip=1e-6, reduction="none")
        assert single.isfinite().all()
        torch.testing.assert_close(single.double(), double, rtol=0.1, atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"gamma_neg": -1.0}, "gamma_neg -1.0"),
        ({"clip": 1.0}, "clip 1.0: expected 0, or a probability margin"),
        ({"clip": 1e-9}, "clip 1e-09"),
        ({"reduction": "batch"}, "reduction 'batch': expected one of image, sum, mean, none"),
    ],
)
def test_bad_options_are_named(setting, match):
    with pytest.raises(InputError, match=match):
        asymmetric_loss(torch.zeros(2, 3), torch.zeros(2, 3), **setting)
