"""Query heads against slow decoders written from the equations."""

import math

import numpy as np
import pytest
import torch
from reference.heads_reference import ml_decoder_of_one, position, query2label_of_one
from torch import nn

from mlvision.errors import InputError
from mlvision.models import build_head
from mlvision.models.heads.queries import GroupLinear
from mlvision.types import Features

SMALL = {
    "ml_decoder": {"width": 12, "num_heads": 3, "feedforward": 20},
    "query2label": {"width": 12, "num_heads": 3, "feedforward": 20},
}
REFERENCES = {"ml_decoder": ml_decoder_of_one, "query2label": query2label_of_one}


@pytest.fixture
def features():
    """Two maps of 2 x 5 cells and 8 channels; the pooled features have another width."""
    noise = torch.Generator().manual_seed(1)
    cells = torch.randn(2, 8, 2, 5, generator=noise, dtype=torch.float64)
    return Features(cells, torch.randn(2, 9, generator=noise, dtype=torch.float64))


def head_of(name, num_classes=4, **options):
    """In eval mode, every norm and bias moved off its start, so that none can be left out unseen."""
    torch.manual_seed(0)
    head = build_head(name, 9, num_classes, map_features=8, **SMALL[name] | options).double().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return head


@pytest.mark.parametrize(
    ("name", "num_classes", "options"),
    [
        ("ml_decoder", 4, {}),
        ("ml_decoder", 7, {"num_groups": 3}),
        ("ml_decoder", 1, {"num_groups": 3}),
        ("ml_decoder", 3, {"num_layers": 2, "num_heads": 1}),
        ("query2label", 4, {}),
        ("query2label", 1, {"decoder_layers": 1}),
        ("query2label", 3, {"width": 0, "num_heads": 2}),
        ("query2label", 3, {"encoder_layers": 0}),
        ("query2label", 3, {"encoder_layers": 2, "decoder_layers": 3}),
    ],
)
def test_it_equals_the_equations(features, name, num_classes, options):
    head = head_of(name, num_classes, **options)
    state = {key: value.numpy() for key, value in head.state_dict().items()}
    num_heads = options.get("num_heads", 3)
    with torch.no_grad():
        output, (embeddings, _) = head(features), head.embed(features)
    assert output.maps.shape == (2, num_classes, 2, 5)
    for image in range(2):
        logits, maps, embedded = REFERENCES[name](features.map[image].numpy(), state, num_heads, num_classes)
        np.testing.assert_allclose(output.logits[image], logits, atol=1e-11)
        np.testing.assert_allclose(output.maps[image], maps, atol=1e-12)
        np.testing.assert_allclose(embeddings[image], embedded, atol=1e-11)
    assert output.embedding is features.pooled


