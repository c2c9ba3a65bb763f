"""Colours, scales and corners of drawn maps, against cases done by hand."""

import numpy as np
import pytest
from PIL import ImageColor

from mlvision.errors import InputError
from mlvision.explain import CONTROLS, EXPLAINERS, build_explainer
from mlvision.explain.gradient import InputXGradient, Saliency
from mlvision.study.render import (
    OUTCOME_COLOURS,
    ExplainedImage,
    ShownMethod,
    colour_table,
    colourise,
    draw_grid,
    number,
    overlay,
    shared_limit,
    upsample,
)

NAN = float("nan")
CAM, OCCLUSION = ShownMethod("cam"), ShownMethod("occlusion", signed=True)


def hot(shape, row, column, value=1.0):
    values = np.zeros(shape, np.float32)
    values[row, column] = value
    return values


def test_signed_colours_are_transparent_at_0_and_apart_on_both_sides():
    values = np.array([[-9, -2, -1, 0, 1, 2, 9]], np.float32)
    red, _, blue, alpha = colourise(values, limit=2.0, signed=True)[0].T.astype(int)
    assert alpha.tolist() == [255, 255, 128, 0, 128, 255, 255]  # proportional to |M|, the same beyond the limit
    assert (blue[:3] > 150).all()
    assert (red[:3] < 60).all()
    assert (red[4:] > 150).all()
    assert (blue[4:] < 60).all()
    assert len(colour_table(True)) == 511


def test_unsigned_colours_get_steadily_lighter_and_nothing_is_drawn_below_0():
    values = np.array([[-5, 0, 1, 2, 3, 4, 8]], np.float32)
    colours = colourise(values, limit=4.0, signed=False)[0].astype(float)
    assert colours[:, 3].tolist() == [0, 0, 64, 128, 191, 255, 255]
    luma = colour_table(False)[:, :3] @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(luma) > -1).all()  # rounding to bytes; jet rises and falls by a hundred
    assert luma[-1] - luma[0] > 150


def test_a_scale_that_ends_at_0_draws_nothing():
    assert not colourise(np.ones((2, 3), np.float32), 0.0, signed=True).any()


def test_the_limit_is_shared_by_the_labels_and_spares_outliers():
    maps = np.zeros((2, 10, 10), np.float32)
    maps[0] = np.arange(100).reshape(10, 10) / 10
    maps[1] = -maps[0]
    maps[1, 0, 0] = -1000
    # Of 200 magnitudes, ordered: place 0.99 * 199 = 197.01 lies between 9.8 (195, 196), 9.9 (197, 198) and 1000 (199).
    assert shared_limit(maps) == pytest.approx(9.9, abs=1e-5)
    assert shared_limit(maps[:1]) < shared_limit(maps[:1] * 3)
    lonely = np.zeros((1, 20, 20), np.float32)
    lonely[0, 3, 4] = -7
    assert shared_limit(lonely) == 7  # the percentile is 0
    assert shared_limit(np.zeros((2, 3, 4), np.float32)) == 0
    assert shared_limit(np.zeros((0, 3, 4), np.float32)) == 0


@pytest.mark.parametrize(("shape", "cell"), [((2, 5), (0, 4)), ((5, 2), (4, 0)), ((1, 4), (0, 3)), ((3, 1), (2, 0))])
def test_the_hot_cell_lights_its_own_corner(shape, cell):
    photo = np.full((60, 90, 3), 90, np.uint8)
    drawn = overlay(photo, hot(shape, *cell), 1.0, signed=True, opacity=1.0)
    row, column = (int((c + 0.5) / n * side) for c, n, side in zip(cell, shape, (60, 90), strict=True))
    assert drawn[row, column, 0] > 200
    assert drawn[row, column, 2] < 60
    changed = (drawn != photo).any(axis=2)
    far_row, far_column = (0 if c else side - 1 for c, side in zip(cell, (60, 90), strict=True))
    if shape[0] > 1:
        assert not changed[far_row].any()
    if shape[1] > 1:
        assert not changed[:, far_column].any()


