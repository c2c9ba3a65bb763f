"""The hooks that every head of the table has."""

import pytest
import torch

from mlvision.errors import InputError
from mlvision.models import HEADS, JointHead
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
