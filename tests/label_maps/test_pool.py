from dataclasses import replace

import numpy as np
import pytest
import torch
from reference.label_maps_reference import bin_areas, dense_map, pool
from torchvision.ops import roi_align

from mlvision.errors import InputError
from mlvision.label_maps import OPERATORS, Pooling, pool_label_map, pool_probabilities
from mlvision.types import CropBox, LabelMap

BOXES = {
    "full": [0, 0, 1, 1],
    "ordinary": [0.11, 0.32, 0.83, 0.71],
    "tall sliver": [0.41, 0.03, 0.43, 0.97],
    "wide sliver": [0.02, 0.55, 0.99, 0.56],
    "within a cell": [0.51, 0.52, 0.53, 0.55],
    "a corner": [0.93, 0.95, 1, 1],
    "beyond the edges": [-0.2, 0.4, 0.5, 1.3],
    "far outside": [1.4, 1.3, 1.9, 1.8],
}


def top_k_map(num_images, num_classes, grid, kind="logit", k=5, seed=0):
    """A random map of the k best classes of each cell, its fill at most the least of them."""
    noise = torch.Generator().manual_seed(seed)
    size = (num_images, num_classes, *grid)
    values, ids = (3 * torch.randn(size, generator=noise, dtype=torch.float64)).topk(k, dim=1)
    fill = values[:, -1] - torch.rand(num_images, *grid, generator=noise, dtype=torch.float64)
    return LabelMap(values, ids, "logit", fill).as_kind(kind)


def some_boxes(num, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return torch.rand(num, 2, 2, generator=noise, dtype=torch.float64).sort(dim=1).values.flatten(1)


def dense_of(label_map, num_classes):
    """The map of all classes, by the slow reference."""
    fill = torch.as_tensor(label_map.fill).expand(len(label_map.values), *label_map.values.shape[2:])
    rows = zip(label_map.values.numpy(), label_map.ids.numpy(), fill.numpy(), strict=True)
    return torch.from_numpy(np.stack([dense_map(v, i, f, num_classes) for v, i, f in rows]))


# RoIAlign


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
@pytest.mark.parametrize("output_size", [1, 3, 14])
@pytest.mark.parametrize("grid", [(15, 15), (4, 7), (9, 2), (1, 5)])
def test_pooling_is_torchvisions_roi_align(box, output_size, grid):
    label_map = top_k_map(1, 20, grid)
    boxes = torch.tensor([box], dtype=torch.float64)
    height, width = grid
    rois = torch.cat([torch.zeros(1, 1), boxes * torch.tensor([width, height, width, height])], 1).double()
    expected = roi_align(dense_of(label_map, 20), rois, (output_size, output_size), 1.0, -1, aligned=True)
    found = pool_label_map(label_map, CropBox(boxes), 20, output_size=output_size)
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_classes", [20, 80, 1000])
@pytest.mark.parametrize(("num_images", "output_size"), [(1, 1), (256, 1), (1, 14), (256, 14)])
def test_pooling_is_roi_align_in_single_precision_for_any_number_of_classes(num_classes, num_images, output_size):
    grid = (6, 9)
    label_map = top_k_map(num_images, num_classes, grid)._each(lambda c: c.float() if c.is_floating_point() else c)
    boxes = some_boxes(num_images).float()
    rois = torch.cat([torch.arange(num_images)[:, None], boxes * torch.tensor([9.0, 6, 9, 6])], 1)
    fill = label_map.fill[:, None].repeat(1, num_classes, 1, 1)
    dense = fill.scatter(1, label_map.ids, label_map.values)
    expected = roi_align(dense, rois, (output_size, output_size), 1.0, -1, aligned=True)
    found = pool_label_map(label_map, CropBox(boxes), num_classes, output_size=output_size).reshape(expected.shape)
    assert ((found - expected).abs() <= 1e-5 * dense.abs().amax().clamp(min=1)).all()


def test_a_full_box_gives_the_mean_of_the_cells():
    label_map = top_k_map(3, 20, (4, 7))
    found = pool_label_map(label_map, CropBox(torch.tensor([[0.0, 0, 1, 1]] * 3).double()), 20)
    torch.testing.assert_close(found, dense_of(label_map, 20).mean(dim=(2, 3)))


def test_a_hot_cell_is_found_where_it_is():
    """One hot cell off the diagonal of a wide grid: rows are y, columns are x."""
    values = torch.zeros(1, 1, 3, 8)
    values[0, 0, 2, 1] = 1
    label_map = LabelMap(values, torch.tensor([[4]]))
    boxes = torch.tensor(
        [[1 / 8, 2 / 3, 2 / 8, 1], [2 / 3, 1 / 8, 1, 2 / 8]]
    )  # its own, and the one across the diagonal
    own, swapped = (pool_label_map(label_map, CropBox(box[None]), 5, operator="max")[0] for box in boxes)
    assert own.tolist() == [0, 0, 0, 0, 1]
    assert not swapped.any()


def test_quadrants():
    """Four classes in the quarters of a map: each quarter's crop gives its class, a crop with swapped axes another."""
    values = torch.zeros(1, 4, 6, 10)
    for c, (rows, columns) in enumerate([(slice(3), slice(5)), (slice(3), slice(5, 10)), (slice(3, 6), slice(5))]):
        values[0, c, rows, columns] = 1
    values[0, 3, 3:, 5:] = 1
    boxes = torch.tensor(
        [[0.05, 0.05, 0.4, 0.4], [0.6, 0.05, 0.95, 0.4], [0.05, 0.6, 0.4, 0.95], [0.6, 0.6, 0.95, 0.95]]
    )
    for c, box in enumerate(boxes):
        pooled = pool_label_map(LabelMap(values), CropBox(box[None]), 4, operator="mean_probability")
        assert pooled.argmax() == c
        transposed = pool_label_map(LabelMap(values), CropBox(box[None, [1, 0, 3, 2]]), 4, operator="mean_probability")
        assert (transposed.argmax() == c) == (c in (0, 3))


def test_extent_is_the_part_of_the_image_that_the_grid_covers():
    """A map of the centre: the same crop, in the coordinates of the centre."""
    label_map = top_k_map(2, 20, (4, 7))
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0, 0.5, 0.5, 1]]).double()
    extent = torch.tensor([[0.1, 0.2, 0.9, 0.6]]).double().expand(2, -1)
    corner, size = extent[:, :2].repeat(1, 2), (extent[:, 2:] - extent[:, :2]).repeat(1, 2)
    centred = LabelMap(label_map.values, label_map.ids, "logit", label_map.fill, extent)
    found = pool_label_map(centred, CropBox(boxes * size + corner), 20)
    torch.testing.assert_close(found, pool_label_map(label_map, CropBox(boxes), 20))


