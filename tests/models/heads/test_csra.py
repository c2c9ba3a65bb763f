"""Class-specific residual attention against its equation, cell by cell, and its limits."""

import numpy as np
import pytest
import torch
from reference.heads_reference import csra_of_one

from mlvision.errors import InputError
from mlvision.models import build_head
from mlvision.types import Features

PUBLISHED = {1: [1], 2: [1, 99], 4: [1, 2, 4, 99], 6: [1, 2, 3, 4, 5, 99], 8: [1, 2, 3, 4, 5, 6, 7, 99]}


@pytest.fixture
def features():
    """Two maps of 3 x 5 cells and 6 channels; the pooled features have another width."""
    noise = torch.Generator().manual_seed(3)
    cells = torch.randn(2, 6, 3, 5, generator=noise, dtype=torch.float64)
    return Features(cells, torch.randn(2, 9, generator=noise, dtype=torch.float64))


def head_of(num_classes, **options):
    torch.manual_seed(0)
    return build_head("csra", 9, num_classes, map_features=6, **options).double()


@pytest.mark.parametrize("num_heads", list(PUBLISHED))
def test_it_equals_the_equation(features, num_heads):
    head = head_of(4, num_heads=num_heads, lam=0.3)
    with torch.no_grad():
        head.weight.mul_(torch.rand(num_heads, 4, 1, dtype=torch.float64) + 0.5)  # lengths do not matter
        head.bias.normal_()
        output = head(features)
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    for image in range(2):
        logits, maps = csra_of_one(features.map[image].numpy(), weight, bias, PUBLISHED[num_heads], 0.3)
        np.testing.assert_allclose(output.logits[image], logits, atol=1e-12)
        np.testing.assert_allclose(output.maps[image], maps, atol=1e-12)
    assert output.embedding is features.pooled


def test_one_head_by_hand():
    head = build_head("csra", 2, 1, lam=0.5)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[[3.0, 4.0]]]))  # of length 5
    cells = torch.tensor([[[[5.0, 0.0]], [[0.0, 0.0]]]])  # scores 3 and 0
    output = head(Features(cells, torch.zeros(1, 2)))
    share = np.exp(3) / (np.exp(3) + 1)
    assert output.maps.tolist() == [[[[3.0, 0.0]]]]
    assert output.logits.item() == pytest.approx(1.5 + 0.5 * 3 * share, rel=1e-6)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_without_attention_it_is_the_mean_of_the_map(features, num_heads):
    head = head_of(3, num_heads=num_heads, lam=0.0)
    head.start_at(torch.tensor([-3.0, 0.5, 2.0]))
    output = head(features)
    torch.testing.assert_close(output.logits, output.maps.mean((2, 3)))


def test_the_last_head_takes_the_highest_cell_to_which_a_hot_softmax_tends(features):
    output = {}
    for lam in (0.0, 1.0):
        output[lam] = head_of(3, num_heads=2, lam=lam)(features).logits
    head = head_of(3, num_heads=2)
    scores = [torch.einsum("cd,bdhw->bchw", w / w.norm(dim=1, keepdim=True), features.map) for w in head.weight]
    soft = (scores[0].flatten(2) * scores[0].flatten(2).softmax(2)).sum(2)
    highest = scores[1].amax((2, 3))
    torch.testing.assert_close(output[1.0] - output[0.0], soft + highest)
    hot = scores[1].flatten(2)
    torch.testing.assert_close((hot * (99 * hot).softmax(2)).sum(2), highest, rtol=0, atol=2e-2)
    torch.testing.assert_close((hot * (9999 * hot).softmax(2)).sum(2), highest)


@pytest.mark.parametrize("cell", [(0, 4), (2, 0), (1, 3)])
def test_one_hot_cell_shows_in_its_place(cell):
    head = head_of(1)
    cells = torch.zeros(1, 6, 3, 5, dtype=torch.float64)
    cells[(0, slice(None), *cell)] = head.weight[0, 0].detach()
    maps = head(Features(cells, torch.zeros(1, 9, dtype=torch.float64))).maps
    assert maps.shape == (1, 1, 3, 5)
    assert (maps[0, 0] > 0).nonzero().tolist() == [list(cell)]


def test_every_parameter_gets_a_gradient_and_the_gradient_is_right(features):
    head = head_of(3, num_heads=4, lam=0.4)
    head(features).logits.square().sum().backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert (parameter.grad.abs().amax(-1) > 1e-8).all(), key
    cells = features.map.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head(Features(x, features.pooled)).logits, (cells,))


def test_logits_are_not_rounded_under_autocast(features):
    head = head_of(3, num_heads=2).float()
    rounded = Features(features.map.bfloat16(), features.pooled.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(rounded)
    assert output.logits.dtype == output.maps.dtype == torch.float32
    expected = head.double()(Features(rounded.map.double(), rounded.pooled.double()))
    torch.testing.assert_close(output.logits.double(), expected.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "head.num_heads: expected one of 1, 2, 4, 6, 8, got 3"),
        ({"lam": -0.1}, "head.lam: expected 0 or more, got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build_head("csra", 6, 3, **options)
