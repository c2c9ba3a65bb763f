"""The door of the room: which labels, which objects, what is refused, and that the model stays as it was."""

import numpy as np
import pytest
import timm
import torch
from factories import build_method

from mlvision.errors import InputError
from mlvision.explain import StoredMaps, build_explainer, explain
from mlvision.explain.selection import Selection, from_mask, outcomes, parse_labels, select
from mlvision.label_maps import LabelMapStore
from mlvision.label_maps.store import LabelMapWriter, StoreMeta
from mlvision.methods import BaselineConfig
from mlvision.models import BackboneConfig, LinearHeadConfig, build_classifier
from mlvision.space import LabelSpace
from mlvision.types import LabelMap

LOGITS = torch.tensor([[2.0, -1.0, 0.5, -3.0], [-1.0, -2.0, 3.0, 0.2]])
TARGETS = torch.tensor([[1.0, 1.0, 0.0, torch.nan], [0.0, 0.0, 1.0, 1.0]])
CLASSES = ("ship", "plane", "car", "tree")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("all", [[0, 1, 2, 3], [0, 1, 2, 3]]),
        ("predicted", [[0, 2], [2, 3]]),
        ("ground_truth", [[0, 1], [2, 3]]),
        ("errors", [[1, 2], [-1, -1]]),  # plane is missed, car is wrong; tree is unknown
        ("relevant", [[0, 1, 2], [2, 3, -1]]),
        ("top2", [[0, 2], [2, 3]]),
        ([3, "plane"], [[3, 1], [3, 1]]),
        ([["car"], [1, "tree"]], [[2, -1], [1, 3]]),
        (torch.tensor([[3, -1], [0, 1]]), [[3, -1], [0, 1]]),
    ],
)
def test_labels_are_chosen(labels, expected):
    chosen = select(labels, LOGITS, targets=TARGETS, classes=CLASSES)
    assert chosen.labels.tolist() == expected
    assert chosen.against is None


def test_thresholds_may_differ_by_class_and_scores_follow_the_space():
    space = LabelSpace.of(None, 4)
    each = torch.tensor([0.9, 0.5, 0.5, 0.5])  # sigmoid(2) = 0.88
    assert select("predicted", LOGITS, threshold=each).labels.tolist() == [[2, -1], [2, 3]]
    assert select("predicted", LOGITS, space=space.with_softmax()).labels.tolist() == [[0], [2]]  # 0.78 and 0.92 alone
    board = LabelSpace(CLASSES, exclusive=(2, 2))
    assert select("predicted", LOGITS, threshold=0.99, space=board).labels.tolist() == [[0, 2], [0, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.7, torch.tensor([0.7, 0.3], dtype=torch.float64)])
def test_a_score_at_its_threshold_is_predicted_in_every_precision(dtype, threshold):
    scores = torch.tensor([[0.7, 0.29]], dtype=dtype)
    assert outcomes(LabelSpace.of(None, 2).decide(scores, threshold), torch.ones(1, 2)).tolist() == [[0, 2]]
    logits = torch.tensor([[0.7, 0.29]], dtype=torch.float64).logit().to(dtype)
    at = logits.sigmoid().double()[0]  # what the logits' own precision makes of 0.7 and 0.29
    assert select("predicted", logits, threshold=at).labels.tolist() == [[0, 1]]


def test_a_contrast_is_the_difference_of_two_logits():
    chosen = select([("ship", "car"), "tree"], LOGITS, classes=CLASSES)
    torch.testing.assert_close(chosen.scores(LOGITS), torch.tensor([[1.5, -3.0], [-4.0, 0.2]]))
    assert chosen.directions(4)[0].tolist() == [[1, 0, -1, 0], [0, 0, 0, 1]]


def test_one_index_is_for_every_image():
    for label in (2, np.int64(2), np.uint8(2)):
        assert select(label, LOGITS).labels.tolist() == [[2], [2]]


