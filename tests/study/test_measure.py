"""Measures on models whose right answer is known: each label is the brightness of its own region."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from mlvision.data.records import Boxes, Record
from mlvision.errors import InputError
from mlvision.explain import Subject, build_explainer
from mlvision.explain.selection import Selection
from mlvision.study.comparison import cases, label_means
from mlvision.study.measure import (
    COVER_GRID,
    FINER,
    MeasureConfig,
    Removals,
    areas_of_labels,
    deletion_curves,
    judge_on,
    measure,
    randomised,
)
from mlvision.types import LabelMap

SIZE = (28, 42)
REGIONS = ((slice(0, 8), slice(0, 12)), (slice(16, 28), slice(0, 12)), (slice(0, 8), slice(30, 42)))


class Regions(nn.Module):
    """Logit c is 20 times the brightness of region c, less 8; `shared` adds label 0's region to label 1, as a model does
    that learnt two classes which always appear together."""

    def __init__(self, shared: float = 0.0):
        super().__init__()
        self.shared = shared
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, images):
        means = [images[:, :, rows, columns].mean((1, 2, 3)) for rows, columns in REGIONS]
        means[1] = means[1] + self.shared * means[0]
        return self.scale * torch.stack(means, 1) - 8


class Exact:
    """The region itself, for each label; it falls off outside, so that a fifth of the patches lies in it and around it."""

    def __init__(self, turned: bool = False):
        self.turned = turned

    def maps(self, model, images, indices=None):
        maps = torch.zeros(len(images), 3, *SIZE)
        y, x = torch.meshgrid(*(torch.arange(side) for side in SIZE), indexing="ij")
        for label, (rows, columns) in enumerate(REGIONS):
            down = torch.maximum(rows.start - y, y - rows.stop + 1).clamp(min=0)
            across = torch.maximum(columns.start - x, x - columns.stop + 1).clamp(min=0)
            maps[:, label] = torch.where(down + across == 0, 1, -0.01 * torch.maximum(down, across))
        return LabelMap(maps.flip((2, 3)) if self.turned else maps, kind="attribution")


def _images(bright):
    """Region c of image b at brightness bright[b][c], the rest dark grey with a grain."""
    noise = torch.Generator().manual_seed(0)
    images = 0.1 + 0.02 * torch.rand(len(bright), 3, *SIZE, generator=noise)
    for image, row in zip(images, bright, strict=True):
        for (rows, columns), value in zip(REGIONS, row, strict=True):
            image[:, rows, columns] = value
    return images


def _record(labels):
    height, width = SIZE
    boxes = np.zeros((len(labels), 4), dtype=np.float32)
    for row, label in enumerate(labels):
        rows, columns = REGIONS[label]
        boxes[row] = columns.start / width, rows.start / height, columns.stop / width, rows.stop / height
    no, none = np.zeros(len(labels), dtype=bool), (None,) * len(labels)
    objects = Boxes(boxes, np.array(labels, dtype=np.int64), no, no, none)
    return Record("a.jpg", "a.jpg", tuple(labels), boxes=objects)


def _judged(model, bright, labels, truth):
    images = _images(bright)
    targets = torch.zeros(len(bright), 3)
    for row, present in enumerate(truth):
        targets[row, list(present)] = 1
    return judge_on(
        Subject(model), images, targets, Selection(torch.tensor(labels)), torch.arange(len(bright)) + 5,
        [_record(sorted(present)) for present in truth], threshold=0.5,
    )  # fmt: skip


QUICK = MeasureConfig(sensitivity_samples=2, sensitivity=[0.05], baselines=["black"])


def test_the_exact_map_beats_the_wrong_one_in_every_measure():
    model = Regions()
    judged = _judged(model, [[0.9, 0.9, 0.1], [0.1, 0.9, 0.9]], [[0, 1], [1, 2]], [{0, 1}, {1, 2}])
    right, wrong = (measure(Subject(model), judged, explainer, QUICK).columns for explainer in (Exact(), Exact(True)))
    for name in ("srg_black", "aopc_black", "specificity_black", "pointing", "mass", "rank_accuracy"):
        assert (right[name] > wrong[name]).all(), name
    assert (right["pointing"] == 1).all()
    np.testing.assert_allclose(right["rank_accuracy"], 1, atol=0.05)  # of a 56 x 56 grid
    assert right["image"].tolist() == [5, 5, 6, 6]
    assert right["label"].tolist() == [0, 1, 1, 2]
    assert right["outcome"].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(right["area"], [96 / 1176, 144 / 1176, 144 / 1176, 96 / 1176], rtol=0.05)


def test_deletion_curves_by_hand():
    """The region's patches go first, so its logit is -8 from the step at which all of them are gone."""
    model = Regions()
    images = _images([[0.9, 0.5, 0.1]])
    maps = Exact().maps(None, images).values[:, 0]
    config = MeasureConfig(lattice=14, steps=10, baselines=["black"])
    most, least = deletion_curves(Subject(model), images, maps, "black", config)
    assert most.shape == least.shape == (1, 11, 3)
    torch.testing.assert_close(most[:, 0], model(images))
    torch.testing.assert_close(least[:, 0], model(images))
    assert torch.allclose(most[:, -1], torch.tensor(-8.0))
    # The region is 8 x 12 px of 28 x 42: 4 x 4 of 14 x 14 patches, and a tenth of the patches is 20 of them.
    assert most[0, 1, 0] == pytest.approx(-8, abs=1e-5)
    assert least[0, 9, 0] == pytest.approx(float(model(images)[0, 0]), abs=1e-5)
    assert most[0, 1, 1] == pytest.approx(float(model(images)[0, 1]), abs=1e-5)  # another label's region is untouched


