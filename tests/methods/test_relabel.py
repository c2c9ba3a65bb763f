import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import build_method

from mlvision.errors import InputError
from mlvision.label_maps import pool_label_map
from mlvision.label_maps.mix import Mix, MixConfig
from mlvision.methods import Relabel, RelabelConfig
from mlvision.models import LinearHeadConfig, Preprocessing, build_classifier
from mlvision.models.backbone import BackboneConfig
from mlvision.parts import Context
from mlvision.space import LabelSpace
from mlvision.types import Batch, CropBox, LabelMap

NUM_CLASSES = 5
BOXES = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.0, 0.5], [0.1, 0.3, 0.9, 0.6]])


def build(**options) -> Relabel:
    torch.manual_seed(0)
    classifier = build_classifier(BackboneConfig("test_resnet"), LinearHeadConfig(), NUM_CLASSES, image_size=(64, 96))
    return build_method(RelabelConfig(**options), classifier, Preprocessing((0.5,) * 3, (0.5,) * 3, "bilinear", 0.9))


def logit_map(activation="softmax") -> LabelMap:
    return LabelMap(
        3 * torch.randn(3, NUM_CLASSES, 4, 6, generator=torch.Generator().manual_seed(1)), kind="logit",
        groups=(NUM_CLASSES,) if activation == "softmax" else (),
    )  # fmt: skip


def make_batch(label_map: LabelMap, targets=None) -> Batch:
    images = torch.randint(256, (3, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    if targets is None:
        targets = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, math.nan], [0, 0, 0, 0, 0]])
    return Batch(images, targets, torch.arange(3), CropBox(BOXES), label_map)


# Targets


def test_softmax_targets_are_the_papers():
    """The softmax of the crop's mean logit, and its cross-entropy."""
    method, batch = build(target="softmax", temperature=2.0), make_batch(logit_map())
    expected = (pool_label_map(batch.label_map, batch.view, NUM_CLASSES) / 2).softmax(1)
    targets = method.targets(batch)
    torch.testing.assert_close(targets, expected)
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    method.eval()
    loss = -(expected * method.predict(batch.images).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(method(batch).loss, loss)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_multilabel_targets_are_the_highest_probability_of_the_crops_cells(activation):
    method, batch = build(), make_batch(logit_map(activation))
    cells = batch.label_map.values
    cells = cells.softmax(1) if activation == "softmax" else cells.sigmoid()
    targets = method.targets(batch)
    torch.testing.assert_close(targets[0], cells[0].amax((1, 2)))
    # The upper right quarter of 4 x 6 cells: RoIAlign's points reach half a cell beyond neither border.
    torch.testing.assert_close(targets[1], cells[1, :, :2, 3:].amax((1, 2)))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(method.eval().predict(batch.images), targets)
    torch.testing.assert_close(method(batch).loss, loss * NUM_CLASSES)


def test_mean_logit_of_a_sigmoid_teacher_is_activated_after_pooling():
    method, batch = build(operator="mean_logit"), make_batch(logit_map("sigmoid"))
    torch.testing.assert_close(
        method.targets(batch), pool_label_map(batch.label_map, batch.view, NUM_CLASSES).sigmoid()
    )


def test_gated_targets_keep_annotated_labels_that_the_view_shows():
    values = torch.full((1, NUM_CLASSES, 1, 4), -20.0)
    values[0, 0, 0, 0] = 20  # class 0 on the left
    values[0, 1, 0, 3] = 20  # class 1 on the right
    values[0, 2, 0, 2], values[0, 2, 0, 3] = math.log(0.25 / 0.75), math.log(0.9 / 0.1)  # class 2: weak where we look
    values[0, 3] = 20  # never annotated
    label_map = LabelMap(values, kind="logit")
    targets = torch.tensor([[1, 1, 1, 0, math.nan]])
    view = CropBox(torch.tensor([[0.0, 0, 0.625, 1]]))
    batch = Batch(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), targets, torch.arange(1), view, label_map)
    found = build(target="gated").targets(batch)[0]
    assert found.tolist()[:2] == [1, 0]
    assert found[2].isnan()  # a share of 0.28 of its peak: between 0.1 and 0.5
    assert found[3] == 0
    assert found[4].isnan()