def test_directions_and_scores_agree():
    chosen = select([[0, (1, 2)], [3]], LOGITS)
    by_direction = torch.einsum("blc,bc->bl", chosen.directions(4), LOGITS)
    torch.testing.assert_close(chosen.scores(LOGITS), by_direction)
    assert by_direction[1, 1] == 0  # an empty place


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["shpi"], "no class 'shpi'; nearest: ship"),
        ([4], "expected 0 to 3, got 4"),
        ([-1], "expected 0 to 3"),
        ("top9", "top1 to top4"),
        ("eror", "nearest: errors"),
        ([[0], [1], [2]], "one for each of 2 images"),
        ([[0], 1], "one for each of 2 images"),
        (torch.tensor([[0.5], [1.0]]), "class indices"),
        (torch.tensor([[0]]), "class indices"),
        (torch.tensor([[0], [7]]), "7 is beyond the 4 classes"),
        (Selection(torch.tensor([[0], [7]])), "7 is beyond the 4 classes"),
        (torch.tensor([[True, False], [True, True]]), "class indices"),
        ([(0, 1, 2)], "a contrast is a pair"),
        ("ship", r"'ship' is a class; a list explains it: \['ship'\]"),
        (4, "expected 0 to 3, got 4"),
        ([True], "expected 0 to 3, got True"),
        (np.array([0.5, 1.0]), "expected 0 to 3, got 0.5"),
        ([], "nothing to explain"),
        (torch.full((2, 1), -1), "nothing to explain"),
    ],
)
def test_labels_that_do_not_exist_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        select(labels, LOGITS, classes=CLASSES)


def test_a_misspelt_rule_is_told_from_a_misspelt_class():
    with pytest.raises(InputError, match="no class 'predictd'; did you mean the rule predicted"):
        parse_labels(["predictd"], ["pencil", "alembic"])
    with pytest.raises(InputError, match="no class 'pencl'; nearest: pencil"):
        parse_labels(["pencl"], ["pencil", "alembic"])


RULES = ["all", "predicted", "ground_truth", "errors", "relevant", "top3"]


@pytest.mark.parametrize("rule", RULES)
def test_a_class_that_is_called_like_a_rule_can_be_reached(rule, caplog):
    classes = ["ship", rule, "car", "tree"]
    with caplog.at_level("WARNING", logger="mlvision"):
        assert parse_labels([rule], classes) == rule
    assert f"'{rule}' is taken as the rule; the class of that name is class:{rule}" in caplog.text
    assert parse_labels([f"class:{rule}"], classes) == [rule]
    assert parse_labels([rule, "ship"], classes) == [rule, "ship"]
    assert parse_labels([f"ship - {rule}"], classes) == [("ship", rule)]
    assert select([rule], LOGITS, classes=classes).labels.tolist() == [[1], [1]]
    caplog.clear()
    assert parse_labels([rule], CLASSES) == rule
    assert not caplog.text
    with pytest.raises(InputError, match=f"'{rule}' stands alone"):
        parse_labels([rule, "ship"], CLASSES)


def test_the_prefix_of_a_class_may_be_part_of_its_name():
    assert parse_labels(["class:all"], ["class:all", "all"]) == ["class:all"]
    assert parse_labels(["class:ship"], CLASSES) == ["ship"]
    with pytest.raises(InputError, match="no class 'shp'; nearest: ship"):
        parse_labels(["class:shp"], CLASSES)


def test_ground_truth_needs_targets():
    with pytest.raises(InputError, match="ground_truth needs the images' labels"):
        select("ground_truth", LOGITS)
    with pytest.raises(InputError, match="names were not given"):
        select(["ship"], LOGITS)


def test_outcomes_are_by_hand():
    scores = torch.tensor([[0.9, 0.9, 0.1, 0.1, 0.9]])
    targets = torch.tensor([[1.0, 0.0, 1.0, 0.0, torch.nan]])
    assert outcomes(scores >= 0.5, targets).tolist() == [[0, 1, 2, 3, -1]]


def test_labels_of_a_mask_keep_the_order_of_the_classes():
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])
    assert from_mask(mask).labels.tolist() == [[1, 2], [-1, -1], [0, 2]]


# Layouts of label maps


def test_whole_maps_of_labels_from_every_layout():
    noise = torch.Generator().manual_seed(0)
    dense = torch.rand(2, 4, 2, 3, generator=noise)
    labels = torch.tensor([[3, 0], [1, -1]])
    expected = torch.stack([dense[0, [3, 0]], dense[1, [1, 0]]])
    found = LabelMap(dense).of_labels(labels)
    torch.testing.assert_close(found, expected)
    every = LabelMap(dense[:, [2, 1, 3, 0]], torch.tensor([[2, 1, 3, 0]] * 2))
    torch.testing.assert_close(every.of_labels(labels)[0], expected[0])
    values, ids = dense.topk(4, dim=1)
    torch.testing.assert_close(LabelMap(values, ids).of_labels(labels)[0], expected[0])


