import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.losses_reference import softmax_cross_entropy_table

from mlvision.losses import softmax_cross_entropy


def table(seed=0):
    noise = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 7, generator=noise, dtype=torch.float64) * 3
    targets = (torch.rand(6, 7, generator=noise) < 0.3).double()
    targets[1, 2] = targets[3, 0] = math.nan
    targets[4] = 0
    targets[5] = torch.rand(7, generator=noise)
    return logits, targets


@pytest.mark.parametrize("weighted", [False, True])
def test_the_table_is_the_equation(weighted):
    logits, targets = table()
    weights = torch.linspace(0.5, 2, 7, dtype=torch.float64) if weighted else None
    found = softmax_cross_entropy(logits, targets, class_weights=weights, reduction="none")
    expected = softmax_cross_entropy_table(logits.numpy(), targets.numpy(), weights)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_one_label_is_torchs_cross_entropy():
    logits, labels = table()[0], torch.tensor([0, 6, 3, 3, 1, 2])
    found = softmax_cross_entropy(logits, F.one_hot(labels, 7).double())
    torch.testing.assert_close(found, F.cross_entropy(logits, labels))


def test_a_teachers_distribution_is_torchs_soft_cross_entropy():
    logits, teacher = table()[0], table(1)[0].softmax(1)
    torch.testing.assert_close(softmax_cross_entropy(logits, teacher), F.cross_entropy(logits, teacher))


def test_gradients():
    logits, targets = table()
    assert torch.autograd.gradcheck(lambda x: softmax_cross_entropy(x, targets), logits.requires_grad_())


def test_by_hand():
    """Two labels share the unit: -(log 1/4 + log 1/4) / 2 = log 4, whatever the unknown class says."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 50.0]])
    targets = torch.tensor([[1.0, 1, 0, 0, math.nan]])
    assert softmax_cross_entropy(logits, targets).item() == pytest.approx(math.log(4))
