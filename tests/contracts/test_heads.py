"""What every head of HEADS keeps. Of waiting for a GPU: engine/test_waits.py."""

import pytest
import torch

from mlvision.errors import InputError
from mlvision.models import HEADS, BackboneConfig, JointHead, build_classifier
from mlvision.models.text import TextConfig
from mlvision.types import Features

CLASSES = ("dog", "boat", "owl")
SMALL = {"width": 16, "feedforward": 16, "num_heads": 2}


@pytest.fixture
def config(name, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("dog 1 0 0\nboat 0 2 0\nowl 0 3 4\ncat 0 1 1\n")
    options = {"ml_decoder": SMALL, "query2label": SMALL, "text": {"text": TextConfig("vectors", str(words))}}
    return HEADS[name](**options.get(name, {}))


@pytest.mark.parametrize("name", HEADS)
def test_it_is_built_anew_from_what_it_stored(name, config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    features = Features(torch.randn(2, 8, 3, 5), torch.randn(2, 8))
    head = config.build(8, 3, None, config.make_assets(CLASSES)).eval()
    head.save_assets(folder, CLASSES)
    assert sorted(path.name for path in folder.iterdir()) == sorted(config.asset_files)
    again = config.build(8, 3, None, config.load_assets(folder, CLASSES)).eval()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(features).logits, head(features).logits)


@pytest.mark.parametrize("name", HEADS)
def test_what_it_offers_is_its_own(name, config):
    head = config.build(8, 3, None, config.make_assets(CLASSES))
    assert (head.num_classes, head.pretrained) == (3, False)
    assert head.classifier_layer is None or head.classifier_layer in list(head.modules())
    maps = head(Features(torch.randn(2, 8, 3, 5), torch.randn(2, 8))).maps
    assert (head.map_kind is None) == (maps is None)


@pytest.mark.parametrize("name", HEADS)
def test_it_takes_further_classes_by_name_or_says_that_it_cannot(name, config):
    features = Features(torch.randn(2, 8, 3, 5), torch.randn(2, 8))
    head = config.build(8, 3, None, config.make_assets(CLASSES)).eval()
    before = head(features).logits
    if isinstance(head, JointHead):
        head.add_classes(CLASSES, ["cat"])
        assert head.num_classes == 4
        torch.testing.assert_close(head(features).logits[:, :3], before)
    else:
        with pytest.raises(InputError, match=f"{type(head).__name__} has its own 3 classes only"):
            head.add_classes(CLASSES, ["cat"])


@pytest.mark.parametrize(
    ("backbone", "image_size"),
    [
        ("resnet10t", (64, 96)),
        ("vit_tiny_patch16_224", (48, 80)),
        ("convnext_atto", (64, 96)),
        ("mobilenetv3_small_050", (64, 96)),  # its map is narrower than its pooled features
    ],
)
@pytest.mark.parametrize("name", HEADS)
def test_every_head_fits_every_kind_of_backbone(name, backbone, image_size):
    torch.manual_seed(0)
    assets = {"label_embeddings": torch.randn(5, 16)}
    classifier = build_classifier(
        BackboneConfig(backbone), HEADS[name](), 5, image_size=image_size, assets=assets
    ).eval()
    with torch.no_grad():
        output = classifier(torch.randn(2, 3, *image_size))
    assert output.logits.shape == (2, 5)
    assert output.logits.isfinite().all()
    assert (output.logits[0] != output.logits[1]).any()
    if output.maps is not None:
        assert output.maps.shape == (2, 5, *classifier.backbone.grid)
        assert output.maps.isfinite().all()


@pytest.mark.parametrize("num_classes", [3, 1])
@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_finite_and_reach_the_features(name, config, num_classes):
    head = config.build(8, num_classes, None, config.make_assets(CLASSES[:num_classes])).train()
    noise = torch.Generator().manual_seed(0)
    cells = torch.randn(4, 8, 3, 5, generator=noise, requires_grad=True)
    pooled = cells.mean((2, 3)) + torch.randn(4, 8, generator=noise)
    logits = head(Features(cells, pooled)).logits
    assert logits.shape == (4, num_classes)
    weights = torch.randn(logits.shape, generator=noise)
    (weights * logits).sum().backward()
    assert cells.grad.isfinite().all()
    assert cells.grad.abs().sum() > 0
    trained = [p for p in head.parameters() if p.grad is not None]
    assert all(p.grad.isfinite().all() for p in trained)
    assert any(p.grad.any() for p in trained)


@pytest.mark.parametrize("name", HEADS)
def test_each_image_is_classified_by_itself_and_the_same_again(name, config):
    head = config.build(8, 3, None, config.make_assets(CLASSES)).eval()
    features = Features(torch.randn(4, 8, 3, 5), torch.randn(4, 8))
    with torch.no_grad():
        logits = head(features).logits
        assert torch.equal(head(features).logits, logits)
        alone = head(Features(features.map[2:3], features.pooled[2:3])).logits
    torch.testing.assert_close(alone, logits[2:3], rtol=1e-4, atol=1e-5)
    assert (logits[0] != logits[1]).any()


@pytest.mark.parametrize("name", HEADS)
def test_it_starts_where_it_is_told(name, config):
    """A feature of zero gives the logits of `start_at`, up to what a head's own start adds."""
    head = config.build(8, 3, None, config.make_assets(CLASSES)).eval()
    nothing = Features(torch.zeros(1, 8, 3, 5), torch.zeros(1, 8))
    with torch.no_grad():
        head.start_at(torch.zeros(3))
        before = head(nothing).logits
        head.start_at(torch.tensor([-3.0, 0.5, 2.0]))
        torch.testing.assert_close(head(nothing).logits - before, torch.tensor([[-3.0, 0.5, 2.0]]))