def test_positions_by_hand():
    """Two rows, eight channels: half a turn and a whole one, at frequencies 1 and 1 / 100."""
    first, last = math.pi, 2 * math.pi
    upper_left = [0, -1, math.sin(first / 100), math.cos(first / 100)]
    right = [0, 1, math.sin(last / 100), math.cos(last / 100)]
    np.testing.assert_allclose(position(0, 2, 2, 3, 8), upper_left + right, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_maps_sum_to_one_over_the_cells(features, name, training):
    head = head_of(name, dropout=0.5).train(training)
    maps = head(features).maps
    assert head.map_kind == "mass"
    assert (maps > 0).all()
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("cell", [(0, 4), (1, 0), (1, 3)])
@pytest.mark.parametrize(("name", "one_layer"), [("ml_decoder", {}), ("query2label", {"decoder_layers": 1})])
def test_one_changed_cell_shows_in_its_place(features, name, one_layer, cell):
    """Of a softmax, only the ratios to the changed cell change."""
    options = {"encoder_layers": 0} if name == "query2label" else {}
    head = head_of(name, num_heads=1, **one_layer, **options)
    changed = features.map.clone()
    changed[(slice(None), slice(None), *cell)] += 2
    with torch.no_grad():
        before, after = head(features).maps, head(Features(changed, features.pooled)).maps
    shift = (after / before).log()
    elsewhere = torch.ones(2, 5, dtype=torch.bool)
    elsewhere[cell] = False
    rest = shift[..., elsewhere]
    torch.testing.assert_close(rest, rest[..., :1].expand_as(rest))
    assert ((shift[(..., *cell)] - rest[..., 0]).abs() > 1e-3).all()


def test_without_positions_the_order_of_the_cells_does_not_matter(features):
    order = torch.tensor([7, 2, 9, 0, 4, 1, 8, 5, 3, 6])
    shuffled = Features(features.map.flatten(2)[..., order].unflatten(2, (2, 5)), features.pooled)
    with torch.no_grad():
        head = head_of("ml_decoder", 5, num_groups=2)
        first, second = head(features), head(shuffled)
        torch.testing.assert_close(second.logits, first.logits)
        torch.testing.assert_close(second.maps.flatten(2), first.maps.flatten(2)[..., order])
        head = head_of("query2label")
        assert ((head(shuffled).logits - head(features).logits).abs() > 1e-6).all()


@pytest.mark.parametrize(
    ("num_classes", "max_queries", "num_queries", "per_query"),
    [(80, 100, 80, 1), (1, 100, 1, 1), (7, 3, 3, 3), (9, 3, 3, 3), (150, 100, 75, 2), (101, 100, 51, 2), (5, 1, 1, 5)],
)
def test_grouped_read_out_equals_a_loop(num_classes, max_queries, num_queries, per_query):
    torch.manual_seed(0)
    linear = GroupLinear(num_classes, max_queries, 6)
    nn.init.normal_(linear.bias)
    assert (linear.num_queries, linear.per_query) == (num_queries, per_query)
    embeddings, maps = torch.randn(2, num_queries, 6), torch.rand(2, num_queries, 2, 3)
    logits, of_classes = linear(embeddings), linear.of_classes(maps)
    assert logits.shape == (2, num_classes)
    for c in range(num_classes):
        query, place = divmod(c, per_query)
        expected = embeddings[:, query] @ linear.weight[query, :, place] + linear.bias[c]
        torch.testing.assert_close(logits[:, c], expected)
        assert torch.equal(of_classes[:, c], maps[:, query])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [("ml_decoder", {}), ("ml_decoder", {"num_groups": 2, "num_layers": 2}), ("query2label", {})],
)
def test_every_parameter_gets_a_gradient(features, name, options, training):
    head = head_of(name, 3, **options).train(training)
    head(features).logits.square().sum().backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 1e-8, key


@pytest.mark.parametrize("name", SMALL)
def test_the_gradient_is_right(features, name):
    head = head_of(name, 2)
    cells = features.map[:1].clone().requires_grad_()

    def both(cells):
        output = head(Features(cells, features.pooled[:1]))
        return output.logits, output.maps

    assert torch.autograd.gradcheck(both, (cells,))


def test_fixed_queries_are_saved_and_not_trained():
    head = head_of("ml_decoder")
    assert "queries" in head.state_dict()
    assert "queries" not in dict(head.named_parameters())
    assert dict(head_of("query2label").named_parameters())["queries"].shape == (4, 12)


@pytest.mark.parametrize("name", SMALL)
def test_a_head_gives_the_same_from_its_saved_state(features, name):
    head = head_of(name)
    torch.manual_seed(1)
    again = build_head(name, 9, 4, map_features=8, **SMALL[name]).double().eval()
    assert not torch.allclose(again(features).logits, head(features).logits)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(features).logits, head(features).logits)


@pytest.mark.parametrize("name", SMALL)
def test_dropout_acts_in_training_alone(features, name):
    head = head_of(name, dropout=0.3)
    assert torch.equal(head(features).logits, head(features).logits)
    head.train()
    assert not torch.allclose(head(features).logits, head(features).logits)


