import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.losses_reference import decoupled_softmax_table

from mlvision.losses import decoupled_softmax_loss, softmax_cross_entropy


def table(seed=0):
    """Unknown labels, an image without labels, one with soft ones, one without absent classes."""
    noise = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, 7, generator=noise, dtype=torch.float64) * 3
    targets = (torch.rand(7, 7, generator=noise) < 0.3).double()
    targets[0, [1, 5]] = 1
    targets[1, 2] = targets[3, 0] = math.nan
    targets[4] = 0
    targets[5] = torch.rand(7, generator=noise)
    targets[6] = 1
    return logits, targets


@pytest.mark.parametrize("weighted", [False, True])
def test_the_table_is_the_equation(weighted):
    logits, targets = table()
    weights = torch.linspace(0.5, 2, 7, dtype=torch.float64) if weighted else None
    found = decoupled_softmax_loss(logits, targets, class_weights=weights, reduction="none")
    expected = decoupled_softmax_table(logits.numpy(), targets.numpy(), weights)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_by_hand():
    """Absent classes of e^z 1 and 2: -(log 1/4 + log 5/8) / 2, whatever the other label or the unknown class says."""
    logits = torch.tensor([[1.0, 5.0, 1.0, 2.0, 1e20]]).log()
    targets = torch.tensor([[1.0, 1, 0, 0, math.nan]])
    values = decoupled_softmax_loss(logits, targets, reduction="none")[0]
    torch.testing.assert_close(values, torch.tensor([math.log(4) / 2, math.log(8 / 5) / 2, 0, 0, 0]))
    assert decoupled_softmax_loss(logits, targets).item() == pytest.approx(math.log(32 / 5) / 2)


def test_one_label_is_softmax_cross_entropy():
    logits, labels = table()[0], torch.tensor([0, 6, 3, 3, 1, 2, 5])
    targets = F.one_hot(labels, 7).double()
    torch.testing.assert_close(decoupled_softmax_loss(logits, targets), F.cross_entropy(logits, labels))
    targets[1, 3] = targets[4, 0] = math.nan
    torch.testing.assert_close(decoupled_softmax_loss(logits, targets), softmax_cross_entropy(logits, targets))


def test_a_label_never_sits_in_the_denominator_of_another():
    logits, targets = table()
    logits.requires_grad_()
    labels = (targets[0] == 1).nonzero().flatten().tolist()
    assert len(labels) > 1
    for label in labels:
        value = decoupled_softmax_loss(logits, targets, reduction="none")[0, label]
        (gradient,) = torch.autograd.grad(value, logits)
        assert gradient[0, label] < 0
        assert (gradient[0][targets[0] == 0] > 0).all()
        assert not gradient[0, [other for other in labels if other != label]].any()


def test_gradients():
    logits, targets = table()
    weights = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    loss = decoupled_softmax_loss
    assert torch.autograd.gradcheck(lambda x: loss(x, targets, class_weights=weights), logits.requires_grad_())


def test_order_and_a_constant_of_each_image_change_nothing():
    logits, targets = table()
    value = decoupled_softmax_loss(logits, targets)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(decoupled_softmax_loss(logits[:, order], targets[:, order]), value)
    torch.testing.assert_close(decoupled_softmax_loss(logits[order], targets[order]), value)
    shift = torch.linspace(-50, 50, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(decoupled_softmax_loss(logits + shift, targets), value)


def test_images_without_a_label_or_without_an_absent_class_cost_nothing():
    logits = torch.randn(3, 4, requires_grad=True)
    targets = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, math.nan, math.nan, 0]])
    value = decoupled_softmax_loss(logits, targets)
    value.backward()
    assert value == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_far_apart_logits_cost_their_distance(dtype):
    """A label x below the best absent class costs x; one as far above nothing, not even by rounding."""
    logits = torch.tensor([[1e4, -1e4, 0.0, 60.0]], dtype=dtype, requires_grad=True)
    for label, rival in ((1, 0), (2, 0), (0, 3)):
        targets = F.one_hot(torch.tensor([label]), 4).to(dtype)
        value = decoupled_softmax_loss(logits, targets)
        (gradient,) = torch.autograd.grad(value, logits)
        distance = logits[0, rival].item() - logits[0, label].item()
        assert value.item() == pytest.approx(max(distance, 0), rel=1e-6, abs=0)
        assert gradient[0, [label, rival]].tolist() == ([-1, 1] if distance > 0 else [0, 0])


def test_a_soft_label_is_a_label_and_a_rival_by_its_shares():
    """0.8 and 0.4 beside an absent class, all logits equal: denominators 1 + 0.6 + 1 and 1 + 0.2 + 1."""
    value = decoupled_softmax_loss(torch.zeros(1, 3), torch.tensor([[0.8, 0.4, 0.0]])).item()
    assert value == pytest.approx((2 * math.log(2.6) + math.log(2.2)) / 3)


def test_a_target_rounded_above_one_is_a_label():
    targets = torch.tensor([[1 + 1e-7, 0.0]])
    assert targets[0, 0] > 1
    assert decoupled_softmax_loss(torch.zeros(1, 2), targets).item() == pytest.approx(math.log(2))
