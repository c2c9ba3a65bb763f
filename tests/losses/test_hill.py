import math

import numpy as np
import pytest
import torch

from mlvision.errors import InputError
from mlvision.losses import hill_loss


def hill_table(logits, targets, lam, margin, gamma):
    """The equation, one label at a time; 0 where y is NaN."""
    table = np.zeros(logits.shape)
    for (b, c), y in np.ndenumerate(targets):
        if math.isnan(y):
            continue
        p, p_m = (1 / (1 + math.exp(m - logits[b, c])) for m in (0, margin))
        table[b, c] = -y * (1 - p_m) ** gamma * math.log(p_m) + (1 - y) * (lam - p) * p**2
    return table


@pytest.mark.parametrize(("lam", "margin", "gamma"), [(1.5, 1.0, 2.0), (1.0, 0.0, 0.0), (2.5, 0.3, 1.5)])
def test_matches_the_equation(lam, margin, gamma):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64) * 3
    targets = torch.randint(0, 2, (5, 7), generator=generator).double()
    targets[0, 1], targets[2, 3], targets[1, 2] = 0.3, 0.9, math.nan
    table = hill_loss(logits, targets, lam=lam, margin=margin, gamma=gamma, reduction="none")
    np.testing.assert_allclose(table, hill_table(logits.numpy(), targets.numpy(), lam, margin, gamma), rtol=1e-12)


def test_by_hand():
    """p = 1/2: (3/2 - 1/2) / 4; p = 3/4 of a present label without margin: -(1/4)^2 log(3/4)."""
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    targets = torch.tensor([[0.0, 1.0]])
    table = hill_loss(logits, targets, margin=0.0, reduction="none")
    np.testing.assert_allclose(table, [[0.25, -math.log(0.75) / 16]], rtol=1e-12)


def test_the_gradient_of_absent_labels_is_a_hill():
    """Of p it is 2 lam p - 3 p^2, times p (1 - p) of the sigmoid: highest in between, near 0 at both ends."""
    logits = torch.linspace(-12, 12, 241, dtype=torch.float64)[:, None].requires_grad_()
    hill_loss(logits, torch.zeros_like(logits), reduction="sum").backward()
    slope, p = logits.grad[:, 0], logits.detach().sigmoid()[:, 0]
    torch.testing.assert_close(slope, (3 * p - 3 * p**2) * p * (1 - p))
    assert 100 < int(slope.argmax()) < 140
    assert slope[[0, -1]].max() < 1e-4 < slope.max()


def test_without_margin_and_focus_present_labels_cost_binary_cross_entropy():
    logits = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.nn.functional.softplus(-logits)
    torch.testing.assert_close(
        hill_loss(logits, torch.ones_like(logits), margin=0.0, gamma=0.0, reduction="none"), expected
    )


@pytest.mark.parametrize("options", [{"lam": 0.9}, {"margin": -0.1}, {"gamma": math.inf}, {"lam": math.nan}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match="expected at least 1, 0 and 0, finite"):
        hill_loss(torch.zeros(1, 1), torch.zeros(1, 1), **options)