# Operators


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layout", ["best of each cell", "some labels", "all classes"])
@pytest.mark.parametrize("output_size", [1, 2])
def test_operators_are_their_definitions(operator, layout, output_size):
    kind = "logit" if operator == "mean_logit" else "probability"
    num_classes, grid = 12, (4, 7)
    label_map = top_k_map(3, num_classes, grid, kind)
    dense = dense_of(label_map, num_classes)
    if layout == "all classes":
        label_map = LabelMap(dense, None, kind)
    elif layout == "some labels":
        ids = torch.tensor([[7, 2, -1], [0, 11, 5], [-1, -1, 3]])
        values = torch.stack([d[i.clamp(min=0)] for d, i in zip(dense, ids, strict=True)])
        fill = values.amin(1)
        label_map = LabelMap(values, ids, kind, fill)
        dense = dense_of(label_map, num_classes)
    boxes = some_boxes(3, seed=2)
    found = pool_label_map(label_map, CropBox(boxes), num_classes, operator=operator, output_size=output_size)
    expected = np.stack(
        [pool(d, box, operator, output_size) for d, box in zip(dense.numpy(), boxes.tolist(), strict=True)]
    )
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("operator", ["max", "log_sum_exp", "top_q"])
def test_a_cell_that_the_view_does_not_show_counts_nothing(operator):
    """RoIAlign's points reach the cell to the right of this view, whose centre is nearer than half a cell."""
    label_map = LabelMap(torch.tensor([[[[0.0, 1.0]]]]), None, "probability")
    view = CropBox(torch.tensor([[0.15, 0, 0.5, 1]]))
    assert pool_label_map(label_map, view, 1, operator="mean_probability") > 0.01
    assert pool_label_map(label_map, view, 1, operator=operator).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("output_size", [1, 3])