def test_what_is_not_stored_is_the_fill():
    values = torch.tensor([[[[5.0, 6.0]]]])
    label_map = LabelMap(values, torch.tensor([[[[2, 0]]]]), "logit", torch.tensor([[[-1.0, -2.0]]]))
    assert label_map.of_labels(torch.tensor([[2, 1]])).tolist() == [[[[5.0, -2.0]], [[-1.0, -2.0]]]]


# Whatever makes label maps


class Corner:
    """Hot in the top right cell, for label 1 alone."""

    def maps(self, model, images, indices=None):
        values = torch.zeros(len(images), 1, 2, 3)
        values[:, 0, 0, 2] = 7
        return LabelMap(values, torch.ones(len(images), 1, dtype=torch.long), "probability", fill=0.25)


def test_any_producer_is_an_explainer(linear_model):
    found = explain(linear_model, torch.rand(2, 3, 12, 18), Corner(), labels=[1, 0])
    assert found.maps[1, 0].tolist() == [[0, 0, 7], [0, 0, 0]]
    assert found.maps[1, 1].unique().tolist() == [0.25]
    assert found.flat.tolist() == [[False, True]] * 2
    assert (found.method, found.kind) == ("Corner", "probability")


def test_contrasts_of_a_producer_are_differences(linear_model):
    found = explain(linear_model, torch.rand(2, 3, 12, 18), Corner(), labels=[(1, 0)])
    assert found.maps[0, 0].tolist() == [[-0.25, -0.25, 6.75], [-0.25, -0.25, -0.25]]


def test_stored_maps_need_indices_and_follow_them(tmp_path, linear_model):
    maps = torch.arange(3 * 4 * 2 * 3).reshape(3, 4, 2, 3).float() / 72
    meta = StoreMeta("r", 3, "c", 4, "t", "w", (2, 3), "probability", (), 0, 3)
    writer = LabelMapWriter.create_or_resume(tmp_path / "store", meta)
    writer.write(range(3), maps)
    stored = StoredMaps(LabelMapStore.open(tmp_path / "store"))
    images = torch.rand(2, 3, 12, 18)
    found = explain(linear_model, images, stored, labels=[2], indices=torch.tensor([2, 0]))
    np.testing.assert_allclose(found.maps[:, 0], maps[[2, 0], 2], atol=1e-3)
    with pytest.raises(InputError, match="indices="):
        explain(linear_model, images, stored, labels=[2])


def test_maps_of_a_part_of_the_images_are_refused(linear_model):
    class Part:
        def maps(self, model, images, indices=None):
            return LabelMap(torch.rand(2, 4, 2, 3), extent=torch.tensor([[0.1, 0, 0.9, 1]] * 2))

    with pytest.raises(InputError, match="cover a part"):
        explain(linear_model, torch.rand(2, 3, 12, 18), Part())


def test_the_dense_head_of_a_pooled_classifier_is_its_cam(images):
    classifier = build_classifier(BackboneConfig("resnet10t"), LinearHeadConfig(), 5, image_size=(48, 80))
    method = build_method(BaselineConfig(), classifier).eval()
    torch.nn.init.normal_(classifier.head.linear.weight, generator=torch.Generator().manual_seed(0))
    dense, cam = (explain(method, images, name).maps for name in ("dense_head", "grad_cam"))
    cells = dense.shape[2] * dense.shape[3]
    torch.testing.assert_close(dense, cam * cells, rtol=1e-4, atol=1e-4)  # the bias is 0


# What is refused


class Constant(torch.nn.Module):
    def forward(self, images):
        return images.new_ones(len(images), 3)


def test_flat_maps_are_refused_not_returned():
    with pytest.raises(InputError, match="flat; they explain nothing"):
        explain(Constant(), torch.rand(2, 3, 16, 16), "occlusion")
    kept = explain(Constant(), torch.rand(2, 3, 16, 16), "occlusion", allow_flat=True)
    assert kept.flat.all()