def test_patches_are_removed_in_order_and_mirrored():
    order = torch.tensor([[3, 0, 1, 2]])
    masks = Removals(order, (2, 4), 2, 4)
    numbers = torch.arange(10)
    kept = masks.keep(torch.zeros(10, dtype=torch.long), numbers)
    assert kept[1].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]  # the lower right patch first
    assert kept[2].tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert kept[6].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]  # least first: the lower left
    for k in range(5):  # what one order has removed after k steps, the other has left after 4 - k
        assert torch.equal(kept[k], 1 - kept[5 + 4 - k])


def test_a_planted_co_occurrence_shows_in_the_cross_label_matrix():
    """Label 1 is partly read off label 0's region: removing 0's evidence costs label 1 too, and not the other way round."""
    bright, labels, truth = [[0.9, 0.9, 0.9]], [[0, 1, 2]], [{0, 1, 2}]
    for shared, leak in ((0.0, 0.0), (0.5, 0.5)):
        model = Regions(shared)
        judged = _judged(model, bright, labels, truth)
        drops = measure(Subject(model), judged, Exact(), QUICK).drops
        assert drops[0, 1] == pytest.approx(leak * drops[0, 0], abs=1e-4)
        assert drops[1, 0] == pytest.approx(0, abs=1e-4)
        assert drops[2, 1] == pytest.approx(0, abs=1e-4)


def test_outcomes_are_kept_apart():
    model = Regions()
    bright = [[0.9, 0.1, 0.1], [0.9, 0.9, 0.1], [0.1, 0.1, 0.9]]
    judged = _judged(model, bright, [[0, -1], [0, 1], [1, 2]], [{0}, {0}, {1}])
    columns = measure(Subject(model), judged, Exact(), QUICK).columns
    found = {name: np.flatnonzero(which).tolist() for name, which in cases(columns).items()}
    # pairs: (0, clear), (0, clear), (1 in the second image, seen and absent), (1 missed), (2 seen and absent)
    assert found == {"clear": [0, 1], "competing": [], "FP": [2, 4], "FN": [3]}


def test_labels_count_the_same_however_many_pairs_they_have():
    columns = {
        "label": np.array([0, 0, 0, 1, 2]),
        "against": np.full(5, -1),
        "x": np.array([1.0, 1, 1, 4, np.nan]),
    }
    everything = np.ones(5, dtype=bool)
    assert label_means(columns, "x", everything) == (2.5, 4)
    contrast = columns | {"against": np.array([-1, -1, 2, -1, -1]), "x": np.array([1.0, 1, 7, 4, np.nan])}
    assert label_means(contrast, "x", everything) == (4.0, 4)
    assert np.isnan(label_means(columns, "x", columns["label"] == 2)[0])


def test_flat_maps_have_no_measures_and_are_counted():
    class Half(Exact):
        def maps(self, model, images, indices=None):
            found = super().maps(model, images)
            found.values[:, 1] = 0.5
            return found

    model = Regions()
    judged = _judged(model, [[0.9, 0.9, 0.1]], [[0, 1]], [{0, 1}])
    columns = measure(Subject(model), judged, Half(), QUICK).columns
    assert columns["flat"].tolist() == [False, True]
    assert np.isfinite(columns["srg_black"][0])
    assert np.isnan([columns["srg_black"][1], columns["pointing"][1]]).all()


def test_sensitivity_asks_the_same_explainer_again():
    model = Regions()
    judged = _judged(model, [[0.9, 0.9, 0.1]], [[0, 1]], [{0, 1}])
    still = measure(Subject(model), judged, Exact(), QUICK).columns["max_sensitivity_0.05"]
    np.testing.assert_array_equal(still, 0)  # its maps do not depend on the pixels
    edges = measure(Subject(model), judged, build_explainer("edges"), QUICK).columns["max_sensitivity_0.05"]
    assert (edges > 0).all()


