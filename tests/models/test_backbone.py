"""Backbones against timm itself: same weights, same logits; and the map's cells where the image's pixels are."""

import pytest
import timm
import torch
from torch import nn

from mlvision.errors import InputError
from mlvision.models import Backbone, BackboneConfig, build_backbone
from mlvision.models.weights import load_state

TINY_SWIN = {"embed_dim": 4, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}

# Name, architecture options that make it small, image size, and whether the map's mean is the classifier's input.
FAMILIES = [
    ("resnet18", {}, (64, 96), True),
    ("resnet50", {}, (64, 96), True),
    ("tf_efficientnet_lite0", {}, (64, 96), True),
    ("densenet121", {}, (64, 96), True),
    ("regnety_002", {}, (64, 96), True),
    ("repvgg_a0", {}, (64, 96), True),
    ("swin_tiny_patch4_window7_224", TINY_SWIN, (64, 96), True),
    ("dla46x_c", {}, (64, 96), True),  # its classifier is a 1x1 convolution
    ("test_convnext", {}, (64, 96), False),  # normalises after pooling
    ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, (64, 96), False),
    ("mobilenetv3_small_050", {}, (64, 96), False),  # further layers after pooling
    ("vit_tiny_patch16_224", TINY_VIT, (48, 80), False),  # class token
    ("deit_tiny_patch16_224", TINY_VIT, (48, 80), False),
    ("vit_small_patch14_reg4_dinov2", TINY_VIT | {"num_classes": 7}, (42, 70), False),  # class token and registers
    ("test_vit2", {}, (48, 80), False),  # a register and mean pooling, then a norm
    ("test_vit3", {}, (48, 80), False),  # a register and attention pooling
]


def randomise(model: nn.Module) -> None:
    """Move every norm, scale and bias off its initial value, so that none of them can be left out unseen."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim <= 1:
            tensor.uniform_(0.5, 1.5)


def with_timm_twin(name: str, options: dict, size: tuple[int, int]) -> tuple[nn.Module, Backbone, nn.Linear]:
    """timm's own model with its classifier, and our backbone and a linear layer with the same weights."""
    torch.manual_seed(0)
    if timm.get_pretrained_cfg(name).fixed_input_size:
        options = options | {"img_size": size}
    twin = timm.create_model(name, **options)
    backbone = Backbone(timm.create_model(name, **options | {"num_classes": 0}), size)
    linear = nn.Linear(backbone.num_features, twin.num_classes)
    randomise(twin)
    report = load_state(backbone.model, twin.state_dict(), "twin", linear)
    assert not report.missing
    assert not report.unexpected
    return twin.eval(), backbone.eval(), linear