def test_a_gated_label_is_judged_by_its_own_peak():
    """A teacher that is never sure of a label still tells where it is: shares of 0.75, 0.2 and 0.8."""
    values = torch.zeros(1, NUM_CLASSES, 1, 4)
    values[0, 0, 0] = torch.tensor([0.3, 0.3, 0.1, 0.4])
    values[0, 1, 0] = torch.tensor([0.16, 0.16, 0.1, 0.8])
    values[0, 2, 0] = torch.tensor([0.04, 0.04, 0.01, 0.05])
    view = CropBox(torch.tensor([[0.0, 0, 0.5, 1]]))
    targets = torch.tensor([[1.0, 1, 1, 0, 0]])
    batch = Batch(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), targets, torch.arange(1), view, LabelMap(values))
    expected = torch.tensor([[1.0, math.nan, 1, 0, 0]])
    torch.testing.assert_close(build(target="gated").targets(batch), expected, equal_nan=True)


def test_oracle_targets_follow_the_visible_area():
    """Two maps a class: what objects cover, and what crowd regions cover."""
    cover, crowd = torch.zeros(1, NUM_CLASSES, 2, 4), torch.zeros(1, NUM_CLASSES, 2, 4)
    cover[0, 0, :, 0] = 1  # outside the view
    cover[0, 1, 0, 2] = 1  # inside
    cover[0, 2, 1, :] = 1  # a fifth of it inside: unknown
    crowd[0, 3, 0, 3] = 1  # crowd inside
    label_map = LabelMap(torch.cat([cover, crowd], 1), kind="probability")
    view = CropBox(torch.tensor([[0.5, 0.0, 1.0, 0.7]]))
    targets = torch.tensor([[1.0, 0, 1, 1, 0]])
    batch = Batch(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), targets, torch.arange(1), view, label_map)
    found = build(target="oracle").targets(batch)[0]
    assert found[[0, 1, 4]].tolist() == [0, 1, 0]
    assert found[2].isnan()
    assert found[3].isnan()


def test_fusion_with_the_annotation():
    batch = make_batch(logit_map())
    alone = build().targets(batch)
    convex = build(fusion="convex", annotation_weight=0.25).targets(batch)
    known = batch.targets.isfinite()
    torch.testing.assert_close(convex[known], 0.75 * alone[known] + 0.25 * batch.targets[known])
    torch.testing.assert_close(convex[~known], alone[~known])
    gate = build(fusion="gate").targets(batch)
    torch.testing.assert_close(gate, alone * batch.targets, equal_nan=True)
    softmax = build(target="softmax", fusion="convex").targets(batch)
    torch.testing.assert_close(softmax[0].sum(), torch.tensor(1.0))
    whole = build(target="softmax").targets(batch)
    gated = build(target="softmax", fusion="gate").targets(batch)
    present = batch.targets == 1
    assert present.any(1).sum() > 1
    for row in present.any(1).nonzero()[:, 0]:
        torch.testing.assert_close(gated[row, present[row]], whole[row, present[row]] / whole[row, present[row]].sum())
    assert (gated[batch.targets == 0] == 0).all()


def test_regions():
    batch = make_batch(logit_map())
    whole = CropBox(torch.tensor([[0.0, 0, 1, 1]]).expand(3, -1))
    expected = build().targets(Batch(batch.images, batch.targets, batch.index, whole, batch.label_map))
    assert torch.equal(build(region="image").targets(batch), expected)
    swapped = CropBox(BOXES[:, [1, 0, 3, 2]])
    expected = build().targets(Batch(batch.images, batch.targets, batch.index, swapped, batch.label_map))
    assert torch.equal(build(region="swapped").targets(batch), expected)
    assert not torch.equal(build().targets(batch), expected)


def test_zero_fill_is_the_published_one():
    values, ids = logit_map().values.topk(2, dim=1)
    label_map = LabelMap(values, ids, "logit", values[:, -1] - 9, groups=(NUM_CLASSES,))
    batch = make_batch(label_map)
    zero = LabelMap(values, ids, "logit", 0.0)
    expected = pool_label_map(zero, batch.view, NUM_CLASSES).softmax(1)
    torch.testing.assert_close(build(target="softmax", fill="zero").targets(batch), expected)