def test_enlarging_is_linear_between_the_centres_of_cells():
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    H, W = 21, 40
    y = ((np.arange(H) + 0.5) * 3 / H - 0.5).clip(0, 2)
    x = ((np.arange(W) + 0.5) * 5 / W - 0.5).clip(0, 4)
    rows = np.stack([np.interp(x, np.arange(5), row) for row in values.astype(np.float64)])
    expected = np.stack([np.interp(y, np.arange(3), column) for column in rows.T]).T
    np.testing.assert_allclose(upsample(values, (H, W)), expected, atol=1e-5)


def test_the_photo_keeps_its_brightness():
    photo = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    values = hot((4, 6), 1, 2, 3.0)
    assert (overlay(photo, values, 3.0, True, opacity=0.0) == photo).all()
    assert (overlay(photo, np.zeros((4, 6), np.float32), 3.0, True) == photo).all()
    drawn = overlay(photo, values, 3.0, signed=True, opacity=0.5)
    assert (drawn[-5:] == photo[-5:]).all()  # far from the hot cell, whatever is drawn elsewhere
    # By hand, in the middle of the hot cell, which here is one pixel: half photo, half red.
    single = overlay(photo[:4, :6], values, 3.0, signed=True, opacity=0.5)[1, 2]
    assert single.tolist() == [int((p + c) / 2 + 0.5) for p, c in zip(photo[1, 2].tolist(), (226, 44, 18), strict=True)]


def example(maps, **changes):
    scores = np.array([0.9, 0.8, 0.1, 0.2, 0.3], np.float32)  # TP, FP, FN, TN, unknown
    targets = np.array([1, 0, 1, 0, NAN], np.float32)
    photo = np.full((30, 40, 3), 255, np.uint8)
    fields = {"key": "a.jpg", "photo": photo, "scores": scores, "targets": targets, "labels": np.arange(5)}
    return ExplainedImage(**fields | {"maps": maps} | changes)


def test_outcomes_and_their_order():
    image = example({}, labels=np.array([3, -1, 0, 4, 1, 2]))
    assert image.outcomes(0.5) == ["TP", "FP", "FN", "TN", "unknown"]
    assert image.outcomes(np.array([0.95, 0.5, 0.05, 0.5, 0.5]))[:3] == ["FN", "FP", "TP"]
    assert image.labels[image.in_order(0.5)].tolist() == [2, 1, 0, 3, 4]


def grid(image, method=OCCLUSION, **options):
    return draw_grid([image], ["cat", "dog", "sun", "moon", "<sea>"], method, 0.5, tile_px=80, **options)


def columns_of(page, colour):
    """The columns of a page in which pixels have exactly this colour."""
    return np.flatnonzero((page == ImageColor.getrgb(colour)).all(axis=2).sum(axis=0) > 10)


def test_tiles_stand_in_order_with_their_borders_and_share_one_scale():
    maps = np.zeros((5, 3, 4), np.float32)
    maps[0, 0, 3], maps[1, 2, 0], maps[2, 0, 0] = 4.0, -2.0, 1.0
    page = grid(example({"occlusion": maps}))
    assert (page == grid(example({"occlusion": maps}))).all()
    tiles = [columns_of(page, OUTCOME_COLOURS[outcome]) for outcome in ("FN", "FP", "TP", "TN")]
    assert [tile.min() for tile in tiles] == sorted(tile.min() for tile in tiles)
    assert len({tile.min() for tile in tiles}) == 4
    top = np.flatnonzero((page == ImageColor.getrgb(OUTCOME_COLOURS["TP"])).all(axis=2).any(axis=1)).min() + 4
    left = tiles[2].min() + 4
    tile = page[top : top + 54, left : left + 72].astype(int)  # 30 x 40 fitted into 80 less its borders
    reddish = tile[..., 0] - tile[..., 2]
    assert np.unravel_index(reddish.argmax(), reddish.shape)[0] < 18  # first row of cells
    assert np.unravel_index(reddish.argmax(), reddish.shape)[1] >= 54  # last column
    fn = page[top : top + 54, tiles[0].min() + 4 :][:, :72].astype(int)
    # A quarter of the strongest map's value: on the shared scale it is fainter.
    assert 0 < (fn[..., 0] - fn[..., 2]).max() < reddish.max() * 0.6


