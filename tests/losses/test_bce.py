import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.losses_reference import binary_cross_entropy_table

from mlvision.losses import binary_cross_entropy

NAN = math.nan


def example(seed=0, num_images=5, num_classes=7, dtype=torch.float64):
    """Logits, and targets of every sort: absent, present, soft and unknown."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, num_classes, generator=generator, dtype=dtype) * 3
    targets = torch.randint(0, 2, (num_images, num_classes), generator=generator).to(dtype)
    targets[0, 1], targets[2, 3], targets[4, 0] = 0.3, 0.9, 0.5
    targets[1, 2], targets[3, 6], targets[4, 4] = NAN, NAN, NAN
    return logits, targets


def test_matches_the_equation_with_soft_unknown_and_weighted_labels():
    logits, targets = example()
    class_weights, positive_weights = torch.linspace(0.2, 3, 7).double(), torch.linspace(5, 0.5, 7).double()
    expected = binary_cross_entropy_table(
        logits.numpy(), targets.numpy(), class_weights.numpy(), positive_weights.numpy()
    )
    table = binary_cross_entropy(
        logits, targets, class_weights=class_weights, positive_weights=positive_weights, reduction="none"
    )
    assert table.dtype == torch.float64
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-12, atol=0)


def test_by_hand():
    # p = 1/2 costs log 2 whatever the label; a logit of log 3 is p = 3/4.
    logits = torch.tensor([[0.0, math.log(3), math.log(3)], [0.0, 0.0, 1.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.5, NAN]], dtype=torch.float64)
    table = [[math.log(2), math.log(4 / 3), math.log(4)], [math.log(2), math.log(2), 0.0]]
    total = sum(map(sum, table))
    expected = {"none": table, "sum": total, "image": total / 2, "mean": total / 5}
    for reduction, value in expected.items():
        torch.testing.assert_close(
            binary_cross_entropy(logits, targets, reduction=reduction),
            torch.tensor(value, dtype=torch.float64),
            rtol=1e-14,
            atol=1e-15,
        )
    assert binary_cross_entropy(logits, targets) == binary_cross_entropy(logits, targets, reduction="image")


def test_matches_torch_where_every_label_is_known():
    logits, targets = example()
    targets = targets.nan_to_num(1.0)
    weights, positive_weights = torch.rand(7).double() + 0.1, torch.rand(7).double() * 4
    ours = binary_cross_entropy(
        logits, targets, class_weights=weights, positive_weights=positive_weights, reduction="mean"
    )
    peer = F.binary_cross_entropy_with_logits(logits, targets, weights, pos_weight=positive_weights)
    torch.testing.assert_close(ours, peer, rtol=1e-13, atol=0)


def test_gradient_is_sigmoid_minus_target_and_zero_where_unknown():
    logits, targets = example()
    logits.requires_grad_()
    binary_cross_entropy(logits, targets, reduction="sum").backward()
    expected = (logits.detach().sigmoid() - targets).nan_to_num(0.0)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)
    assert (logits.grad[targets.isnan()] == 0).all()
    assert torch.autograd.gradcheck(lambda x: binary_cross_entropy(x, targets), logits)


def test_a_confident_right_answer_keeps_its_small_loss_in_float32():
    value = binary_cross_entropy(torch.tensor([[-20.0]]), torch.tensor([[0.0]]))
    assert value.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)


def test_matches_torch_gradients_of_each_target_kind_for_soft_targets_too():
    logits, targets = example()
    targets = targets.nan_to_num(0.7)
    ours, peer = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    binary_cross_entropy(ours, targets, reduction="sum").backward()
    F.binary_cross_entropy_with_logits(peer, targets, reduction="sum").backward()
    torch.testing.assert_close(ours.grad, peer.grad, rtol=1e-11, atol=1e-14)