def test_the_highest_cell_under_a_zero_fill_is_that_of_a_stored_class():
    """A cell that stores (4, -1, -2): the others are worth -2, not 0, and the maximum is what the cell says."""
    values, ids = torch.tensor([4.0, -1, -2]).view(1, 3, 1, 1), torch.tensor([0, 1, 2]).view(1, 3, 1, 1)
    batch = make_batch(LabelMap(values.repeat(3, 1, 1, 1), ids.repeat(3, 1, 1, 1), "logit", -9.0, groups=(5,)))
    expected = torch.tensor([[4.0, -1, -2, -2, -2]]).softmax(1).repeat(3, 1)
    for operator in ("max", "top_q", "log_sum_exp"):
        torch.testing.assert_close(build(fill="zero", operator=operator).targets(batch), expected)
    published = torch.tensor([[4.0, -1, -2, 0, 0]]).softmax(1).repeat(3, 1)
    torch.testing.assert_close(build(fill="zero", operator="mean_probability").targets(batch), published)


# Mixing


@pytest.mark.parametrize("target", ["softmax", "multilabel", "gated"])
def test_cutmix_targets_are_what_the_mixed_view_shows(target):
    """Whole images and cells of a pixel, so that the composed map is exact. By softmax the mean over the composed map, else
    the highest of each image's visible part, united."""
    maps = LabelMap(3 * torch.randn(3, NUM_CLASSES, 64, 96, generator=torch.Generator().manual_seed(3)), kind="logit",
                    groups=(NUM_CLASSES,) if target == "softmax" else ())  # fmt: skip
    batch = make_batch(maps, torch.ones(3, NUM_CLASSES))
    batch.view = CropBox(torch.tensor([[0.0, 0, 1, 1]]).repeat(3, 1))
    x1, y1, x2, y2 = patch = (10, 20, 70, 44)
    mix = Mix(MixConfig(cutmix=1.0), 1 - 60 * 24 / (64 * 96), patch)
    found = build(target=target).targets(batch, mix)
    shown = torch.zeros(64, 96, dtype=torch.bool)
    shown[y1:y2, x1:x2] = True
    if target == "softmax":
        own, other = (maps.values[:, :, part].mean(2).softmax(1) for part in (~shown, shown))
        expected = mix.share * own + (1 - mix.share) * other.flip(0)
    else:
        own, other = (maps.values.sigmoid()[:, :, part].amax(2) for part in (~shown, shown))
        if target == "gated":
            peak = maps.values.sigmoid().amax((2, 3))
            own, other = (torch.where(v / peak >= 0.5, 1.0, torch.nan) for v in (own, other))
        expected = 1 - (1 - own) * (1 - other.flip(0))
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_an_annotated_label_that_the_map_shows_nowhere_is_unknown():
    batch = make_batch(LabelMap(torch.zeros(3, NUM_CLASSES, 4, 6)), torch.tensor([[1.0, 0, 0, 0, 0]] * 3))
    targets = build(target="gated").targets(batch)
    assert targets[:, 0].isnan().all()
    assert (targets[:, 1:] == 0).all()


@pytest.mark.parametrize("target", ["softmax", "multilabel", "gated"])
def test_a_step_in_half_precision_takes_maps_of_the_best_classes(target):
    values, ids = logit_map().values.topk(2, dim=1)
    batch = make_batch(LabelMap(values.half(), ids.short(), "logit", values[:, -1] - 9, groups=(5,)))
    method = build(target=target)
    with torch.autocast("cpu", torch.bfloat16):
        method(batch).loss.backward()
        found = method.targets(batch)
    torch.testing.assert_close(found, method.targets(batch), rtol=0, atol=0, equal_nan=True)


def test_a_mixed_step_uses_mixed_images_and_targets(monkeypatch):
    method, batch = build(mix=MixConfig(cutmix=1.0)), make_batch(logit_map("sigmoid"))
    seen = []
    monkeypatch.setattr(method, "predict", lambda images: seen.append(images) or torch.zeros(3, NUM_CLASSES))
    monkeypatch.setattr(method, "loss", lambda logits, targets: seen.append(targets) or logits.sum())
    torch.manual_seed(4)
    method(batch)
    assert not torch.equal(seen[1], method.targets(batch))
    changed = (seen[0] != batch.images).any(1)
    assert changed.any()
    assert torch.equal(seen[0][changed.unsqueeze(1).expand_as(seen[0])],
                       batch.images.flip(0)[changed.unsqueeze(1).expand_as(seen[0])])  # fmt: skip


