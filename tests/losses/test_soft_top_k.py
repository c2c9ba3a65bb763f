import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import context
from reference.losses_reference import soft_top_k, soft_top_k_table

from mlvision.errors import InputError
from mlvision.losses import SoftTopKConfig, soft_top_k_loss

OPTIONS = [(None, 2.0), (None, 0.5), (1, 2.0), (3, 0.5), (6, 4.0)]


def table(seed=0):
    """Unknown labels, an image without labels, one with soft ones, one without absent classes, two with little known."""
    noise = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, 7, generator=noise, dtype=torch.float64) * 3
    targets = (torch.rand(8, 7, generator=noise) < 0.3).double()
    targets[0, [1, 5]] = 1
    targets[1, 2] = math.nan
    targets[2] = 0
    targets[3] = torch.rand(7, generator=noise)
    targets[4] = 1
    targets[5] = torch.tensor([math.nan, 1, math.nan, math.nan, 0, math.nan, math.nan])
    targets[6] = math.nan
    return logits, targets


def shares(logits, k, alpha=2.0):
    """q of each class: the costs of one image for each class as its only label."""
    rows = logits.expand(len(logits), -1)
    return (-soft_top_k_loss(rows, torch.eye(len(logits)), k=k, alpha=alpha, reduction="none").diag()).exp()


@pytest.mark.parametrize(("k", "alpha"), OPTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_table_is_the_equation(k, alpha, weighted):
    logits, targets = table()
    weights = torch.linspace(0.5, 2, 7, dtype=torch.float64) if weighted else None
    found = soft_top_k_loss(logits, targets, k=k, alpha=alpha, class_weights=weights, reduction="none")
    expected = soft_top_k_table(logits.numpy(), targets.numpy(), k, alpha, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shares_sum_to_k_in_the_order_of_the_logits(k, scale, dtype):
    logits = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) * scale
    q = shares(logits, k)
    assert q.sum().item() == pytest.approx(k, rel=1e-3 if dtype == torch.float32 else 1e-9)
    assert (q[logits.argsort()].diff() >= 0).all()


def test_the_mass_is_kept_over_many_classes():
    """All logits equal and k = 1 of 300,000: a bracket of 10 / alpha beyond them is too narrow."""
    logits, targets = torch.zeros(1, 300_000), torch.zeros(1, 300_000)
    targets[0, 7] = 1
    assert soft_top_k_loss(logits, targets).item() == pytest.approx(math.log(300_000), rel=1e-6)


def test_by_hand():
    """Two classes share a mass of 1 about their middle: q = sigmoid(alpha (a - b) / 2), here 3/4 and 1/4."""
    logits = torch.tensor([[math.log(3), 0.0, 30.0], [0.7, 0.7, 0.7]])
    targets = torch.tensor([[1.0, 0, math.nan], [1, 1, 0]])
    values = soft_top_k_loss(logits, targets, reduction="none")
    half = math.log(3 / 2) / 2  # two of three alike: q = 2/3
    torch.testing.assert_close(values, torch.tensor([[math.log(4 / 3), 0, 0], [half, half, 0]]))
    assert soft_top_k_loss(logits, targets).item() == pytest.approx((math.log(4 / 3) + 2 * half) / 2)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "alpha"), OPTIONS)
def test_gradients(k, alpha):
    logits, targets = table()
    weights = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    options = {"k": k, "alpha": alpha, "class_weights": weights, "reduction": "sum"}
    assert torch.autograd.gradcheck(lambda x: soft_top_k_loss(x, targets, **options), logits.requires_grad_())


def test_the_gradient_is_the_implicit_one():
    """d log q_i / d z_j = alpha (1 - q_i) (delta_ij - v_j / sum(v)) with v = q (1 - q)."""
    logits, alpha, k = table()[0][0].requires_grad_(), 1.5, 3
    q = np.array(soft_top_k(logits.detach().numpy(), k, alpha))
    v = q * (1 - q)
    expected = alpha * (1 - q)[:, None] * (np.eye(7) - v / v.sum())
    found = torch.autograd.functional.jacobian(lambda z: shares(z, k, alpha).log(), logits)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_order_and_a_constant_of_each_image_change_nothing():
    logits, targets = table()
    value = soft_top_k_loss(logits, targets)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(soft_top_k_loss(logits[:, order], targets[:, order]), value)
    rows = torch.tensor([7, *order.tolist()])
    torch.testing.assert_close(soft_top_k_loss(logits[rows], targets[rows]), value)
    shift = torch.linspace(-50, 50, 8, dtype=torch.float64)[:, None]
    torch.testing.assert_close(soft_top_k_loss(logits + shift, targets), value)


