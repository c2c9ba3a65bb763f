import math

import numpy as np
import pytest
import torch

from mlvision.errors import InputError
from mlvision.models import build_head
from mlvision.types import Features


def test_logits_are_scaled_cosines_with_a_bias():
    head = build_head("cosine", 5, 3, scale=4.0).double()
    head.start_at(torch.tensor([-1.0, 0.5, 2.0]))
    pooled = torch.randn(2, 5, dtype=torch.float64)
    weight = head.weight.detach().numpy()
    expected = np.zeros((2, 3))
    for b, x in enumerate(pooled.numpy()):
        for c, w in enumerate(weight):
            cosine = sum(w * x) / math.sqrt(sum(w * w) * sum(x * x))
            expected[b, c] = 4.0 * cosine + (-1.0, 0.5, 2.0)[c]
    found = head(Features(torch.empty(2, 5, 1, 1, dtype=torch.float64), pooled)).logits
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-6)


def test_lengths_change_nothing_and_features_of_zero_give_the_bias():
    head = build_head("cosine", 4, 3)
    head.start_at(torch.tensor([-2.0, 0.0, 1.0]))
    pooled, cells = torch.randn(6, 4), torch.empty(6, 4, 2, 2)
    before = head(Features(cells, pooled)).logits
    with torch.no_grad():
        head.weight.mul_(torch.tensor([[0.1], [1.0], [30.0]]))
    torch.testing.assert_close(head(Features(cells, 7 * pooled)).logits, before)
    torch.testing.assert_close(head(Features(cells, 0 * pooled)).logits, head.bias.expand(6, 3))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf])
def test_a_scale_that_is_no_factor_is_refused(scale):
    with pytest.raises(InputError, match="head.scale: expected"):
        build_head("cosine", 4, 3, scale=scale)
