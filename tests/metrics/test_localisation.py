import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import explanation_reference
from reference import localisation_reference as reference

from mlvision.errors import InputError
from mlvision.label_maps.oracle import object_cover
from mlvision.metrics import mass_in_box, mass_in_mask, pointing_game, pointing_in_mask, rank_accuracy

NAN = math.nan
GRIDS = [(1, 1), (3, 7), (7, 3), (5, 5), (1, 6)]


def random_rows(seed, grid, num_rows=4, levels=None):
    """Maps of both signs, and 0 to 4 boxes each, which overlap and may leave the image; with levels, highest cells tie."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(num_rows, *grid)) if levels is None else rng.integers(-1, levels, (num_rows, *grid)) / 1.0
    boxes = []
    for _ in range(num_rows):
        ends = np.sort(rng.uniform(-0.1, 1.1, (int(rng.integers(0, 5)), 2, 2)), axis=1)
        boxes.append(ends.reshape(-1, 4))
    return maps, boxes


def hot(grid, row, column):
    plane = np.zeros((1, *grid))
    plane[0, row, column] = 1
    return plane


def rows_of(boxes):
    return [np.array(boxes, dtype=np.float64).reshape(-1, 4)]


@pytest.mark.parametrize("grid", GRIDS)
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([None, 2, 3]))
def test_matches_the_definition(grid, seed, levels):
    maps, boxes = random_rows(seed, grid, levels=levels)
    expected = [reference.pointing_game(*row) for row in zip(maps.tolist(), boxes, strict=True)]
    np.testing.assert_allclose(pointing_game(maps, boxes), expected, rtol=1e-12)
    expected = [reference.mass_in_box(*row) for row in zip(maps.tolist(), boxes, strict=True)]
    np.testing.assert_allclose(np.stack(mass_in_box(maps, boxes), axis=1), expected, rtol=1e-9, atol=1e-12)


def test_mass_by_hand():
    # 2 x 4 cells. The box covers half of cell (0, 0), all of (0, 1) and half of (0, 2), each over its whole height, and
    # the upper half of the same in row 1.
    maps = np.array([[[4.0, 1.0, 2.0, 8.0], [2.0, 3.0, -5.0, 0.0]]])
    share, chance = mass_in_box(maps, rows_of([[0.125, 0, 0.625, 0.75]]))
    assert share[0] == pytest.approx((4 / 2 + 1 + 2 / 2 + (2 / 2 + 3 + 0) / 2) / 20, rel=1e-15)
    assert chance[0] == 0.5 * 0.75


def test_overlapping_boxes_count_once_and_apart_from_each_other():
    maps = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    left, upper = [0, 0, 0.5, 1], [0, 0, 1, 0.5]
    share, chance = mass_in_box(maps, rows_of([left, upper, left]))
    assert (share[0], chance[0]) == (0.6, 0.75)
    corners = [[0, 0, 0.25, 0.25], [0.75, 0.75, 1, 1]]
    share, chance = mass_in_box(maps, rows_of(corners))
    assert (share[0], chance[0]) == pytest.approx(((1 + 4) / 4 / 10, 1 / 8), rel=1e-15)


@pytest.mark.parametrize(("row", "column"), [(0, 6), (2, 0), (1, 5), (2, 6)])
def test_x_is_the_column_and_y_the_row(row, column):
    maps = hot((3, 7), row, column)
    box = [column / 7, row / 3, (column + 1) / 7, (row + 1) / 3]
    swapped = [box[1], box[0], box[3], box[2]]
    assert pointing_game(maps, rows_of([box]))[0] == 1
    assert mass_in_box(maps, rows_of([box])).share[0] == pytest.approx(1, rel=1e-12)
    if (row, column) != (2, 6):  # the last corner is its own mirror image, but for its shape
        assert pointing_game(maps, rows_of([swapped]))[0] == 0
        assert mass_in_box(maps, rows_of([swapped])).share[0] < 0.5


def test_ties_are_the_mean_over_the_highest_cells():
    maps = np.array([[[2.0, 0.0, 2.0], [2.0, -1.0, 2.0]]])
    assert pointing_game(maps, rows_of([[0, 0, 0.4, 0.5]]))[0] == 1 / 4
    assert pointing_game(maps, rows_of([[0, 0, 0.4, 1]]))[0] == 1 / 2
    assert pointing_game(-maps, rows_of([[0.4, 0.5, 0.6, 1]]))[0] == 1


def test_only_a_cells_centre_points_and_borders_count():
    maps = hot((2, 4), 1, 2)  # its centre is at x 0.625, y 0.75
    assert pointing_game(maps, rows_of([[0.5, 0.5, 0.62, 1]]))[0] == 0
    assert pointing_game(maps, rows_of([[0.5, 0.5, 0.625, 0.75]]))[0] == 1
    between = rows_of([[0.3, 0.3, 0.34, 0.7]])
    assert pointing_game(np.ones((1, 2, 4)), between)[0] == 0  # out of reach for every map of this grid


@pytest.mark.parametrize("grid", GRIDS)
@given(seed=st.integers(0, 2**32 - 1), value=st.floats(0.01, 100))
def test_a_constant_map_scores_chance(grid, seed, value):
    _, boxes = random_rows(seed, grid)
    share, chance = mass_in_box(np.full((4, *grid), value), boxes)
    np.testing.assert_allclose(share, chance, rtol=1e-9)
    area = [reference.area_of_union(reference.usable(found)) or NAN for found in boxes]
    np.testing.assert_allclose(chance, area, rtol=1e-9)


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.001, 1000))
def test_scale_does_not_matter_and_mirroring_both_changes_nothing(seed, scale):
    maps, boxes = random_rows(seed, (3, 7))
    mirrored = [found[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [1, 0, 1, 0] for found in boxes]
    for measure in (pointing_game, lambda *row: mass_in_box(*row).share):
        expected = measure(maps, boxes)
        np.testing.assert_allclose(measure(maps * scale, boxes), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(measure(maps[:, :, ::-1], mirrored), expected, rtol=1e-9, atol=1e-12)


def test_what_is_undefined_is_nan():
    maps = np.concatenate([np.ones((3, 2, 2)), -np.ones((1, 2, 2))])
    whole, nothing = [[0.0, 0, 1, 1]], np.zeros((0, 4))
    boxes = [np.array(whole), nothing, np.array([[0.5, 0, 0.5, 1]]), np.array(whole)]
    np.testing.assert_array_equal(pointing_game(maps, boxes), [1, NAN, NAN, 1])
    share, chance = mass_in_box(maps, boxes)
    np.testing.assert_array_equal(share, [1, NAN, NAN, NAN])
    np.testing.assert_array_equal(chance, [1, NAN, NAN, NAN])
    assert len(pointing_game(maps[:0], [])) == 0


def test_takes_tensors_of_any_float_dtype():
    maps, boxes = random_rows(0, (3, 7), levels=4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensor = torch.from_numpy(maps).to(dtype)
        np.testing.assert_array_equal(pointing_game(tensor, boxes), pointing_game(maps, boxes))
        np.testing.assert_array_equal(mass_in_box(tensor, boxes).share, mass_in_box(maps, boxes).share)


@pytest.mark.parametrize("measure", [pointing_game, mass_in_box])
def test_bad_input_is_named(measure):
    maps, boxes = np.ones((2, 2, 3)), [np.zeros((0, 4)), np.array([[0.1, 0.1, 0.2, 0.2]])]
    with pytest.raises(InputError, match="2 maps and boxes of 1: expected one entry for each map"):
        measure(maps, boxes[:1])
    with pytest.raises(InputError, match="boxes of row 1: expected x1 <= x2"):
        measure(maps, [boxes[0], np.array([[0.5, 0.1, 0.2, 0.2]])])
    with pytest.raises(InputError, match="boxes of row 0: expected x1 <= x2"):
        measure(maps, [np.array([[NAN, 0.1, 0.2, 0.2]]), boxes[1]])
    maps[1, 1, 2] = NAN
    with pytest.raises(InputError, match="1 of 2 hold NaN or infinity, the first in row 1"):
        measure(maps, boxes)


# Of map and cover: equal, finer, coarser, neither a multiple of the other, and centres on lines of the cover's grid.
GRID_PAIRS = [
    ((3, 5), (3, 5)),
    ((2, 3), (6, 4)),
    ((7, 4), (3, 2)),
    ((3, 7), (5, 3)),
    ((3, 2), (4, 8)),
    ((1, 1), (2, 2)),
]
MASK_MEASURES = [pointing_in_mask, mass_in_mask, rank_accuracy]


def random_covers(seed, grid, num_rows=4):
    """Covers of 0, 1, exactly a half and anything between; the second row is empty, the third full."""
    rng = np.random.default_rng(seed)
    shape = (num_rows, *grid)
    covers = np.where(rng.random(shape) < 0.5, rng.choice([0, 0, 0.5, 1], shape), rng.random(shape))
    covers[1], covers[2] = 0, 1
    covers.flags.writeable = False  # whoever writes to it raises
    return covers


@pytest.mark.parametrize(("grid", "fine"), GRID_PAIRS)
@settings(max_examples=30, deadline=None)  # the oracle is slow
@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([None, 1, 2, 3]),
    tolerance=st.sampled_from([0.0, 0.125, 0.25, 0.4]),
)
def test_masks_match_the_definition(grid, fine, seed, levels, tolerance):
    maps, _ = random_rows(seed, grid, levels=levels)
    maps.flags.writeable = False
    covers = random_covers(seed, fine)
    pairs = list(zip(maps.tolist(), covers.tolist(), strict=True))
    expected = [explanation_reference.pointing_in_mask(*pair, tolerance) for pair in pairs]
    np.testing.assert_allclose(pointing_in_mask(maps, covers, tolerance), expected, rtol=1e-12)
    expected = [explanation_reference.mass_in_mask(*pair) for pair in pairs]
    np.testing.assert_allclose(np.stack(mass_in_mask(maps, covers), axis=1), expected, rtol=1e-9, atol=1e-12)
    expected = [explanation_reference.rank_accuracy(*pair) for pair in pairs]
    np.testing.assert_allclose(np.stack(rank_accuracy(maps, covers), axis=1), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("times", [(1, 1), (2, 3)])
@given(seed=st.integers(0, 2**32 - 1))
def test_a_mask_of_boxes_holds_the_mass_that_the_boxes_hold(times, seed):
    maps, boxes = random_rows(seed, (3, 7))
    one = [found[:1].clip(0, 1) for found in boxes]
    grid = (3 * times[0], 7 * times[1])
    covers = [object_cover(found[0], None, grid) if len(found) else np.zeros(grid) for found in one]
    expected = np.stack(mass_in_box(maps, one))
    np.testing.assert_allclose(np.stack(mass_in_mask(maps, np.stack(covers))), expected, rtol=1e-9, atol=1e-12)


def test_mask_mass_by_hand():
    # The map's cells are 1/2 wide, the cover's 1/3: the middle third is half in each.
    maps = np.array([[[6.0, 2.0], [-4.0, 0.0]]])
    share, chance = mass_in_mask(maps, np.array([[[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]]]))
    left, right = 1 / 3, 1 / 3 + 0.5 * 2 / 3
    assert share[0] == pytest.approx((6 * left + 2 * right) / 8, rel=1e-15)
    assert chance[0] == pytest.approx(4.5 / 6, rel=1e-15)


def test_rank_accuracy_by_hand():
    maps = np.array([[[4.0, 3.0, 2.0, -1.0]], [[4.0, 2.0, 2.0, -1.0]], [[1.0, 1.0, 1.0, 1.0]]])
    cover = np.tile([1.0, 0.0, 0.5, 0.0], (3, 1, 1))  # as large as 1.5 cells
    accuracy, chance = rank_accuracy(maps, cover)
    # All of the first cell and half of the second; a quarter of each of the two that tie; 1.5 / 4 of all.
    np.testing.assert_allclose(accuracy, [1 / 1.5, (1 + 0.25 * 0.5) / 1.5, 1.5 / 4], rtol=1e-15)
    np.testing.assert_array_equal(chance, 0.375)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_map_of_the_mask_has_rank_accuracy_1_and_its_negative_0(seed):
    cover = (np.random.default_rng(seed).random((1, 4, 6)) < 0.4).astype(np.float64)
    cover[0, 0, :2] = [0, 1]
    assert rank_accuracy(cover, cover).accuracy[0] == pytest.approx(1, rel=1e-12)
    assert mass_in_mask(cover, cover).share[0] == pytest.approx(1, rel=1e-12)
    spare = 2 * cover.sum() - cover.size  # cells of the mask that the other ones cannot make up for
    assert rank_accuracy(-cover, cover).accuracy[0] == pytest.approx(max(spare, 0) / cover.sum(), abs=1e-12)


@pytest.mark.parametrize(("row", "column"), [(0, 6), (2, 0), (1, 5), (2, 6)])
def test_a_masks_rows_are_the_maps_rows(row, column):
    maps, cover = hot((3, 7), row, column), np.zeros((1, 6, 7))
    cover[0, 2 * row : 2 * row + 2, column] = 1
    found = [pointing_in_mask(maps, cover), mass_in_mask(maps, cover).share, rank_accuracy(maps, cover).accuracy]
    np.testing.assert_allclose(np.concatenate(found), 1, rtol=1e-12)
    turned = cover[:, ::-1, ::-1]
    found = [pointing_in_mask(maps, turned), mass_in_mask(maps, turned).share, rank_accuracy(maps, turned).accuracy]
    np.testing.assert_allclose(np.concatenate(found), 0, atol=1e-12)


def test_a_centre_on_a_line_belongs_to_the_lower_right_cell():
    # The only centre is where the four cells of the cover meet.
    for k in range(4):
        cover = np.zeros((1, 2, 2))
        cover.flat[k] = 1
        assert pointing_in_mask(np.ones((1, 1, 1)), cover)[0] == (k == 3)
        assert pointing_in_mask(np.ones((1, 1, 1)), cover, tolerance=1e-9)[0] == 1
    # The centres of 14 rows are lines of 196, but in floats (2 * 8 + 1) / 28 * 196 falls short of 119.
    for i in range(14):
        cover = np.zeros((1, 196, 1))
        cover[0, 14 * i + 7] = 1
        assert pointing_in_mask(hot((14, 1), i, 0), cover)[0] == 1


def test_a_half_covered_cell_is_in_the_mask():
    maps = hot((2, 3), 1, 2)
    cover = np.zeros((2, 2, 3), dtype=np.float32)
    cover[:, 1, 2] = [0.5, 0.49]
    np.testing.assert_array_equal(pointing_in_mask(np.tile(maps, (2, 1, 1)), cover), [1, 0])
    np.testing.assert_array_equal(pointing_in_mask(np.tile(maps, (2, 1, 1)), cover, tolerance=1.0), [1, 0])


def test_tolerance_is_the_distance_to_the_nearest_covered_cell():
    maps = hot((4, 2), 0, 0)  # its centre is at y 1/8, x 1/4
    across, down, both = np.zeros((3, 1, 8, 8))
    across[0, 1, 6] = down[0, 4, 2] = both[0, 4, 6] = 1  # 1/2 to the right, 3/8 down
    for cover, distance in ((across, 1 / 2), (down, 3 / 8), (both, 5 / 8)):
        assert pointing_in_mask(maps, cover, tolerance=distance)[0] == 1
        assert pointing_in_mask(maps, cover, tolerance=distance - 1e-6)[0] == 0
        back = cover[:, ::-1, ::-1]
        assert pointing_in_mask(maps[:, ::-1, ::-1], back, tolerance=distance)[0] == 1
        assert pointing_in_mask(maps[:, ::-1, ::-1], back, tolerance=distance - 1e-6)[0] == 0
    assert pointing_in_mask(maps, (across + both).clip(0, 1), tolerance=0.5)[0] == 1  # the nearest counts


def test_ties_are_the_mean_over_the_highest_cells_of_a_mask():
    maps = np.array([[[2.0, 0.0, 2.0], [2.0, -1.0, 2.0]]])
    cover = np.zeros((1, 2, 3))
    cover[0, 0, 0] = 1
    assert pointing_in_mask(maps, cover)[0] == 1 / 4
    assert pointing_in_mask(maps, cover, tolerance=0.25)[0] == 1 / 2  # 1/4 down to the cell below, 1/2 across
    assert pointing_in_mask(np.ones((1, 2, 3)), cover)[0] == 1 / 6


def test_an_empty_mask_is_undefined_and_no_hit():
    maps, cover = np.ones((4, 2, 2)), np.zeros((4, 3, 3))
    maps[3] = -1
    cover[1] = 1
    cover[2:, 0, 0] = 0.25
    np.testing.assert_array_equal(pointing_in_mask(maps, cover), [NAN, 1, 0, 0])
    np.testing.assert_array_equal(pointing_in_mask(maps, cover, tolerance=1.0), [NAN, 1, 0, 0])
    np.testing.assert_array_equal(np.isnan(mass_in_mask(maps, cover)), [[True, False, False, True]] * 2)
    # A full mask holds the highest cells of every map.
    np.testing.assert_array_equal(np.isnan(rank_accuracy(maps, cover)), [[True, True, False, False]] * 2)
    for measure in MASK_MEASURES:
        assert len(np.atleast_2d(measure(maps[:0], cover[:0]))[0]) == 0


def test_covers_may_be_a_rounding_off():
    maps = np.array([[[1.0, 2.0]]])
    full = np.array([[[1 + 1e-7, 1 - 2e-7]]])
    assert math.isnan(rank_accuracy(maps, full).accuracy[0])
    assert mass_in_mask(maps, full).share[0] == pytest.approx(1, abs=1e-6)
    assert math.isnan(mass_in_mask(maps, np.array([[[-1e-7, 0.0]]])).share[0])
    assert math.isnan(pointing_in_mask(maps, np.array([[[-1e-7, 0.0]]]))[0])


def test_masks_take_tensors_of_any_float_dtype():
    maps, _ = random_rows(0, (3, 7), levels=4)
    covers = np.round(random_covers(0, (4, 5)) * 8) / 8
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensor, cover = torch.from_numpy(maps).to(dtype), torch.from_numpy(covers).to(dtype)
        for measure in MASK_MEASURES:
            np.testing.assert_array_equal(measure(tensor, cover), measure(maps, covers))
            np.testing.assert_array_equal(measure(tensor, covers), measure(maps, covers))


@pytest.mark.parametrize("measure", MASK_MEASURES)
def test_bad_masks_are_named(measure, monkeypatch):
    maps, cover = np.ones((2, 2, 3)), np.zeros((2, 4, 4))
    for value in (1.01, -0.01):
        wrong = cover.copy()
        wrong[1, 2, 3] = value
        with pytest.raises(InputError, match=f"cover from {min(value, 0):g} to {max(value, 0):g}: expected shares"):
            measure(maps, wrong)
    wrong[1, 2, 3] = NAN
    with pytest.raises(InputError, match="cover: 1 of 2 hold NaN or infinity, the first in row 1"):
        measure(maps, wrong)
    maps[0, 1, 2] = math.inf
    with pytest.raises(InputError, match="maps: 1 of 2 hold NaN or infinity, the first in row 0"):
        measure(maps, cover)
    # Without the suite's own shape checker, as a user runs it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="2 maps and 1 covers: expected one cover for each map"):
        measure(np.ones((2, 2, 3)), cover[:1])
    with pytest.raises(InputError, match=r"cover \(4, 4\): expected \[N, h, w\]"):
        measure(np.ones((2, 2, 3)), cover[0])


@pytest.mark.parametrize("tolerance", [-0.1, NAN])
def test_a_tolerance_that_is_no_distance_is_refused(tolerance):
    with pytest.raises(InputError, match=f"tolerance {tolerance}: expected 0 or more"):
        pointing_in_mask(np.ones((1, 2, 2)), np.ones((1, 2, 2)), tolerance)