def test_what_counts_is_who_holds_the_first_ranks():
    targets = torch.tensor([[1.0, 1, 0, 0]])
    for first_two in ([9.0, 6.0, -3.0, -4.0], [5.0, 8.0, -9.0, -2.0]):
        assert soft_top_k_loss(torch.tensor([first_two]), targets) < 1e-3
    third = torch.tensor([[9.0, 0.0, 6.0, -9.0]])
    assert soft_top_k_loss(third, targets) > 2
    assert soft_top_k_loss(third, targets, k=3) < 1e-3


def test_images_without_a_threshold_cost_nothing():
    """No label; no absent class; no more than k known classes; nothing known."""
    logits = torch.randn(4, 4, requires_grad=True)
    nan = math.nan
    targets = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [1, nan, nan, 1], [nan, nan, nan, nan]])
    value = soft_top_k_loss(logits, targets)
    value.backward()
    assert value == 0
    assert not logits.grad.any()
    few = torch.tensor([[1, nan, 0, nan], [0, 0, 0, 0]])
    for k, costs in ((2, False), (3, False), (1, True)):
        assert (soft_top_k_loss(logits[:2], few, k=k) > 0) == costs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_far_apart_logits_cost_their_distance(dtype):
    """One class at a distance d above two equal ones, k = 1: what it lacks is what they add, so q = e^(-alpha d / 2) / 2^.5.

    Every sigmoid rounds to 0 or 1 there, for a whole range of thresholds.
    """
    for above, below in ((48.0, -48.0), (1e4, -1e4), (8192.0, 8064.0)):
        logits = torch.tensor([[above, below, below]], dtype=dtype, requires_grad=True)
        distance = (logits[0, 0] - logits[0, 1]).item()
        value = soft_top_k_loss(logits, torch.tensor([[0.0, 1.0, 0.0]]))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.item() == pytest.approx(distance + math.log(2) / 2, rel=2e-6)
        # The sure class holds half of sum(v), each of the others a quarter.
        expected = torch.tensor([[1.0, -1.5, 0.5]], dtype=dtype)
        torch.testing.assert_close(gradient, expected, atol=1e-2, rtol=0)


def test_a_soft_label_counts_by_its_share():
    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    q = soft_top_k(logits[0].tolist(), 1.2, 2.0)
    value = soft_top_k_loss(logits, torch.tensor([[0.8, 0.4, 0.0]]).double()).item()
    assert value == pytest.approx(-(2 * math.log(q[0]) + math.log(q[1])) / 3, rel=1e-6)


def test_a_second_derivative_is_refused():
    """Through the threshold it would be wrong."""
    logits = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    value = soft_top_k_loss(logits, F.one_hot(torch.tensor([1]), 4).double())
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_options_reach_the_loss():
    logits, targets = table()
    found = SoftTopKConfig(k=2, alpha=0.5).build(context(7))(logits, targets)
    assert found == soft_top_k_loss(logits, targets, k=2, alpha=0.5)
    assert found != soft_top_k_loss(logits, targets)
    assert SoftTopKConfig().build(context(7))(logits, targets) == soft_top_k_loss(logits, targets)
    with pytest.raises(InputError, match="method.loss.k: expected 0, or less than the 7 classes, got 7"):
        SoftTopKConfig(k=7).build(context(7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k 0: expected more than 0 and less than the number of classes, 4"),
        ({"k": 4}, "k 4: expected more than 0 and less than the number of classes, 4"),
        ({"alpha": 0.0}, "alpha 0.0: expected more than 0"),
        ({"alpha": math.nan}, "alpha nan: expected more than 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        soft_top_k_loss(torch.zeros(2, 4), torch.zeros(2, 4), **options)
