"""oracle.py against a dense lattice of points, cases done by hand, and masks that are decoded and averaged apart."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mlvision.data.scenes.drawing import mask_polygons
from mlvision.errors import InputError
from mlvision.label_maps.oracle import (
    batch_oracle_maps,
    object_cover,
    object_outlines,
    oracle_map,
    oracle_targets,
    visible_area,
)
from mlvision.types import CropBox, LabelMap

NO_BOX = np.zeros(4)
WHOLE = [0.0, 0.0, 1.0, 1.0]


def in_polygon(polygon, x, y):
    """Even-odd: how often a ray to the left of each point meets an edge."""
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        spans = (ay <= y) != (by <= y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= spans & (x > ax + (y - ay) / (by - ay) * (bx - ax))
    return inside


def lattice_cover(polygons, grid, points=200):
    """The share of points x points in each cell that are in any of the polygons."""
    height, width = grid
    y, x = np.meshgrid(
        (np.arange(height * points) + 0.5) / (height * points),
        (np.arange(width * points) + 0.5) / (width * points),
        indexing="ij",
    )
    inside = np.zeros(x.shape, dtype=bool)
    for polygon in polygons:
        inside |= in_polygon(np.asarray(polygon), x, y)
    return inside.reshape(height, points, width, points).mean(axis=(1, 3))


def shoelace(polygon):
    x, y = np.asarray(polygon, dtype=np.float64).T
    return abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2


def star(rng, num_points, radius, centre=(0.5, 0.5)):
    """A polygon that does not cross itself: 4 or more points around a centre, no two half a turn apart."""
    angles = 2 * np.pi * (np.arange(num_points) + rng.uniform(0, 0.9, num_points)) / num_points
    distance = rng.uniform(0.2, 1, num_points) * radius
    return np.stack([centre[0] + distance * np.cos(angles), centre[1] + distance * np.sin(angles)], axis=1)


def rectangle(x1, y1, x2, y2):
    return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])


def rle(mask):
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def one_image(boxes, labels, crowd=None, segmentations=None, num_classes=4, grid=(2, 4)):
    crowd = [False] * len(labels) if crowd is None else crowd
    segmentations = [None] * len(labels) if segmentations is None else segmentations
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    labels = np.array(labels, dtype=np.int64)
    return oracle_map(boxes, labels, np.array(crowd, dtype=bool), segmentations, num_classes, grid)


def targets(image, box, num_classes=4, hole=None, **options):
    cover, unknown = batch_oracle_maps([image])
    hole = None if hole is None else torch.tensor([hole])
    return oracle_targets(cover, unknown, CropBox(torch.tensor([box])), num_classes, hole=hole, **options)[0].tolist()


# Cover of one object


def test_a_box_over_parts_of_cells_by_hand():
    # 1.5 cells wide from the middle of column 1, a quarter of a cell high in row 1 of 2 x 4 cells.
    cover = object_cover(np.array([0.375, 0.5, 0.75, 0.625]), None, (2, 4))

    np.testing.assert_allclose(cover, [[0, 0, 0, 0], [0, 0.5 * 0.25, 0.25, 0]], atol=1e-15)


def test_a_box_is_the_outer_product_of_its_overlaps():
    x1, y1, x2, y2 = box = np.array([0.13, 0.27, 0.81, 0.93])
    height, width = 5, 7
    rows = [max(0, min(y2 * height, i + 1) - max(y1 * height, i)) for i in range(height)]
    columns = [max(0, min(x2 * width, j + 1) - max(x1 * width, j)) for j in range(width)]

    np.testing.assert_allclose(object_cover(box, None, (height, width)), np.outer(rows, columns), atol=1e-14)


def test_a_triangle_over_six_cells_by_hand():
    # Below the diagonal from (3, 0) to (0, 2) in cells: y = 2 - 2 x / 3. Cell (0, 1) loses the corner beyond
    # (1.5, 1)-(2, 2/3): 1/2 * 1/2 * 1/3; cell (0, 2) keeps a triangle of legs 1 and 2/3; and so on by symmetry.
    cover = object_cover(NO_BOX, [np.array([[0, 0], [1, 0], [0, 1]])], (2, 3))

    np.testing.assert_allclose(cover, [[1, 11 / 12, 1 / 3], [2 / 3, 1 / 12, 0]], atol=1e-15)


@pytest.mark.parametrize("grid", [(6, 4), (3, 11), (1, 1)])
def test_polygons_match_a_dense_lattice(grid):
    rng = np.random.default_rng(0)
    polygon = star(rng, 12, 0.49)

    cover = object_cover(NO_BOX, [polygon], grid)

    assert np.abs(cover - lattice_cover([polygon], grid)).max() < 5e-3
    assert ((cover > 0.01) & (cover < 0.99)).any()


def test_polygons_that_overlap_or_cross_themselves_match_a_dense_lattice():
    rng = np.random.default_rng(1)
    bow = np.array([[0.1, 0.15], [0.85, 0.9], [0.9, 0.2], [0.2, 0.8]])
    polygons = [bow, star(rng, 15, 0.3, (0.4, 0.5)), star(rng, 9, 0.3, (0.55, 0.6)), rectangle(0.3, 0.1, 0.7, 0.45)]

    cover = object_cover(NO_BOX, polygons, (5, 8))

    assert np.abs(cover - lattice_cover(polygons, (5, 8))).max() < 5e-3
    assert cover.mean() < 0.9 * sum(object_cover(NO_BOX, [one], (5, 8)).mean() for one in polygons)


@pytest.mark.parametrize("seed", range(20))
def test_polygons_with_corners_on_each_other_match_a_dense_lattice(seed):
    """Corners on a lattice of 6: edges that touch, run along each other and cross in corners."""
    rng = np.random.default_rng(seed)
    polygons = [rng.integers(0, 7, (rng.integers(3, 9), 2)) / 6 for _ in range(rng.integers(1, 5))]
    grid = (int(rng.integers(1, 7)), int(rng.integers(1, 7)))

    assert np.abs(object_cover(NO_BOX, polygons, grid) - lattice_cover(polygons, grid, points=61)).max() < 0.02


def test_a_crossing_counts_each_half_of_a_bow_by_hand():
    # Two triangles that meet at (0.5, 0.5), each of base 1 and height 1/2, and a polygon that hides half of the left one.
    bow = np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])

    np.testing.assert_allclose(object_cover(NO_BOX, [bow], (1, 2)), [[0.5, 0.5]], atol=1e-15)
    union = object_cover(NO_BOX, [bow, rectangle(0, 0, 0.25, 1)], (1, 2))
    np.testing.assert_allclose(union, [[0.5 + (0.25**2) / 0.5, 0.5]], atol=1e-15)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_points=st.integers(4, 30),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_cover_times_cell_area_is_the_polygon_area(seed, num_points, grid):
    polygon = star(np.random.default_rng(seed), num_points, 0.5).astype(np.float32)

    cover = object_cover(NO_BOX, [polygon], grid)

    assert cover.mean() == pytest.approx(shoelace(polygon), abs=1e-12)
    assert cover.min() >= 0
    assert cover.max() <= 1
    np.testing.assert_allclose(object_cover(NO_BOX, [polygon[::-1]], grid), cover, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    corners=st.lists(st.tuples(*[st.integers(0, 11)] * 2, *[st.integers(1, 12)] * 2), min_size=1, max_size=6),
    grid=st.sampled_from([(4, 6), (5, 7), (12, 1)]),
)
def test_a_union_of_rectangles_that_share_edges_is_the_mask_average(corners, grid):
    """Rectangles on a lattice of 12 share corners and edges, where sorting edges could go wrong."""
    corners = [(x, y, min(x + width, 12), min(y + height, 12)) for x, y, width, height in corners]
    mask = np.zeros((12, 12))
    for x1, y1, x2, y2 in corners:
        mask[y1:y2, x1:x2] = 1

    cover = object_cover(NO_BOX, [rectangle(*one) / 12 for one in corners], grid)

    np.testing.assert_allclose(cover, averaged(mask, grid), atol=1e-12)


def test_what_is_outside_the_image_does_not_count():
    polygon = np.array([[-0.5, -0.25], [0.5, -0.25], [0.5, 0.25], [1.2, 1.3], [-0.5, 0.25]])

    cover = object_cover(NO_BOX, [polygon], (4, 3))

    assert np.abs(cover - lattice_cover([polygon], (4, 3))).max() < 5e-3
    assert cover[0, 0] == 1


def test_nearly_parallel_and_nearly_horizontal_edges_keep_the_area():
    thin = np.array([[0.1, 0.3], [0.9, 0.3 + 1e-12], [0.9, 0.7], [0.1, 0.7 - 1e-13]])
    twin = thin + [[0, 1e-15]] * 4

    np.testing.assert_allclose(object_cover(NO_BOX, [thin, twin], (3, 5)).mean(), 0.8 * 0.4, atol=1e-11)


def test_a_cut_to_a_hole_cancels():
    mask = np.zeros((12, 18), dtype=bool)
    mask[2:11, 3:16] = True
    mask[4:8, 6:10] = False
    outlines = [np.array(p).reshape(-1, 2) / [18, 12] for p in mask_polygons(mask)]

    # The outlines cut the pixels' corners, by 1/8 of a pixel each: 4 outside, 4 at the hole, where the mask gains.
    cover = object_cover(NO_BOX, outlines, (4, 6))

    np.testing.assert_allclose(cover.sum() * 9, mask.sum(), atol=1e-9)
    assert np.abs(cover - averaged(mask, (4, 6))).max() <= 1 / 8 / 9 + 1e-9
    assert cover[2, 2] < 0.5


# Run-length masks


def averaged(mask, grid):
    """Means of fractional blocks of pixels, each pixel split by its overlap with the cells."""
    rows, columns = (
        np.array([[max(0, min((i + 1) * n, (p + 1) * c) - max(i * n, p * c)) for p in range(n)] for i in range(c)]) / n
        for n, c in zip(mask.shape, grid, strict=True)
    )
    return rows @ mask @ columns.T


@pytest.mark.parametrize("grid", [(6, 7), (37, 53), (40, 3)])
def test_a_mask_is_averaged_over_fractional_cells(grid):
    mask = np.random.default_rng(2).random((37, 53)) < 0.4

    np.testing.assert_allclose(object_cover(NO_BOX, rle(mask), grid), averaged(mask, grid), atol=1e-12)


def test_a_mask_keeps_rows_and_columns_apart():
    mask = np.zeros((6, 8))
    mask[1, 6:8] = 1

    np.testing.assert_allclose(object_cover(NO_BOX, rle(mask), (3, 4)), [[0, 0, 0, 0.5], [0] * 4, [0] * 4], atol=1e-15)


def test_runs_as_a_list_and_as_a_string_are_the_same():
    # Column by column: 3 x 4 pixels (height x width), the second column and the lower two of the last.
    cover = object_cover(NO_BOX, {"size": [3, 4], "counts": [3, 3, 4, 2]}, (1, 4))

    np.testing.assert_allclose(cover, [[0, 1, 0, 2 / 3]], atol=1e-15)
    text = rle(np.array([[0, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1]]))["counts"].decode()
    np.testing.assert_allclose(object_cover(NO_BOX, {"size": [3, 4], "counts": text}, (1, 4)), cover, atol=1e-15)


# Maps of an image


def test_objects_of_a_class_are_united_and_classes_stay_apart():
    mask = np.zeros((4, 8))
    mask[2:, :6] = 1
    image = one_image(
        [[0, 0, 0.5, 1], [0.25, 0, 0.75, 0.5], [0, 0, 1, 1], [0.1, 0.1, 0.2, 0.2]],
        [2, 2, 2, 0],
        segmentations=[None, [rectangle(0.25, 0, 0.75, 0.5)], rle(mask), None],
    )

    assert image.ids.tolist() == [0, 2]
    np.testing.assert_allclose(image.cover[1], [[1, 1, 1, 0], [1, 1, 1, 0]], atol=1e-7)
    np.testing.assert_allclose(image.cover[0].sum() / 8, 0.01, atol=1e-7)
    assert not image.unknown.any()


def test_crowd_regions_are_unknown_and_not_covered():
    image = one_image([[0, 0, 0.25, 0.5], [0.5, 0, 1, 1]], [1, 1], crowd=[False, True])

    np.testing.assert_allclose(image.cover[0], [[1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(image.unknown[0], [[0, 0, 1, 1], [0, 0, 1, 1]])


def test_a_batch_is_padded_with_empty_places():
    two, none = one_image([[0, 0, 1, 0.5], [0.5, 0, 1, 1]], [3, 1], crowd=[False, True]), one_image([], [])

    cover, unknown = batch_oracle_maps([none, two])

    assert cover.ids.tolist() == unknown.ids.tolist() == [[-1, -1], [1, 3]]
    assert (cover.kind, cover.fill, cover.values.dtype) == ("probability", 0.0, torch.float32)
    assert cover.values.shape == (2, 2, 2, 4)
    assert not cover.values[0].any()
    assert cover.values[1, :, 0, 0].tolist() == [0, 1]
    assert unknown.values[1, :, 0, 3].tolist() == [1, 0]
    assert batch_oracle_maps([none])[0].values.shape == (1, 0, 2, 4)


# Visible area and targets


def test_visible_area_by_hand():
    values = torch.zeros(1, 2, 2, 4)
    values[0, 0, 0, 3], values[0, 1] = 0.5, 1.0

    area = visible_area(LabelMap(values), torch.tensor([[0.5, 0.25, 0.875, 1.0]]))

    # Of cell (0, 3), half filled: half its width and half its height; of the full label the box itself.
    torch.testing.assert_close(area, torch.tensor([[0.5 * 0.25 / 8, 0.375 * 0.75]], dtype=torch.float64))


def test_visible_area_leaves_out_a_hole_and_what_is_beyond_the_extent():
    maps = LabelMap(torch.ones(1, 1, 2, 3), extent=torch.tensor([[0.25, 0.0, 0.75, 0.5]]))

    area = visible_area(maps, torch.tensor([[0.0, 0.0, 0.5, 1.0]]), hole=torch.tensor([[0.25, 0.25, 0.9, 2.0]]))

    torch.testing.assert_close(area, torch.tensor([[0.25 * 0.25]], dtype=torch.float64))


NAN = pytest.approx(float("nan"), nan_ok=True)


def test_targets_by_visible_share():
    # Class 1 fills the left half, class 3 the upper right quarter.
    image = one_image([[0, 0, 0.5, 1], [0.5, 0, 1, 0.5]], [1, 3])

    assert targets(image, WHOLE, tau=1.0) == [0, 1, 0, 1]
    assert targets(image, [0.25, 0.0, 1.0, 1.0], tau=0.5) == [0, 1, 0, 1]
    assert targets(image, [0.25, 0.0, 1.0, 1.0], tau=0.51) == [0, NAN, 0, 1]
    assert targets(image, [0.0, 0.0, 0.5, 1.0]) == [0, 1, 0, 0]
    assert targets(image, [0.5, 0.5, 1.0, 1.0]) == [0, 0, 0, 0]
    assert targets(image, [0.5, 0.0, 1.0, 1.0], hole=[0.5, 0.0, 1.0, 0.5]) == [0, 0, 0, 0]
    assert targets(image, [0.5, 0.0, 1.0, 1.0], hole=[0.5, 0.0, 0.9, 0.5]) == [0, 0, 0, NAN]


def test_rows_and_columns_of_a_crop_are_not_swapped():
    image = one_image([[0.75, 0, 1, 0.5]], [2])

    assert targets(image, [0.75, 0.0, 1.0, 0.5]) == [0, 0, 1, 0]
    assert targets(image, [0.0, 0.75, 0.5, 1.0]) == [0, 0, 0, 0]


def test_a_visible_crowd_is_unknown_unless_a_plain_object_shows():
    image = one_image([[0, 0, 0.25, 1], [0.5, 0, 1, 1], [0.5, 0, 1, 1]], [1, 1, 2], crowd=[False, True, True])

    assert targets(image, WHOLE) == [0, 1, NAN, 0]
    assert targets(image, [0.25, 0.0, 0.5, 1.0]) == [0, 0, 0, 0]
    assert targets(image, [0.25, 0.0, 1.0, 1.0]) == [0, NAN, NAN, 0]
    assert targets(image, [0.2, 0.0, 1.0, 1.0]) == [0, NAN, NAN, 0]
    assert targets(image, [0.0, 0.0, 0.25, 1.0]) == [0, 1, 0, 0]


def test_a_border_in_float32_shows_nothing_of_the_neighbour():
    image = one_image([[0, 0, 1 / 7, 1]], [1], grid=(3, 7))

    for border in np.nextafter(np.float32(1 / 7), [np.float32(0), np.float32(1)]):
        assert targets(image, [float(border), 0.0, 1.0, 1.0]) == [0, 0, 0, 0]


def test_an_object_without_area_is_unknown():
    assert targets(one_image([[0.5, 0.5, 0.5, 0.5]], [2]), [0.0, 0.0, 0.5, 1.0]) == [0, 0, NAN, 0]
    assert targets(one_image([], []), WHOLE) == [0, 0, 0, 0]


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [4]}, "object 0 has label 4, expected 0 to 3"),
        ({"labels": [-1]}, "object 0 has label -1, expected 0 to 3"),
        ({"segmentations": [None, None]}, "one entry an object in each, got 1 boxes, 1 labels, 1 crowd, 2 segm"),
        ({"boxes": [[0.5, 0, 0.4, 1]]}, "object 0 has box .*expected x1 <= x2"),
        ({"boxes": [[np.nan, 0, 0.4, 1]]}, "object 0 has box .*nan.*expected x1 <= x2"),
        ({"boxes": [[10, 5, 60, 30]]}, "far outside .0, 1. of the image"),
        ({"segmentations": [[np.zeros((2, 2))]]}, "object 0 has a polygon of shape .2, 2., expected .3 or more, 2."),
        ({"segmentations": [[[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]]]}, "object 0 has a polygon of shape .6,."),
        ({"segmentations": [[np.full((3, 2), np.nan)]]}, "object 0 has a point that is not finite"),
        ({"segmentations": ["polygon"]}, "object 0 has a segmentation of str"),
        ({"segmentations": [{"size": [3, 4]}]}, "object 0 has a mask that is no RLE .*counts"),
        ({"segmentations": [{"size": [3, 4], "counts": [1, 2]}]}, "runs do not add up to its 3 x 4 pixels"),
        ({"segmentations": [{"size": [3, 4], "counts": "zzz9"}]}, "object 0 has a mask that is no RLE"),
        ({"grid": (0, 4)}, "grid: expected at least one row and one column, got 0 x 4"),
    ],
)
def test_an_object_that_has_no_shape_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        one_image(**{"boxes": [[0, 0, 1, 1]], "labels": [0], **arguments})


def test_maps_that_do_not_fit_are_refused():
    image = one_image([[0, 0, 1, 1]], [3])
    cover, unknown = batch_oracle_maps([image])
    view = CropBox(torch.tensor([WHOLE]))

    with pytest.raises(InputError, match="the maps have class 3, expected 0 to 2"):
        oracle_targets(cover, unknown, view, 3)
    with pytest.raises(InputError, match="tau: expected more than 0 and at most 1, got 0"):
        oracle_targets(cover, unknown, view, 4, tau=0.0)
    with pytest.raises(InputError, match="cover and unknown with the same labels"):
        oracle_targets(cover, batch_oracle_maps([one_image([[0, 0, 1, 1]], [2])])[1], view, 4)
    with pytest.raises(InputError, match="2 boxes and 1 label maps"):
        oracle_targets(cover, unknown, CropBox(torch.tensor([WHOLE, WHOLE])), 4)
    with pytest.raises(InputError, match="one grid for all images, got .*.2, 3.*.2, 4"):
        batch_oracle_maps([image, one_image([[0, 0, 1, 1]], [3], grid=(2, 3))])
    with pytest.raises(InputError, match="expected whole maps of probability, got a map of logit with all classes"):
        visible_area(LabelMap(torch.zeros(1, 2, 2, 4), kind="logit"), view.boxes)
    with pytest.raises(InputError, match="with ids .1, 2, 2, 4."):
        visible_area(LabelMap(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4).long()), view.boxes)


def test_outlines_enclose_what_the_shapes_cover():
    """By hand for boxes and polygons, by the area that they enclose for masks."""
    box = np.array([0.25, 0.5, 0.75, 1.0])
    (outline,) = object_outlines(box, None)
    assert outline.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.75, 1.0], [0.25, 1.0]]
    triangle = np.array([[0.1, 0.2], [0.9, 0.2], [0.5, 0.8]])
    drawn = object_outlines(box, [triangle, triangle / 2])
    assert [points.tolist() for points in drawn] == [triangle.tolist(), (triangle / 2).tolist()]
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[10:30, 15:45] = 1
    mask[15:20, 20:40] = 0  # a hole has an outline of its own
    mask[35:40, 50:60] = 1  # up to the corner

    def area(points):
        x, y = points.T
        return 40 * 60 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2

    outlines = sorted(object_outlines(box, coco_mask.encode(mask)), key=area)
    np.testing.assert_allclose([area(points) for points in outlines], [50, 100, 600], atol=0.6)  # corners are cut
    np.testing.assert_allclose(outlines[2].min(0), [15 / 60, 10 / 40])
    np.testing.assert_allclose(outlines[2].max(0), [45 / 60, 30 / 40])
    with pytest.raises(InputError, match="expected polygons or an RLE"):
        object_outlines(box, 3)
