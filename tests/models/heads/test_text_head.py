"""The head that compares images with the names of labels."""

import logging
import math

import pytest
import timm
import torch
from torch.nn.functional import cosine_similarity

from mlvision.errors import InputError
from mlvision.models import BackboneConfig, TextHead, TextHeadConfig, build_classifier, build_head
from mlvision.models.text import TextConfig
from mlvision.models.weights import load_state
from mlvision.types import Features

LABELS = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))


def features(width=6, map_width=6, grid=(2, 5)) -> Features:
    noise = torch.Generator().manual_seed(1)
    return Features(torch.randn(4, map_width, *grid, generator=noise), torch.randn(4, width, generator=noise))


def build(map_features=None, **options) -> TextHead:
    torch.manual_seed(0)
    head = TextHead(6, 3, TextHeadConfig(**options), map_features, label_embeddings=LABELS)
    torch.nn.init.normal_(head.project.weight)
    return head.eval()


def test_logits_are_scaled_cosines_of_image_and_label():
    head, given = build(scale=7.0), features()
    head.bias.data.fill_(-0.5)
    image = given.pooled @ head.project.weight.T  # the adapter's last layer starts at zero
    expected = 7 * cosine_similarity(image[:, None], LABELS[None], dim=-1) - 0.5
    torch.testing.assert_close(head(given).logits, expected)
    for linear in (head.adapter[0], head.adapter[2]):
        torch.nn.init.normal_(linear.weight)
    adapted = build(scale=7.0, adapter_ratio=0.3)
    adapted.load_state_dict(head.state_dict())
    image = image + 0.3 * head.adapter(image)
    expected = 7 * cosine_similarity(image[:, None], LABELS[None], dim=-1) - 0.5
    torch.testing.assert_close(adapted(given).logits, expected)


def test_the_maps_are_the_way_back_from_a_label_to_the_cells():
    head, given = build(tau=0.2), features()
    given.map.zero_()[:, :, 0, 3] = LABELS[1] @ head.project.weight  # towards label 1, off the diagonal
    maps = head(given).maps
    assert maps.shape == (4, 3, 2, 5)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(4, 3))
    assert all(divmod(place, 5) == (0, 3) for place in maps[:, 1].flatten(1).argmax(1).tolist())
    patch = head.project.weight @ given.map[0, :, 0, 3]
    near = torch.zeros(10)
    near[3] = cosine_similarity(patch, LABELS[1], dim=0) / 0.2
    torch.testing.assert_close(maps[0, 1].flatten(), near.softmax(0))


def test_regions_are_the_patches_under_the_maps():
    head, given = build(region_share=1.0), features()
    output = head(given)
    patches = given.map.flatten(2).mT @ head.project.weight.T
    regions = torch.einsum("bcn,bnd->bcd", output.maps.flatten(2), patches)
    torch.testing.assert_close(output.logits, 10 * cosine_similarity(regions, LABELS[None], dim=-1))
    half, none = (build(region_share=share)(given).logits for share in (0.5, 0.0))
    torch.testing.assert_close(half, (output.logits + none) / 2)


def test_a_map_of_another_width_has_a_projection_of_its_own():
    head = build(map_features=9)
    assert head.project_cells.weight.shape == (8, 9)
    assert head(features(map_width=9)).maps.shape == (4, 3, 2, 5)


def test_a_label_that_is_added_starts_at_the_mean_bias_of_the_others():
    head, given = build(), features()
    head.start_at(torch.tensor([-4.0, 1.0, 0.0]))
    before = head(given)
    head.add_labels(torch.cat([head.label_embeddings, LABELS[:1]]))
    after = head(given)
    assert head.num_classes == 4
    torch.testing.assert_close(after.logits[:, :3], before.logits)  # a wider product may round otherwise
    torch.testing.assert_close(after.logits[:, 3], before.logits[:, 0] + 3)  # the same name, at -1 instead of -4


def test_learnt_labels_are_trained_and_named_ones_are_not():
    learnt = build(text=TextConfig(encoder="learned"), region_share=0.5)
    learnt(features()).logits.square().sum().backward()
    assert learnt.label_embeddings.grad.abs().sum() > 0
    assert learnt.log_tau.grad.abs() > 0
    named = build()
    assert "label_embeddings" in named.state_dict()
    assert "label_embeddings" not in dict(named.named_parameters())
    assert not named.log_tau.requires_grad  # nothing that is trained depends on the maps