def test_mixing_stops_at_its_epoch():
    method, batch = build(mix=MixConfig(mixup=1.0, until_epoch=2)), make_batch(logit_map())
    losses = []
    for epoch in (1, 2):
        method.epoch = epoch
        method.eval()
        torch.manual_seed(1)
        losses.append(method(batch).loss.item())
    plain = build().eval()
    plain.load_state_dict(method.state_dict())
    assert losses[1] == pytest.approx(plain(batch).loss.item())
    assert losses[0] != pytest.approx(losses[1])


# The model


def test_only_training_knows_of_label_maps():
    method, batch = build().eval(), make_batch(logit_map())
    assert method.needs_label_map
    logits = method.predict(batch.images)
    np.testing.assert_allclose(method.space.scores(logits).detach(), logits.detach().sigmoid())
    assert build(target="softmax").space.groups == (NUM_CLASSES,)
    output = method(batch)
    output.loss.backward()
    assert all(p.grad is not None for p in method.parameters())
    assert all(not value.requires_grad for value in output.logs.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "hard"}, "method.target: expected one of softmax, multilabel, gated, oracle, got 'hard'"),
        ({"operator": "sum"}, "method.operator: expected one of mean_logit"),
        ({"fusion": "both"}, "method.fusion: expected one of none, convex, gate"),
        ({"target": "gated", "fusion": "gate"}, "method.fusion: target=gated takes the annotation in already"),
        ({"temperature": 0.0}, "method.temperature: expected more than 0, got 0.0"),
        ({"gate_low": 0.6}, "method.gate_low: expected 0 or more and below gate_high"),
        ({"calibration": "peak"}, "method.calibration: expected one of relative_to_peak, or nothing, got 'peak'"),
        ({"region": "yx"}, "method.region: expected one of crop, image, swapped"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("options", "label_map", "message"),
    [
        ({}, LabelMap(torch.ones(1, 5, 4, 6), kind="attribution"), "attribution is no probability; name a calibration"),
        ({"target": "softmax"}, LabelMap(torch.ones(1, 5, 4, 6), kind="mass"), "mean_logit of a map of mass"),
        ({"fill": "zero"}, LabelMap(torch.ones(1, 5, 4, 6)), "method.fill: zero is a logit, the .* kind probability"),
        ({"target": "oracle"}, logit_map(), "oracle"),
        ({}, LabelMap(torch.ones(1, 10, 4, 6)), "label maps of 10 classes, expected 5"),
    ],
)
def test_maps_that_cannot_be_learnt_from_are_refused_before_the_first_step(options, label_map, message):
    with pytest.raises(InputError, match=message):
        build(**options).check_label_map(label_map)
    build().check_label_map(logit_map())


def test_a_named_calibration_makes_targets_of_attributions():
    values = torch.zeros(3, NUM_CLASSES, 4, 6)
    values[:, 1, 3, 5], values[:, 2, 0, 0], values[:, 3] = 8, 2, -4
    batch = make_batch(LabelMap(values, kind="attribution"))
    targets = build(calibration="relative_to_peak").targets(batch)
    assert targets[0].tolist() == [0, 1, 1, 0, 0]
    assert targets[1, 1] == targets[1, 2] == 0  # the upper right quarter shows neither


def test_targets_of_groups_are_a_distribution_in_each():
    """A board of two groups, of two classes and of three, and the annotation in a tenth of the targets."""
    space = LabelSpace(tuple("abcde"), exclusive=(2, 3))
    classifier = build_classifier(BackboneConfig("test_resnet"), LinearHeadConfig(), NUM_CLASSES, image_size=(64, 96))
    config = RelabelConfig(target="softmax", fusion="convex", annotation_weight=0.1)
    method, label_map = config.build(Context(space), classifier), replace(logit_map(), groups=(2, 3))
    batch = make_batch(label_map, torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 1], [1, 0, 1, 0, 0]]))
    pooled = pool_label_map(label_map, batch.view, NUM_CLASSES)
    shares = torch.cat([pooled[:, :2].softmax(1), pooled[:, 2:].softmax(1)], 1)
    targets = method.targets(batch)
    torch.testing.assert_close(targets, 0.9 * shares + 0.1 * batch.targets)
    logits = method.eval().predict(batch.images)
    log_p = torch.cat([logits[:, :2].log_softmax(1), logits[:, 2:].log_softmax(1)], 1)
    torch.testing.assert_close(method(batch).loss, -(targets * log_p).sum(1).mean())
