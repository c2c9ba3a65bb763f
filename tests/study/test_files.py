"""Files of maps: what somebody needs who was given nothing else; and that no image is held on to."""

import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mlvision.data.manifest import Manifest
from mlvision.data.records import Boxes, Record
from mlvision.data.views import EvalView
from mlvision.errors import InputError
from mlvision.explain import Subject
from mlvision.study.batches import Asker, shown_areas
from mlvision.study.files import PAGE, refuse_flat, save_maps, save_pages
from mlvision.study.render import ExplainedImage, ShownMethod
from mlvision.types import Batch, CropBox

CLASSES = ["cat", "dog", "sun"]


def explained(number=0, maps=None):
    rng = np.random.default_rng(number)
    return ExplainedImage(
        f"set/{number}.jpg",
        photo=rng.integers(0, 255, (20, 30, 3), dtype=np.uint8),
        scores=np.array([0.9, 0.2, 0.6], np.float32),
        targets=np.array([1, 0, np.nan], np.float32),
        labels=np.array([2, -1, 0]),
        maps={"cam": rng.normal(size=(3, 2, 4)).astype(np.float32) if maps is None else maps},
        against=np.array([-1, -1, 1]),
        extent=(0.25, 0.0, 0.75, 1.0),
        kinds={"cam": "logit"},
    )


def test_a_file_holds_what_its_maps_mean(tmp_path):
    image = explained(maps=np.random.default_rng(1).normal(size=(3, 2, 4)).astype(np.float32) * 1e6)
    assert list(save_maps([image, explained(1)], tmp_path / "maps", CLASSES, {"cam": {"seed": 3}})) != []
    assert [path.name for path in sorted((tmp_path / "maps" / "cam").iterdir())] == ["00000.npz", "00001.npz"]
    found = np.load(tmp_path / "maps" / "cam" / "00000.npz")
    assert found["maps"].dtype == np.float16
    expected = image.maps["cam"][[0, 2]]  # without the empty place
    np.testing.assert_allclose(found["maps"] * found["scale"], expected, atol=np.abs(expected).max() * 2**-11)
    assert found["labels"].tolist() == [2, 0]
    assert found["against"].tolist() == [-1, 1]
    assert found["names"].tolist() == ["sun", "cat \u2212 dog"]
    assert found["classes"].tolist() == CLASSES
    assert found["scores"].tolist() == pytest.approx([0.9, 0.2, 0.6])
    assert np.isnan(found["logits"]).all()  # it was not told any
    assert str(found["kind"]) == "logit"
    assert str(found["key"]) == "set/0.jpg"
    assert found["extent"].tolist() == [0.25, 0, 0.75, 1]
    assert json.loads(str(found["about"])) == {"method": "cam", "seed": 3}


class Darkness(nn.Module):
    """One logit, of which whoever asks gets a map: how dark the image is in each cell of 8 x 8 pixels."""

    def forward(self, images):
        return 1 - images.mean((1, 2, 3))[:, None]


class DarkCells:
    label_specific = True

    def explain(self, subject, pixels, selection):
        return 1 - nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 8)


