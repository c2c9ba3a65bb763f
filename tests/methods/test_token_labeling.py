import math

import pytest
import torch
import torch.nn.functional as F
from factories import build_method

from mlvision.errors import InputError
from mlvision.label_maps import pool_label_map
from mlvision.label_maps.mix import Mix, MixConfig
from mlvision.methods import TokenLabeling, TokenLabelingConfig
from mlvision.models import LinearHeadConfig, Preprocessing, build_classifier
from mlvision.models.backbone import BackboneConfig
from mlvision.types import Batch, CropBox, LabelMap

C, SIDE = 5, 64
BOXES = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.0, 0.5], [0.1, 0.3, 0.9, 0.6]])


def build(backbone="test_vit", **options) -> TokenLabeling:
    torch.manual_seed(0)
    classifier = build_classifier(BackboneConfig(backbone), LinearHeadConfig(), C, image_size=SIDE)
    method = build_method(
        TokenLabelingConfig(**options), classifier, Preprocessing((0.5,) * 3, (0.5,) * 3, "bilinear", 0.9)
    )
    torch.nn.init.normal_(method.tokens.weight)  # far from zero, so that mistakes show
    torch.nn.init.normal_(method.classifier.head.linear.weight)
    return method.eval()


def make_batch(activation="softmax", flipped=(False, True, False)) -> Batch:
    noise = torch.Generator().manual_seed(1)
    values = 3 * torch.randn(3, C, 4, 6, generator=noise)
    images = torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=noise)
    targets = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, math.nan], [0, 0, 0, 0, 0]])
    view = CropBox(BOXES, torch.tensor(flipped))
    return Batch(
        images,
        targets,
        torch.arange(3),
        view,
        LabelMap(values, kind="logit", groups=(C,) if activation == "softmax" else ()),
    )


def test_the_loss_is_the_papers():
    """Cross-entropy of the image, plus the weighted mean of the cells' cross-entropies, all on softmaxed pooled logits."""
    method, batch = build(token_weight=0.7, image_weight=2.0), make_batch()
    side = method.classifier.backbone.grid[0]
    features = method.classifier.backbone(method.normalise(batch.images))
    cells = torch.einsum("bdhw,cd->bchw", features.map, method.tokens.weight[:, :, 0, 0])
    image_targets = pool_label_map(batch.label_map, batch.view, C).softmax(1)
    token_targets = pool_label_map(batch.label_map, batch.view, C, output_size=side).softmax(1)
    image_loss = F.cross_entropy(method.classifier.head(features).logits, image_targets)
    token_loss = F.cross_entropy(cells, token_targets)  # torch's mean is over images and cells
    output = method(batch)
    torch.testing.assert_close(output.loss, 2 * image_loss + 0.7 * token_loss)
    torch.testing.assert_close(output.logs["token_loss"], token_loss)


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_the_label_of_a_cell_is_where_the_cell_is(backbone):
    """A class in one corner of the image, off the diagonal: its cells learn it, mirrored where the view is."""
    method = build(backbone, target="multilabel")
    rows, columns = method.classifier.backbone.grid
    values = torch.full((2, C, 2 * rows, 2 * columns), -9.0)
    values[:, 3, :2, -4:] = 9.0  # the first row of cells, the last two columns
    view = CropBox(torch.tensor([[0.0, 0, 1, 1]] * 2), torch.tensor([False, True]))
    label_map = LabelMap(values, kind="logit")
    batch = Batch(torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8), torch.zeros(2, C), torch.arange(2), view, label_map)
    _, tokens = method.targets(batch)
    expected = torch.zeros(rows, columns)
    expected[0, -2:] = 1
    assert torch.equal((tokens[0, 3] > 0.5).float(), expected)
    assert torch.equal((tokens[1, 3] > 0.5).float(), expected.flip(1))
    assert not (tokens[:, [0, 1, 2, 4]] > 0.5).any()


def test_multilabel_is_binary_cross_entropy_of_probabilities():
    method, batch = build(target="multilabel", image_label="annotation"), make_batch("sigmoid")
    side = method.classifier.backbone.grid[0]
    cells = LabelMap(batch.label_map.values.sigmoid())
    tokens = pool_label_map(cells, batch.view, C, output_size=side, operator="mean_probability")
    logits, aux = method._both(batch.images)
    known = batch.targets.isfinite()
    image_loss = F.binary_cross_entropy_with_logits(logits[known], batch.targets[known], reduction="sum") / 3
    token_loss = F.binary_cross_entropy_with_logits(aux, tokens) * C
    torch.testing.assert_close(method(batch).loss, image_loss + 0.5 * token_loss)