@pytest.mark.parametrize("name", ["occlusion", "coarse_to_fine", "lime", "kernel_shap", "rise"])
def test_the_rounding_of_a_uniform_image_is_no_evidence(name, resnet):
    with pytest.raises(InputError, match="flat; they explain nothing"):
        explain(resnet, torch.full((1, 3, 48, 80), 0.3), name)


def test_images_that_are_no_images_are_refused(resnet, images):
    with pytest.raises(InputError, match="float in \\[0, 1\\]"):
        explain(resnet, images * 255)
    with pytest.raises(InputError, match="float in \\[0, 1\\]|not finite"):
        explain(resnet, images.clone().index_fill_(3, torch.tensor([3]), torch.nan))


def test_the_first_image_may_have_no_label(images):
    """ConvNeXt normalises after pooling: the closed form is wrong for it, and must not be taken unseen."""
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=3).eval()
    both = explain(model, images, labels=[[], [0]])
    alone = explain(model, images[1:], labels=[0])
    torch.testing.assert_close(both.maps[1], alone.maps[0], rtol=1e-4, atol=1e-5 * alone.maps.abs().max().item())


def test_under_inference_mode_gradients_are_still_there(resnet, images):
    expected = explain(resnet, images).maps
    with torch.inference_mode():
        torch.testing.assert_close(explain(resnet, images.clone()).maps, expected)
        explain(resnet, images.clone(), "saliency", labels=[0])


def test_networks_that_have_no_map_can_still_be_occluded():
    model, image = timm.create_model("crossvit_tiny_240", num_classes=4).eval(), torch.rand(1, 3, 240, 240)
    assert explain(model, image, "occlusion", window_px=120, stride_px=120).maps.shape == (1, 4, 2, 2)
    with pytest.raises(
        InputError, match="crossvit_tiny_240 gives no spatial map .* several tensors.*; name the module"
    ):
        explain(model, image)


def test_maps_of_contrasts_and_of_logits_say_what_they_are(images):
    model = timm.create_model("resnet10t", num_classes=4).eval()
    dense = explain(model, images, "dense_head", labels=[1]).as_label_map()
    assert (dense.kind, dense.groups) == ("logit", (1, 1, 1, 1))
    assert (
        dense.as_kind("probability").of_labels(torch.tensor([[2], [1]]))[0].max() == 0
    )  # not explained, so worth nothing
    assert explain(model, images, "dense_head", labels=[(1, 0)]).kind == "attribution"


def test_unknown_methods_and_options_are_named(linear_model):
    with pytest.raises(InputError, match="grad_cam"):
        explain(linear_model, torch.rand(1, 3, 12, 18), "gradcam")
    with pytest.raises(InputError, match=r"occlusion.windw: no such option; did you mean occlusion.window_px\?"):
        explain(linear_model, torch.rand(1, 3, 12, 18), "occlusion", windw=3)
    with pytest.raises(InputError, match="centre.radius: no such option; expected one of cells$"):
        explain(linear_model, torch.rand(1, 3, 12, 18), "centre", radius=3)
    with pytest.raises(InputError, match="dense_head.radius: no such option; expected one of none$"):
        explain(linear_model, torch.rand(1, 3, 12, 18), "dense_head", radius=3)
    with pytest.raises(InputError, match="centre.method: no such option; expected one of cells$"):
        build_explainer("centre", **{"method": "edges"})
    with pytest.raises(InputError, match="maps\\(model, images, indices\\)"):
        explain(linear_model, torch.rand(1, 3, 12, 18), object())


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["grad_cam", "layer_cam", "occlusion", "lime"])
def test_half_precision_autocast_gives_nearly_the_same_maps(name, dtype, resnet, images):
    options = {"num_samples": 60} if name == "lime" else {}
    exact = explain(resnet, images, name, **options)
    with torch.autocast("cpu", dtype=dtype):
        half = explain(resnet, images, name, **options)
    assert half.maps.dtype == torch.float32
    assert np.corrcoef(exact.maps.flatten(), half.maps.flatten())[0, 1] > 0.98


def test_uint8_images_equal_floats(resnet):
    images = torch.randint(256, (1, 3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(explain(resnet, images).maps, explain(resnet, images.float() / 255).maps)
