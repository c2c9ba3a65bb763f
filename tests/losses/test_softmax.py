import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.losses_reference import softmax_cross_entropy_table

from mlvision.losses import BceConfig, SoftmaxConfig, binary_cross_entropy, smooth_labels, softmax_cross_entropy
from mlvision.parts import Context
from mlvision.space import LabelSpace


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


@pytest.mark.parametrize("groups", [(2, 1, 3, 1), (4, 3), (1,) * 7, ()])
def test_each_group_has_its_own_softmax(groups):
    """Each group apart from the others, as if it were all; classes for themselves by the binary cross-entropy."""
    logits, targets = table()
    weights = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    found = softmax_cross_entropy(logits, targets, groups=groups, class_weights=weights, reduction="none")
    expected, first = [], 0
    for size in groups or (1,) * 7:
        own = slice(first, first + size)
        loss = softmax_cross_entropy if size > 1 else binary_cross_entropy
        expected.append(loss(logits[:, own], targets[:, own], class_weights=weights[own], reduction="none"))
        first += size
    torch.testing.assert_close(found, torch.cat(expected, 1))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: softmax_cross_entropy(x, targets, groups=groups), logits)


def test_a_loss_of_softmaxes_takes_the_groups_of_the_data():
    logits, targets = table()
    board, multilabel = (LabelSpace(tuple("abcdefg"), exclusive=groups) for groups in ((4, 3), ()))
    for space, groups in ((board, (4, 3)), (multilabel, (7,))):
        assert SoftmaxConfig().space(space) == replace(space, groups=groups)
        assert BceConfig().space(space) == space
        found = SoftmaxConfig().build(Context(space))(logits, targets)
        torch.testing.assert_close(found, softmax_cross_entropy(logits, targets, groups=groups))


def test_smoothing_stays_within_a_group():
    targets = torch.tensor([[1.0, 0.0, math.nan, 1.0, 0.0, 0.0]])
    found = smooth_labels(targets, 0.3, (2, 1, 3))
    expected = torch.tensor([[0.85, 0.15, math.nan, 0.8, 0.1, 0.1]])
    torch.testing.assert_close(found, expected, equal_nan=True)