@pytest.mark.parametrize(("name", "options", "size", "mean_pooled"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_classifier_on_pooled_gives_timms_logits(name, options, size, mean_pooled):
    twin, backbone, linear = with_timm_twin(name, options, size)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits, features = twin(images), backbone(images)
    assert features.pooled.shape == (2, backbone.num_features)
    assert features.map.shape == (2, backbone.map_features, *backbone.grid)
    torch.testing.assert_close(linear(features.pooled), logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    if mean_pooled:
        dense = linear(features.map.mean((2, 3)))
        torch.testing.assert_close(dense, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


def test_distilled_deit_pools_the_mean_of_both_tokens():
    """timm averages two classifiers; with equal ones that is one classifier on the tokens' mean."""
    options = TINY_VIT | {"img_size": (48, 80)}
    twin = timm.create_model("deit_tiny_distilled_patch16_224", **options).eval()
    twin.head_dist.load_state_dict(twin.head.state_dict())
    backbone = Backbone(timm.create_model("deit_tiny_distilled_patch16_224", **options | {"num_classes": 0}), (48, 80))
    linear = nn.Linear(32, 1000)
    report = load_state(backbone.model, twin.state_dict(), "twin", linear)
    assert "2 classifiers of 1000 classes are left out" in report.classifier
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        features = backbone.eval()(images)
        torch.testing.assert_close(twin.head(features.pooled), twin(images))
        tokens = twin.forward_features(images)
    torch.testing.assert_close(features.map.flatten(2).transpose(1, 2), tokens[:, 2:])
    assert backbone.grid == (3, 5)


@pytest.mark.parametrize(("name", "options"), [("test_vit", {}), ("test_vit2", {}), ("test_vit3", {})])
def test_token_map_is_the_one_that_timm_lays_out(name, options):
    """timm's `forward_intermediates` strips and reshapes on its own account."""
    _, backbone, _ = with_timm_twin(name, options, (48, 80))
    images = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        expected = backbone.model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[-1]
        torch.testing.assert_close(backbone(images).map, expected)


def hottest_cell(backbone: Backbone, row: int, column: int) -> tuple[int, int]:
    """The cell of the map that changes most when the image changes at one cell's centre; rows and columns of the map."""
    h, w = backbone.grid
    step_y, step_x = backbone.image_size[0] // h, backbone.image_size[1] // w
    images = torch.randn(1, 3, *backbone.image_size).repeat(2, 1, 1, 1)
    top, left = row * step_y + step_y // 4, column * step_x + step_x // 4
    images[1, :, top : top + max(step_y // 2, 1), left : left + max(step_x // 2, 1)] += 3
    with torch.no_grad():
        plain, changed = backbone.eval()(images).map.double()
    return divmod(int((changed - plain).norm(dim=0).argmax()), w)


@pytest.mark.parametrize("cell", [(0, -1), (-1, 0), (1, 2)])
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("vit_tiny_patch16_224", TINY_VIT, (48, 80)),
        ("vit_small_patch14_reg4_dinov2", TINY_VIT, (42, 70)),
        ("swin_tiny_patch4_window7_224", TINY_SWIN, (64, 64)),  # map [8, 8, 8]: no shape tells channels from columns
        ("swin_tiny_patch4_window7_224", TINY_SWIN, (64, 96)),
        ("test_convnext", {}, (128, 192)),
        ("densenet121", {}, (96, 160)),
    ],
)
def test_a_change_in_the_image_shows_in_the_cell_over_it(name, options, size, cell):
    torch.manual_seed(0)
    if timm.get_pretrained_cfg(name).fixed_input_size:
        options = options | {"img_size": size}
    backbone = Backbone(
        timm.create_model(name, **options, num_classes=0), size
    )  # initial weights: norms change nothing
    h, w = backbone.grid
    row, column = cell[0] % h, cell[1] % w
    assert hottest_cell(backbone, row, column) == (row, column)


@pytest.mark.parametrize(
    ("name", "options", "size"), [("resnet18", {}, (64, 96)), ("swin_tiny_patch4_window7_224", TINY_SWIN, (64, 96))]
)
def test_gradient_of_a_score_with_respect_to_the_map(name, options, size):
    """For mean pooling and a linear layer it is w / (h w) in every cell."""
    _, backbone, linear = with_timm_twin(name, options, size)
    features = backbone(torch.randn(1, 3, *size))
    (gradient,) = torch.autograd.grad(linear(features.pooled)[0, 5], features.map)
    h, w = backbone.grid
    torch.testing.assert_close(gradient[0], (linear.weight[5] / (h * w)).view(-1, 1, 1).expand(-1, h, w))


def test_gradient_reaches_the_tokens_that_the_head_reads():
    _, mean_pooled, linear = with_timm_twin("test_vit2", {}, (48, 80))
    features = mean_pooled(torch.randn(1, 3, 48, 80))
    (gradient,) = torch.autograd.grad(linear(features.pooled)[0, 5], features.map)
    assert (gradient.abs().amax(1) > 0).all()


def test_position_embeddings_of_a_square_checkpoint_on_a_wide_image(tmp_path):
    """A ramp along the columns stays one, constant along the rows; the class token keeps its own."""
    source = timm.create_model("vit_tiny_patch16_224", **TINY_VIT)  # 14 x 14
    ramp = torch.arange(14.0).view(1, 1, 14, 1).expand(1, 14, 14, 32).reshape(1, 196, 32)
    source.pos_embed.data = torch.cat([torch.full((1, 1, 32), 7.0), ramp], dim=1)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    model = timm.create_model("vit_tiny_patch16_224", **TINY_VIT, img_size=(64, 336), num_classes=0)
    report = load_state(model, torch.load(tmp_path / "vit.pth"), "vit.pth")
    assert not report.missing
    assert not report.unexpected
    grid = model.pos_embed[0, 1:].unflatten(0, (4, 21))
    assert (model.pos_embed[0, 0] == 7).all()
    torch.testing.assert_close(grid, grid[:1].expand(4, 21, 32))
    expected = (torch.arange(21.0) + 0.5) * 14 / 21 - 0.5  # pixel centres
    torch.testing.assert_close(grid[0, 3:-3, 0], expected[3:-3], rtol=0, atol=0.05)


def test_building_changes_no_statistics_and_keeps_training_mode():
    backbone = build_backbone("test_resnet", image_size=64)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(int(norm.num_batches_tracked) == 0 and (norm.running_mean == 0).all() for norm in norms)
    assert all(module.training for module in backbone.modules())


def test_sizes_of_a_backbone():
    backbone = build_backbone("test_resnet")
    assert backbone.image_size == (160, 160)  # the pretrained weights' own
    assert backbone.grid == (5, 5)
    mobile = build_backbone("mobilenetv3_small_050", image_size=(64, 96))
    assert (mobile.map_features, mobile.num_features) == (288, 1024)


def test_stochastic_depth_follows_the_config_where_timms_default_differs():
    """timm's Swin drops 10 % of its last block unless told otherwise."""
    rates = []
    for rate in (0.0, 0.3):
        backbone = build_backbone(BackboneConfig("swin_tiny_patch4_window7_224", drop_path_rate=rate), image_size=32)
        rates.append(max(getattr(module, "drop_prob", 0.0) for module in backbone.modules()))
    assert rates == [0.0, pytest.approx(0.3)]


def test_preprocessing_is_that_of_the_weights():
    lite = build_backbone("tf_efficientnet_lite0", image_size=32).preprocessing
    assert (lite.mean, lite.std, lite.interpolation, lite.crop_pct) == ((0.5,) * 3, (0.5,) * 3, "bicubic", 0.875)
    grey = build_backbone("resnet18", image_size=32, in_chans=1).preprocessing
    assert grey.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    five = build_backbone("resnet18", image_size=32, in_chans=5)
    assert five.preprocessing.std == (0.229, 0.224, 0.225, 0.229, 0.224)
    assert five.eval()(torch.randn(1, 5, 32, 32)).pooled.shape == (1, 512)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet_50", {}, "no model 'resnet_50'; nearest: resnet50"),
        ("resnet18.a1", {}, "no weights 'resnet18.a1'; it has resnet18.a1_in1k"),
        ("pit_ti_224", {}, "pit_ti_224 gives no spatial map for images of 224x224"),
        ("test_vit", {"image_size": (50, 80)}, "gives no spatial map for images of 50x80 (its patches of 16x16"),
        ("densenet121", {"drop_path_rate": 0.1}, "densenet121 takes no drop_path_rate but 0.0"),
        ("resnet18", {"drop_rate": 1.5}, "model.drop_rate: expected a probability"),
        ("resnet18", {"in_chans": 0}, "model.in_chans: expected 1 to 10000, got 0"),
        ("resnet18", {"pretrained": "yes"}, "model.pretrained: expected none, hub or package, got 'yes'"),
        ("resnet18", {"pretrained": "hub", "checkpoint": "x.pth"}, "give one of them"),
    ],
)
def test_wrong_options_are_named(name, options, words):
    with pytest.raises(InputError) as caught:
        build_backbone(name, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "options", "size", "mean_pooled"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_cells_and_prefix_tokens_are_timms_features_taken_apart(name, options, size, mean_pooled):
    _, backbone, _ = with_timm_twin(name, options, size)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = backbone.model.forward_features(images)
        cells, prefix = backbone.to_cells(features, size)
        expected = backbone(images).map
    assert torch.equal(cells, expected)
    assert torch.equal(backbone.from_cells(cells, prefix), features)
    assert backbone.has_tokens == (features.ndim == 3)
    assert (0 if prefix is None else prefix.shape[1]) == backbone.num_prefix_tokens
    if backbone.has_tokens:
        last = features[:, backbone.num_prefix_tokens + cells.shape[3] - 1]  # rows first
        assert torch.equal(cells[:, :, 0, -1], last)