def test_dropout_of_the_fixed_queries_is_each_images_own():
    head = head_of("ml_decoder", dropout=0.3).train()
    twice = torch.randn(1, 8, 2, 5, dtype=torch.float64).expand(2, -1, -1, -1)
    head.decoder.eval()
    first, second = head(Features(twice, torch.zeros(2, 9, dtype=torch.float64))).logits
    assert ((first - second).abs() > 1e-6).all()


@pytest.mark.parametrize("name", SMALL)
def test_autocast_stays_near_and_keeps_logits_and_maps_in_float32(features, name):
    head = head_of(name).float()
    features = Features(features.map.float(), features.pooled.float())
    with torch.no_grad():
        plain = head(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = head(features)
            embeddings, _ = head.embed(Features(features.map.bfloat16(), features.pooled.bfloat16()))
            logits = head.read_out(embeddings.bfloat16())
    assert output.logits.dtype == output.maps.dtype == torch.float32
    torch.testing.assert_close(output.logits, plain.logits, rtol=0.05, atol=0.1)
    torch.testing.assert_close(output.maps, plain.maps, rtol=0.1, atol=0.01)
    torch.testing.assert_close(output.maps.sum((2, 3)), torch.ones(2, 4))
    weight, bias = head.read_out.weight.double(), head.read_out.bias.double()
    expected = torch.einsum("bqd,qdk->bq", embeddings.bfloat16().double(), weight) + bias
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_sizes_as_published():
    """Of 80 classes on a map of 2048: about 7.2 million and 151 million parameters."""
    with torch.device("meta"):
        ml_decoder, query2label = (build_head(name, 2048, 80) for name in SMALL)
    attention, feedforward, norms = 4 * 768**2 + 3 * 768, 2 * 768 * 2048 + 2048 + 768, 3 * 2 * 768
    read_out = 80 * 768 + 80
    assert count(ml_decoder) == 2049 * 768 + attention + feedforward + norms + read_out
    layer = 4 * 2048**2 + 3 * 2048 + 2 * 2048 * 8192 + 8192 + 2048 + 2 * 2 * 2048
    assert count(query2label) == 3 * layer + 2 * 2048 + 80 * 2048 + 80 * 2048 + 80


def count(head):
    return sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ml_decoder", {"num_groups": 0}, "head.num_groups: expected 1 to 100000, got 0"),
        ("ml_decoder", {"width": 0}, "head.width: expected 1 to 8192, got 0"),
        ("ml_decoder", {"num_layers": 99999999}, "head.num_layers: expected 1 to 64, got 99999999"),
        ("ml_decoder", {"num_layers": 0}, "head.num_layers: expected 1 to 64, got 0"),
        ("ml_decoder", {"num_heads": 5}, "head.num_heads: expected a divisor of the width, 12, got 5"),
        ("ml_decoder", {"num_heads": 0}, "head.num_heads: expected a divisor of the width, 12, got 0"),
        ("ml_decoder", {"feedforward": 0}, "head.feedforward: expected 1 to 32768, got 0"),
        ("ml_decoder", {"dropout": 1.0}, "head.dropout: expected a probability in \\[0, 1\\), got 1.0"),
        (
            "query2label",
            {"width": 6},
            "head.width: expected a multiple of 4 up to 8192, or 0 where the map's 8 is one, got 6",
        ),
        ("query2label", {"width": -4}, "head.width: expected a multiple of 4"),
        ("query2label", {"encoder_layers": -1}, "head.encoder_layers: expected 0 to 64, got -1"),
        ("query2label", {"decoder_layers": 0}, "head.decoder_layers: expected 1 to 64, got 0"),
        ("query2label", {"num_heads": 5}, "head.num_heads: expected a divisor of the width, 12, got 5"),
        ("query2label", {"feedforward": -1}, "head.feedforward: expected 0 to 32768, got -1"),
        ("query2label", {"dropout": -0.1}, "head.dropout: expected a probability in \\[0, 1\\), got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        build_head(name, 9, 4, map_features=8, **SMALL[name] | options)