def test_it_computes_in_float32_under_autocast():
    head, given = build(region_share=0.5), features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(given)
    assert torch.equal(inside.logits, head(given).logits)
    rounded = head(Features(given.map.bfloat16(), given.pooled.bfloat16()))
    assert rounded.logits.dtype == torch.float32
    torch.testing.assert_close(rounded.logits, head(given).logits, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"region_share": 1.5}, "head.region_share: expected 0 to 1"),
        ({"tau": 0.0}, "head.tau: expected 0.01 to 1.0"),
        ({"scale": 0.0}, "head.scale: expected more than 0"),
        ({"adapter_ratio": -1.0}, "head.adapter_ratio: expected 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_embeddings_of_other_labels_are_refused():
    with pytest.raises(InputError, match="label embeddings of 3 labels: expected 4"):
        TextHead(6, 4, TextHeadConfig(), label_embeddings=LABELS)
    with pytest.raises(InputError, match="label_embeddings: a text head compares with them"):
        build_head("text", 6, 3)
    assert torch.equal(build_head("text", 6, 3, label_embeddings=LABELS).label_embeddings, LABELS)


def test_what_it_was_built_from_is_stored_for_its_class_names(tmp_path):
    (tmp_path / "words.txt").write_text("cat 1 0 0\ndog 0 2 0\nboat 0 0 3\nowl 0 3 4\n")
    config = TextHeadConfig(text=TextConfig("vectors", str(tmp_path / "words.txt")))
    classes = ("dog", "boat")
    assets = config.make_assets(classes)
    head = config.build(6, 2, None, assets)
    head.save_assets(tmp_path, classes)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".txt"] == list(config.asset_files)
    loaded = config.load_assets(tmp_path, classes)["label_embeddings"]
    assert torch.equal(loaded, torch.tensor([[0.0, 1, 0], [0, 0, 1]]))
    assert torch.equal(loaded, head.label_embeddings)
    with pytest.raises(InputError, match="class 0 is 'dog' there, expected 'boat'"):
        config.load_assets(tmp_path, ("boat", "dog"))
    head.add_classes(classes, ("owl",))
    torch.testing.assert_close(head.label_embeddings, torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 0.6, 0.8]]))
    assert head(features()).logits.shape == (4, 3)


def test_tau_stays_in_its_range():
    head = build()
    for value, expected in ((1e-6, 0.01), (0.3, 0.3), (50.0, 1.0)):
        head.log_tau.data.fill_(math.log(value))
        assert head.tau.item() == pytest.approx(expected)


def test_clip_towers_start_as_zero_shot_clip():
    """timm's image tower with CLIP's projection, beside open_clip's text tower: the cosines are open_clip's own."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-32").eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        labels = clip.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a cat", "a fire hydrant", "a boat"]))
        expected = cosine_similarity(clip.encode_image(images)[:, None], labels, dim=2)
    backbone = BackboneConfig("vit_base_patch32_clip_224")
    classifier = build_classifier(
        backbone, TextHeadConfig(), 3, image_size=224, assets={"label_embeddings": labels}
    ).eval()
    head = classifier.head
    assert isinstance(head, TextHead)
    report = load_state(classifier.backbone.model, clip.state_dict(), "clip", head.project)
    assert report.classifier == "its projection to width 512 is loaded"
    with torch.no_grad():
        cosines = (classifier(images).logits - head.bias) / head.log_scale.exp()
    torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("encoder", "bias", "said"),
    [
        ("open_clip", 0.0, "its projection to width 12 is loaded"),
        ("open_clip", 1.0, "it has 12 classes and a bias, the head's projection has none"),
        ("sentence_transformers", 0.0, "its classifier of 12 classes is left out"),
    ],
)
def test_a_linear_layer_goes_into_the_projection_only_if_it_is_one_of_clip(tmp_path, caplog, encoder, bias, said):
    state = timm.create_model("test_vit", num_classes=12, img_size=64).state_dict()
    state |= {"head.weight": torch.full((12, 64), 7.0), "head.bias": torch.full((12,), bias)}
    torch.save(state, tmp_path / "weights.pth")
    text = TextConfig("open_clip", "ViT-B-32", "a tag") if encoder == "open_clip" else TextConfig(encoder)
    backbone = BackboneConfig("test_vit", checkpoint=str(tmp_path / "weights.pth"))
    with caplog.at_level(logging.INFO):
        classifier = build_classifier(
            backbone, TextHeadConfig(text=text), 3, image_size=64, assets={"label_embeddings": torch.randn(3, 12)}
        )
    assert said in caplog.text
    assert bool((classifier.head.project.weight == 7).all()) == ("loaded" in said)