def test_memory_at_the_size_of_the_images_does_not_grow_with_the_labels():
    """The peak for 32 labels is less than one image above that for 2: no copy of the image for each label."""
    side = 128

    def peak(num_classes: int) -> int:
        torch.manual_seed(0)
        subject = Subject(timm.create_model("resnet10t", num_classes=num_classes).eval())
        labels = torch.arange(num_classes)
        judged = judge_on(
            subject, torch.rand(1, 3, side, side), torch.ones(1, num_classes), Selection(labels[None]), torch.arange(1),
            [Record("a", "a", tuple(labels.tolist()))], threshold=0.5,
        )  # fmt: skip
        config = MeasureConfig(lattice=4, steps=5, baselines=["black"], sensitivity=[0.1], sensitivity_samples=2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            measure(subject, judged, build_explainer("grad_cam"), config)
        changes = sorted(
            (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
        )
        return int(np.cumsum([size for _, size in changes]).max())

    assert peak(32) - peak(2) < 3 * side * side * 4


def test_areas_of_the_annotation():
    covers, masks = areas_of_labels([_record([0, 2]), _record([0]), Record("b", "b", (1,))], [2, 1, 1], 3)
    assert covers.shape == (3, *COVER_GRID)
    assert (masks[0, ::FINER, ::FINER] == (covers[0] >= 0.5)).all()
    assert masks.sum() == masks[0].sum() == FINER**2 * (covers[0] >= 0.5).sum()
    rows, columns = np.nonzero(covers[0] > 0.5)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 15, 40, 55)  # 8 of 28 and 30 to 42 of 42
    assert np.isnan(covers[1:]).all()


def _annotated(*boxes):
    """An image with objects of label 0 at x1, y1, x2, y2, in cells of the grid of covers."""
    xyxy = np.array(boxes, np.float32) / np.array([*COVER_GRID[::-1]] * 2, np.float32)
    objects = np.zeros(len(boxes), int)
    return Record(
        "a", "a", (0,), boxes=Boxes(xyxy, objects, objects.astype(bool), objects.astype(bool), (None,) * len(boxes))
    )


def test_objects_too_small_for_the_grid_count_by_their_own_pixels():
    """By hand: each box in cells of the grid; what is expected in cells of the grid that is four times as fine."""
    quarter = (10.0, 20.0, 10.5, 20.5)
    cross = (10.75, 20.75, 11.25, 21.25)  # a sixteenth of each of four cells
    speck = (3.1, 5.1, 3.11, 5.11)  # a 10,000th of a cell
    line = (30.0, 40.0, 30.25, 50.0)
    for boxes, expected in (
        ([quarter], [(80, 82, 40, 42)]),
        ([cross], [(83, 85, 43, 45)]),
        ([speck], [(20, 21, 12, 13)]),
        ([line], [(160, 200, 120, 121)]),
        ([(0.0, 0.0, 7.0, 9.0), cross], [(0, 36, 0, 28), (83, 85, 43, 45)]),
        ([(4.0, 4.0, 4.0, 9.0)], []),  # no area
    ):
        mask = np.zeros([FINER * side for side in COVER_GRID], bool)
        for top, bottom, left, right in expected:
            mask[top:bottom, left:right] = True
        np.testing.assert_array_equal(areas_of_labels([_annotated(*boxes)], [0], 1)[1][0], mask)


def test_pointing_at_a_small_object_is_a_hit(resnet, images):
    """The map is highest in one cell of 224 x 224; the object is that cell, a sixteenth of a cell of the grid of covers."""

    class Spot:
        label_specific = True

        def explain(self, subject, pixels, selection):
            maps = torch.zeros(len(pixels), 1, 224, 224)
            maps[0, 0, 83, 43] = maps[1, 0, 83, 44] = 1
            return maps

    record = _annotated((10.75, 20.75, 11.0, 21.0))
    judged = judge_on(
        Subject(resnet), images, torch.eye(5)[[0, 0]], Selection(torch.zeros(2, 1, dtype=torch.long)), torch.arange(2),
        [record, record], threshold=0.5,
    )  # fmt: skip
    assert judged.cover.max() == pytest.approx(1 / 16, rel=1e-5)
    columns = measure(Subject(resnet), judged, Spot(), replace(QUICK, sensitivity_samples=0)).columns
    assert columns["pointing"].tolist() == columns["pointing_small"].tolist() == [1, 0]
    assert judged.some(torch.tensor([False, True])).mask.shape == (1, 224, 224)


def test_randomised_weights_change_the_maps_of_what_reads_them(resnet, images):
    subject = Subject(resnet)
    targets = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 0]])
    judged = judge_on(
        subject, images, targets, Selection(torch.tensor([[0, 3], [1, -1]])), torch.arange(2),
        [Record("a", "a", (0, 3)), Record("b", "b", (1,))], threshold=0.5,
    )  # fmt: skip
    weights = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    cam = randomised(subject, judged, build_explainer("grad_cam", layer="layer2"), stages=2)
    edges = randomised(subject, judged, build_explainer("edges"), stages=2)
    assert [row["share"] for row in cam] == [0.0, 0.5, 1.0]
    assert cam[-1]["spearman"] < 0.9
    assert [row["spearman"] for row in edges] == pytest.approx([1, 1, 1])  # explains no weights at all
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resnet.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 16}, "steps"),
        ({"baselines": ["drop out"]}, "baselines"),
        ({"sensitivity": [0.0]}, "sensitivity"),
        ({"lattice": 1}, "lattice"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MeasureConfig(**options)