def test_the_extent_leads_back_to_the_place_in_the_full_image(tmp_path):
    """A dark spot at 58 to 66 across and 4 to 12 down of 100 x 40 pixels, whose centre part the model sees."""
    picture = np.full((40, 100, 3), 255, np.uint8)
    picture[4:12, 58:66] = 0
    Image.fromarray(picture).save(tmp_path / "spot.png")
    view = EvalView((32, 32), eval_resize="crop", crop_pct=0.8)(picture)
    assert view.box == pytest.approx((0.34, 0.1, 0.66, 0.9))  # 34 to 66 across, 4 to 36 down
    batch = Batch(
        view.image[None], torch.ones(1, 1), torch.zeros(1, dtype=torch.long), CropBox(torch.tensor([view.box]))
    )
    manifest = Manifest(("dark",), (Record("spot.png", str(tmp_path / "spot.png"), (0,)),), "test")
    asker = Asker(Subject(Darkness()), manifest, "all", 0.5)
    asked = asker.ask(batch)
    images, _ = asker.explain(asked, {"cells": DarkCells()}, seed=0)
    list(save_maps(images, tmp_path, manifest.classes, {"cells": {}}))
    # From here on with the file and the picture alone.
    found = np.load(tmp_path / "cells" / "00000.npz")
    x1, y1, x2, y2 = (found["extent"] * [100, 40, 100, 40]).round().astype(int)
    assert (images[0].photo == picture[y1:y2, x1:x2]).all()  # the photo's own pixels, in its own shape
    part = np.asarray(Image.fromarray(found["maps"][0].astype(np.float32)).resize((x2 - x1, y2 - y1), 0))
    whole = np.zeros((40, 100))
    whole[y1:y2, x1:x2] = part
    assert ((whole > 0.5) == (picture[:, :, 0] == 0)).all()
    assert found["scores"] == pytest.approx(1 / (1 + np.exp(-found["logits"])))


def test_pages_hold_the_first_images_and_all_are_passed_on(tmp_path):
    images = [explained(n) for n in range(2 * PAGE + 3)]
    passed = save_pages(images, tmp_path / "a", CLASSES, [ShownMethod("cam")], 0.5, num=2)
    assert [image.key for image in passed] == [image.key for image in images]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["cam_0.png", "cam_1.png"]
    list(save_pages(images, tmp_path / "b", CLASSES, [ShownMethod("cam")], 0.5, num=9))
    assert len(list((tmp_path / "b").iterdir())) == 3  # the last has the remaining three images
    list(save_pages(images, tmp_path / "c", CLASSES, [ShownMethod("cam")], 0.5, num=0))
    assert not list((tmp_path / "c").iterdir())


def test_a_method_that_says_nothing_of_any_image_is_refused():
    flat = np.ones((3, 2, 4), np.float32)
    assert len(list(refuse_flat([explained(0, flat), explained(1)], ["cam"]))) == 2
    with pytest.raises(InputError, match="cam: the maps of all labels of all 2 images are flat"):
        list(refuse_flat([explained(0, flat), explained(1, flat)], ["cam"]))


class Measures(dict):
    """Measures that a weak set can count."""

    __hash__ = object.__hash__


def test_no_image_is_kept(tmp_path):
    """However many images go through, those of one page are alive at once."""
    alive, most = weakref.WeakSet(), 0

    def source():
        for number in range(5 * PAGE):
            image = replace(explained(number), measures=Measures())
            alive.add(image.measures)
            yield image

    images = refuse_flat(source(), ["cam"])
    images = save_maps(images, tmp_path / "maps", CLASSES, {"cam": {}})
    images = save_pages(images, tmp_path / "grids", CLASSES, [ShownMethod("cam")], 0.5, num=2)
    for _ in images:
        most = max(most, len(alive))
    assert most <= PAGE


def test_areas_lie_where_they_are_in_the_part_that_is_shown():
    """By hand: a view of 0.25 to 0.75 across; crowds are no area of an object."""
    xyxy = np.array([[0.25, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]], np.float32)
    triangle = np.array([[0.5, 0.0], [0.75, 1.0], [0.25, 1.0]])
    crowd, no = np.array([False, False, True]), np.zeros(3, bool)
    record = Record("a", "a", (1, 2), boxes=Boxes(xyxy, np.array([1, 2, 1]), crowd, no, (None, [triangle], None)))
    areas = shown_areas(record, (0.25, 0.0, 0.75, 1.0))
    assert list(areas) == [1, 2]
    assert [points.tolist() for points in areas[1]] == [[[0.0, 0.0], [0.5, 0.0], [0.5, 0.5], [0.0, 0.5]]]
    assert [points.tolist() for points in areas[2]] == [[[0.5, 0.0], [1.0, 1.0], [0.0, 1.0]]]
    assert shown_areas(Record("a", "a", (1,)), (0, 0, 1, 1)) == {}
