import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import localisation_reference as reference

from mlvision.errors import InputError
from mlvision.metrics import mass_in_box, pointing_game

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