def test_rows_of_many_labels_continue_below():
    maps = {"cam": np.random.default_rng(0).random((5, 2, 3)).astype(np.float32)}
    wide, narrow = grid(example(maps), CAM), grid(example(maps), CAM, columns=2)
    assert narrow.shape[1] < wide.shape[1]
    assert narrow.shape[0] > wide.shape[0] + 2 * 60


def test_flat_maps_and_maps_without_positive_evidence_are_not_drawn():
    maps = np.ones((5, 2, 3), np.float32)
    maps[1] = -np.arange(6).reshape(2, 3) - 1
    page = grid(example({"cam": maps}), CAM)
    coloured = (page.max(axis=2).astype(int) - page.min(axis=2)) > 60
    borders = np.zeros_like(coloured)
    for colour in OUTCOME_COLOURS.values():
        borders |= (page == ImageColor.getrgb(colour)).all(axis=2)
    assert not (coloured & ~borders).any()


def test_a_contrast_shows_both_its_sides_whatever_the_method():
    maps = np.zeros((2, 2, 3), np.float32)
    maps[0, 0, 0], maps[1, 0, 0], maps[1, 1, 2] = 1, 1, -1
    image = example({"cam": maps}, labels=np.array([0, 0]), against=np.array([-1, 1]))
    page = grid(image, CAM).astype(int)
    assert ((page[..., 2] - page[..., 0]) > 100).any()  # blue: for the second
    alone = example({"cam": maps[:1]}, labels=np.array([0]))
    assert not ((grid(alone, CAM).astype(int)[..., 2] - grid(alone, CAM).astype(int)[..., 0]) > 100).any()


@pytest.mark.parametrize("name", [*EXPLAINERS, *CONTROLS])
def test_methods_are_described_by_a_whole_sentence(name):
    described = ShownMethod.of(name, build_explainer(name)).description
    assert described.endswith(".")
    assert not described.endswith("eq.")
    assert len(described) < 200


def test_numbers_have_three_digits_and_a_real_minus():
    assert [number(v) for v in (0.0, 1.23456, -0.5, 123456.0, 1e-5)] == [
        "0",
        "1.23",
        "\u22120.5",
        "1.23e+05",
        "1.00e\u221205",
    ]


def test_names_of_any_text_are_drawn_in_pages_of_a_few_lines():
    maps = {"occlusion": np.random.default_rng(0).random((5, 2, 3)).astype(np.float32)}
    names = ["two\nlines", "w" * 10_000, "\udcff", "a b " * 10_000, "\u732b"]
    image = example(maps, key="folder/" * 2000, targets=np.ones(5, np.float32))
    page = draw_grid([image], names, OCCLUSION, 0.5, title="t\n" * 3000, tile_px=80)
    assert page.shape[0] < 500
    assert (page != draw_grid([image], list("abcde"), OCCLUSION, 0.5, tile_px=80)[0, 0]).any()
    assert grid(example(maps, key="two\nlines")).shape == grid(example(maps, key="a line")).shape


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(InputError, match=r"a.jpg: maps of cam: expected \[5, h, w\], got \[4, 2, 3\]"):
        example({"cam": np.zeros((4, 2, 3), np.float32)})
    with pytest.raises(InputError, match="a.jpg: maps of cam hold values that are not finite"):
        example({"cam": np.full((5, 2, 3), NAN, np.float32)})
    with pytest.raises(InputError, match="a.jpg: label 5 is beyond the 5 classes"):
        example({}, labels=np.array([5]))
    with pytest.raises(InputError, match="grid: no image has maps of occlusion"):
        grid(example({"cam": np.zeros((5, 2, 3), np.float32)}))


def test_a_contrast_of_magnitudes_has_one_sign():
    maps = np.array([[[0.0, 2.0]], [[1.0, 0.0]]], dtype=np.float32)
    image = example({"saliency": maps}, labels=np.array([0, 0]), against=np.array([-1, 1]))
    slopes = ShownMethod.of("saliency", Saliency())
    assert slopes.magnitudes
    assert not any(image.signed(place, slopes) for place in (0, 1))
    parts = ShownMethod.of("input_x_gradient", InputXGradient())
    assert not parts.magnitudes
    assert all(image.signed(place, parts) for place in (0, 1))
    assert [image.signed(place, CAM) for place in (0, 1)] == [False, True]