def test_smoothing_spreads_a_share_of_both_labels():
    method, batch = build(smoothing=0.2), make_batch()
    image_targets, token_targets = (0.8 * t + 0.2 / C for t in method.targets(batch))
    logits, aux = method._both(batch.images)
    expected = F.cross_entropy(logits, image_targets) + 0.5 * F.cross_entropy(aux, token_targets)
    torch.testing.assert_close(method(batch).loss, expected)


# MixToken


def test_pasting_cells_is_exchanging_embedded_tokens():
    """The paper's MixToken on timm's ViT, by a hook on its patch embedding."""
    method, batch = build(), make_batch()
    rows, columns = method.classifier.backbone.grid
    mix = Mix(MixConfig(cutmix=1.0), 0.5, (1, 0, 3, 2))
    _, expected = method._both(method._pasted(mix, batch.images))

    def exchange(module, inputs, tokens):
        assert tokens.shape[1:3] == (rows, columns)
        mixed = tokens.clone()
        mixed[:, 0:2, 1:3] = tokens.flip(0)[:, 0:2, 1:3]
        return mixed

    hook = method.classifier.backbone.model.patch_embed.register_forward_hook(exchange)
    _, found = method._both(batch.images)
    hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_mixed_step_mixes_targets_as_the_images(monkeypatch):
    method, batch = build(mix=1.0), make_batch()
    mix = Mix(MixConfig(cutmix=1.0), 0.75, (1, 0, 3, 2))
    monkeypatch.setattr("mlvision.methods.token_labeling.draw_mix", lambda config, size: mix)
    image_targets, token_targets = method.targets(batch)
    mixed = token_targets.clone()
    mixed[:, :, 0:2, 1:3] = token_targets.flip(0)[:, :, 0:2, 1:3]
    logits, cells = method._both(method._pasted(mix, batch.images))
    expected = F.cross_entropy(logits, 0.75 * image_targets + 0.25 * image_targets.flip(0))
    torch.testing.assert_close(method(batch).loss, expected + 0.5 * F.cross_entropy(cells, mixed))


# Prediction


def test_the_cells_may_take_part_in_prediction():
    method, batch = build(inference_weight=0.5), make_batch()
    logits, cells = method._both(batch.images)
    torch.testing.assert_close(method.predict(batch.images), logits + 0.5 * cells.amax((2, 3)))
    torch.testing.assert_close(build().predict(batch.images), logits)
    maps = method.label_maps(batch.images)
    assert (maps.kind, maps.groups) == ("logit", (C,))
    torch.testing.assert_close(maps.values, cells)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "gated"}, "method.target: expected one of softmax, multilabel, got 'gated'"),
        ({"image_label": "both"}, "method.image_label: expected one of map, annotation"),
        ({"token_weight": -1.0}, "method.token_weight: expected 0 or more, got -1.0"),
        ({"smoothing": 1.0}, r"method.smoothing: expected a share in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_a_grid_that_is_not_square_is_refused():
    classifier = build_classifier(BackboneConfig("test_resnet"), LinearHeadConfig(), C, image_size=(64, 96))
    with pytest.raises(InputError, match=r"token_labeling needs a square grid of cells, got \(\d+, \d+\)"):
        build_method(TokenLabelingConfig(), classifier, Preprocessing((0.5,) * 3, (0.5,) * 3, "bilinear", 0.9))


def test_maps_that_cannot_be_learnt_from_are_refused_before_the_first_step():
    attribution = LabelMap(torch.ones(1, C, 4, 6), kind="attribution")
    with pytest.raises(InputError, match="attribution is no probability; name a calibration of relative_to_peak"):
        build(target="multilabel").check_label_map(attribution)
    build(target="multilabel", calibration="relative_to_peak").check_label_map(attribution)
    build().check_label_map(LabelMap(torch.ones(1, C, 4, 6), kind="logit"))


@pytest.mark.parametrize("target", ["softmax", "multilabel"])
def test_a_step_in_half_precision_takes_maps_of_the_best_classes(target):
    batch = make_batch()
    values, ids = batch.label_map.values.topk(2, dim=1)
    batch.label_map = LabelMap(values.half(), ids.short(), "logit", values[:, -1] - 9, groups=(C,))
    method = build(target=target)
    with torch.autocast("cpu", torch.bfloat16):
        method(batch).loss.backward()
        found = method.targets(batch)[1]
    assert torch.equal(found, method.targets(batch)[1])