@pytest.mark.parametrize("layout", ["all classes", "some labels", "best of each cell"])
def test_the_maximum_is_there_just_where_the_view_shows_the_cell(layout, output_size):
    """One hot cell, and boxes of pixels that often end at a border of cells, in single precision, as crops have them."""
    rows, columns, pixels = 6, 7, (96, 112)  # 16 x 16 pixels a cell
    noise = np.random.default_rng(0)
    for _ in range(60):
        row, column = noise.integers(rows), noise.integers(columns)
        values = torch.zeros(1, 1, rows, columns)
        values[0, 0, row, column] = 1
        ids = {"all classes": None, "some labels": torch.zeros(1, 1, dtype=torch.long)}.get(
            layout, torch.zeros(1, 1, rows, columns, dtype=torch.long)
        )
        step = noise.choice([1, 16])
        y1, y2 = sorted(step * noise.choice(pixels[0] // step + 1, 2, replace=False))
        x1, x2 = sorted(step * noise.choice(pixels[1] // step + 1, 2, replace=False))
        corners = torch.tensor([[x1, y1, x2, y2]]).float() / torch.tensor([pixels[1], pixels[0]] * 2)
        pooled = pool_label_map(
            LabelMap(values, ids, "probability"), CropBox(corners), 1, operator="max", output_size=output_size
        )
        tall, wide = (y2 - y1) / output_size, (x2 - x1) / output_size
        expected = [
            float(y1 + p * tall < 16 * (row + 1) - 1e-3 and y1 + (p + 1) * tall > 16 * row + 1e-3
                  and x1 + q * wide < 16 * (column + 1) - 1e-3 and x1 + (q + 1) * wide > 16 * column + 1e-3)
            for p in range(output_size) for q in range(output_size)
        ]  # fmt: skip
        assert pooled.flatten().tolist() == expected, (row, column, x1, y1, x2, y2)


def test_log_sum_exp_lies_between_mean_and_maximum():
    label_map = top_k_map(4, 30, (5, 6), "probability")
    boxes = some_boxes(4)
    view = CropBox(boxes)
    pooled = [pool_label_map(label_map, view, 30, Pooling("log_sum_exp", sharpness=r)) for r in (1e-5, 1.0, 50.0, 5e3)]
    areas = torch.from_numpy(np.stack([bin_areas((5, 6), box, 1)[0, 0] for box in boxes.tolist()]))
    mean = torch.einsum("bchw,bhw->bc", dense_of(label_map, 30), areas)
    maximum = pool_label_map(label_map, view, 30, operator="max")
    torch.testing.assert_close(pooled[0], mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(pooled[-1], maximum, rtol=0, atol=3e-3)
    for low, high in zip([mean, *pooled[:-1]], pooled, strict=True):
        assert (low <= high + 1e-4).all()


def test_top_share_of_all_cells_is_their_plain_mean():
    label_map = top_k_map(2, 20, (4, 7), "probability")
    view = CropBox(torch.tensor([[0.0, 0, 1, 1]] * 2).double())
    found = pool_label_map(label_map, view, 20, Pooling("top_q", top_share=1.0))
    torch.testing.assert_close(found, dense_of(label_map, 20).mean(dim=(2, 3)))


def test_large_batches_are_pooled_in_parts_without_a_difference(monkeypatch):
    label_map, view = top_k_map(7, 20, (4, 7), "probability"), CropBox(some_boxes(7))
    whole = {o: pool_label_map(label_map, view, 20, operator=o, output_size=2) for o in OPERATORS[1:]}
    monkeypatch.setattr("mlvision.label_maps.pool._CHUNK", {"cpu": 1200})
    for operator, expected in whole.items():
        found = pool_label_map(label_map, view, 20, operator=operator, output_size=2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_deterministic_pooling_is_the_same_sum():
    label_map, view = top_k_map(4, 20, (4, 7)), CropBox(some_boxes(4))
    for size in (1, 3):
        found = pool_label_map(label_map, view, 20, output_size=size, deterministic=True)
        torch.testing.assert_close(found, pool_label_map(label_map, view, 20, output_size=size))


def test_half_precision_maps_are_pooled_in_single_precision():
    label_map = top_k_map(3, 20, (4, 7))
    half = LabelMap(label_map.values.half(), label_map.ids.int(), "logit", label_map.fill.half())
    exact = LabelMap(half.values.double(), label_map.ids, "logit", half.fill.double())
    view = CropBox(some_boxes(3))
    found = pool_label_map(half, view, 20)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), pool_label_map(exact, view, 20), rtol=0, atol=1e-5)


# Flips and turns


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_grid_over_the_view_follows_its_flip_and_turns(turns, flipped):
    """Pooling the turned map with the turned box equals turning what was pooled."""
    label_map = top_k_map(1, 20, (5, 7), seed=3)
    box = torch.tensor([[0.1, 0.25, 0.62, 0.9]]).double()
    view = CropBox(box, torch.tensor([flipped]), torch.tensor([turns]))
    found = pool_label_map(label_map, view, 20, output_size=3)

    dense = dense_of(label_map, 20)
    x1, y1, x2, y2 = box[0].tolist()
    if flipped:
        dense, (x1, x2) = dense.flip(-1), (1 - x2, 1 - x1)
    for _ in range(turns):  # counter-clockwise: what was right is up
        dense, (x1, y1, x2, y2) = dense.rot90(1, (-2, -1)), (y1, 1 - x2, y2, 1 - x1)
    turned = CropBox(torch.tensor([[x1, y1, x2, y2]]).double())
    torch.testing.assert_close(found, pool_label_map(LabelMap(dense, None, "logit"), turned, 20, output_size=3))


def test_each_image_of_a_batch_has_its_own_flip():
    label_map, boxes = top_k_map(4, 20, (4, 7)), some_boxes(4)
    plain = pool_label_map(label_map, CropBox(boxes), 20, output_size=2)
    view = CropBox(boxes, torch.tensor([True, False, False, True]))
    found = pool_label_map(label_map, view, 20, output_size=2)
    for row, flipped in enumerate(view.flipped):
        assert torch.equal(found[row], plain[row].flip(-1) if flipped else plain[row])
    assert torch.equal(pool_label_map(label_map, view, 20), pool_label_map(label_map, CropBox(boxes), 20))


# Kinds


def test_a_cells_softmax_counts_what_is_not_stored():
    logits = torch.randn(2, 30, 3, 5, dtype=torch.float64) * 2
    values, ids = logits.topk(4, dim=1)
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(1) - torch.tensor(26.0, dtype=torch.float64).log()
    found = LabelMap(values, ids, "logit", rest, groups=(30,)).as_kind("probability")
    torch.testing.assert_close(found.values, logits.softmax(1).gather(1, ids))
    torch.testing.assert_close(found.values.sum(1) + 26 * found.fill, torch.ones(2, 3, 5, dtype=torch.float64))
    whole = LabelMap(logits, None, "logit", groups=(30,)).as_kind("probability", temperature=2.0)
    torch.testing.assert_close(whole.values, (logits / 2).softmax(1))


def test_each_group_has_its_own_softmax_in_each_cell():
    logits = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    found = LabelMap(logits, None, "logit", groups=(2, 1, 3)).as_kind("probability", temperature=0.5).values
    parts = (2 * logits).split((2, 1, 3), dim=1)
    torch.testing.assert_close(found, torch.cat([parts[0].softmax(1), parts[1].sigmoid(), parts[2].softmax(1)], 1))
    view = CropBox(some_boxes(2))
    pooled = pool_probabilities(LabelMap(logits, None, "logit", groups=(2, 1, 3)), view, 6, Pooling("mean_logit"))
    torch.testing.assert_close(pooled[:, 3:].sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(pooled[:, :2].sum(1), torch.ones(2, dtype=torch.float64))


def test_sigmoids_and_their_fill():
    found = top_k_map(2, 20, (3, 4)).as_kind("probability", temperature=0.5)
    logits = top_k_map(2, 20, (3, 4))
    torch.testing.assert_close(found.values, (2 * logits.values).sigmoid())
    torch.testing.assert_close(found.fill, (2 * logits.fill).sigmoid())
    constant = LabelMap(torch.zeros(1, 2, 3, 4), torch.tensor([[0, 1]]), "logit", -2.0)
    assert constant.as_kind("probability").fill == pytest.approx(0.11920292)


def test_relative_to_peak():
    plan = LabelMap(torch.tensor([[[[0.1, 0.3], [0.2, 0.4]], [[-1.0, 0], [-2, 0]]]]), kind="mass")
    found = plan.as_kind("probability", calibration="relative_to_peak")
    torch.testing.assert_close(found.values[0, 0], torch.tensor([[0.25, 0.75], [0.5, 1.0]]))
    assert not found.values[0, 1].any()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operator": "sum"}, "operator: expected one of mean_logit, .*, got 'sum'"),
        (
            {"operator": "mean_probability"},
            "mean_probability of a map of logit; convert it with LabelMap.as_kind first",
        ),
        ({"output_size": 0}, "output_size: expected 1 or more, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        pool_label_map(top_k_map(1, 20, (3, 4)), CropBox(some_boxes(1)), 20, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operator": "sum"}, "^operator: expected one of mean_logit, .*, got 'sum'"),
        ({"sharpness": 0.0}, "^sharpness: expected more than 0, got 0.0"),
        ({"top_share": 1.5}, "^top_share: expected a number above 0, at most 1, got 1.5"),
        ({"temperature": -1.0}, "^temperature: expected more than 0, got -1.0"),
        ({"calibration": "peak"}, "^calibration: expected one of relative_to_peak, or nothing, got 'peak'"),
    ],
)
def test_a_pooling_out_of_range_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Pooling(**options)


def test_a_pooling_is_all_that_the_operators_and_the_conversion_need():
    logits = top_k_map(3, 20, (3, 4))
    view = CropBox(some_boxes(3))
    expected = pool_label_map(logits.as_kind("probability", temperature=0.5), view, 20, operator="max")
    torch.testing.assert_close(pool_probabilities(logits, view, 20, Pooling("max", temperature=0.5)), expected)
    mean = (pool_label_map(logits, view, 20) / 0.5).sigmoid()
    torch.testing.assert_close(pool_probabilities(logits, view, 20, Pooling(temperature=0.5)), mean)
    soft, hard = (pool_probabilities(logits, view, 20, Pooling("log_sum_exp", sharpness=r)) for r in (1e-5, 5e3))
    assert (soft < hard).all()


@pytest.mark.parametrize("fill", [0.25, torch.full((2, 3, 4), 0.25)])
def test_maps_move_to_a_device_as_they_are(fill):
    ids, extent = torch.zeros(2, 5, dtype=torch.int64), torch.rand(2, 4)
    label_map = LabelMap(torch.rand(2, 5, 3, 4), ids, "mass", fill, extent, (5, 1))
    moved = label_map.to("meta")
    assert (moved.kind, moved.groups) == ("mass", (5, 1))
    for before, after in zip(vars(label_map).values(), vars(moved).values(), strict=True):
        if isinstance(before, torch.Tensor):
            assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype)
        else:
            assert after == before


def test_maps_that_cannot_be_converted_are_refused():
    attribution = LabelMap(torch.zeros(1, 2, 3, 4), kind="attribution")
    with pytest.raises(InputError, match="attribution is no probability; name a calibration of relative_to_peak"):
        attribution.as_kind("probability")
    with pytest.raises(InputError, match="probability cannot become logit"):
        LabelMap(torch.zeros(1, 2, 3, 4)).as_kind("logit")
    for ids, groups in ((torch.zeros(1, 2, 3, 4), (2, 3)), (torch.zeros(1, 2), (5,))):
        sparse = LabelMap(torch.zeros(1, 2, 3, 4), ids.long(), "logit", groups=groups)
        with pytest.raises(InputError, match="a softmax needs all classes, or of one group of all the best classes"):
            sparse.as_kind("probability")
    with pytest.raises(InputError, match=r"label map: 2 classes in groups of \[3\]"):
        LabelMap(torch.zeros(1, 2, 3, 4), groups=(3,))
    with pytest.raises(InputError, match="expected a kind of logit.*got 'plan'"):
        LabelMap(torch.zeros(1, 2, 3, 4), kind="plan")
    with pytest.raises(InputError, match=r"ids \(1, 3\) fit neither"):
        LabelMap(torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="2 views and 1 label maps"):
        pool_label_map(top_k_map(1, 20, (3, 4)), CropBox(some_boxes(2)), 20)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("output_size", [1, 3])
def test_a_training_loops_autocast_does_not_reach_the_targets(operator, output_size):
    kind = "logit" if operator == "mean_logit" else "probability"
    label_map, view = top_k_map(3, 20, (4, 7), kind), CropBox(some_boxes(3))
    label_map = replace(label_map, values=label_map.values.float(), fill=torch.as_tensor(label_map.fill).float())
    expected = pool_label_map(label_map, view, 20, operator=operator, output_size=output_size)
    with torch.autocast("cpu", torch.bfloat16):
        found = pool_label_map(label_map, view, 20, operator=operator, output_size=output_size)
    assert torch.equal(found, expected)


def test_ids_beyond_the_classes_are_refused():
    label_map = LabelMap(torch.ones(2, 1, 1, 1), torch.tensor([[[[4]]], [[[0]]]]))
    with pytest.raises(InputError, match="label maps with class 4, expected ids below 3"):
        pool_label_map(label_map, CropBox(torch.tensor([[0.0, 0, 1, 1]] * 2)), 3, operator="mean_probability")
