import pickle
import random
from dataclasses import replace

import cv2
import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms.v2 import functional as F

from mlvision.data import views
from mlvision.data.views import BACKENDS, EvalView, TrainView, ViewConfig
from mlvision.errors import InputError

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
COLOURFUL = {"color_jitter": 0.4, "hue": 0.1, "randaugment_ops": 2, "cutout": 0.3}

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Shapes of every colour with some texture, few pixels at the ends of the range: much like a photograph."""
    noise = np.random.default_rng(seed).standard_normal((height, width, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), min(height, width) / 16)
    return np.clip(128 + 45 * smooth / smooth.std() + 5 * noise, 0, 255).astype(np.uint8)


def ramp(height: int, width: int) -> np.ndarray:
    """Each pixel states its own place: red is 6 * column, green is 9 * row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([6 * columns, 9 * rows, np.full_like(rows, 77)], axis=2).astype(np.uint8)


def pixels(view: views.View) -> np.ndarray:
    """`[H, W, 3]` as signed numbers."""
    return view.image.permute(1, 2, 0).numpy().astype(int)


def pixel_box(view: views.View, image: np.ndarray) -> list[int]:
    """The view's box in pixels; it must lie on their edges."""
    height, width = image.shape[:2]
    box = np.multiply(view.box, (width, height, width, height))
    assert np.abs(box - box.round()).max() < 1e-9
    return box.round().astype(int).tolist()


def resize_with_pillow(image: np.ndarray, size: tuple[int, int], interpolation: str = "bilinear") -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size[::-1], RESAMPLING[interpolation])).astype(int)


# The box


@each_backend
@pytest.mark.parametrize("size", [(14, 22), (40, 24)])
def test_cutting_the_box_out_again_gives_the_view(backend, size):
    image = photo(31, 53)
    view_of = TrainView(ViewConfig(backend=backend), size)
    flips, boxes = set(), set()
    for seed in range(60):
        view = view_of(image, seed)
        x1, y1, x2, y2 = pixel_box(view, image)
        again = resize_with_pillow(image[y1:y2, x1:x2], size)
        assert np.abs(pixels(view) - (again[:, ::-1] if view.flipped else again)).max() <= 1
        flips.add(view.flipped)
        boxes.add(view.box)
    assert flips == {True, False}
    assert len(boxes) > 50


@each_backend
def test_pixels_that_state_their_place_agree_with_box_and_flip(backend):
    image = ramp(27, 41)
    view_of = TrainView(ViewConfig(backend=backend, scale=(0.3, 1.0)), (12, 16))
    for seed in range(60):
        view = view_of(image, seed)
        x1, y1, x2, y2 = pixel_box(view, image)
        # Where the centres of the view's pixels lie in the image, counted in its pixels.
        columns = x1 + (np.arange(16) + 0.5) / 16 * (x2 - x1) - 0.5
        rows = y1 + (np.arange(12) + 0.5) / 12 * (y2 - y1) - 0.5
        if view.flipped:
            columns = columns[::-1]
        inner = pixels(view)[3:-3, 3:-3]  # at the border the antialiasing window is cut off, and its centre moves
        assert np.abs(inner[..., 0] - 6 * columns[None, 3:-3]).max() <= 1.5
        assert np.abs(inner[..., 1] - 9 * rows[3:-3, None]).max() <= 1.5


@each_backend
def test_colours_and_cutout_do_not_move_the_view(backend):
    image = photo(40, 60)
    plain = TrainView(ViewConfig(backend=backend), (24, 24))
    colourful = TrainView(ViewConfig(backend=backend, **COLOURFUL), (24, 24))
    for seed in range(30):
        first, second = plain(image, seed), colourful(image, seed)
        assert (first.box, first.flipped) == (second.box, second.flipped)
        assert not torch.equal(first.image, second.image)


# The seed


@pytest.mark.parametrize("backend", BACKENDS)
def test_quarter_turns_turn_the_finished_view_and_nothing_else(backend):
    image = photo(60, 90)
    config = ViewConfig(size=32, backend=backend, color_jitter=0.3, cutout=0.3)
    upright, turning = TrainView(config), TrainView(replace(config, quarter_turns=True))
    turns = []
    for seed in range(60):
        plain, turned = upright(image, seed), turning(image, seed)
        assert (turned.box, turned.flipped) == (plain.box, plain.flipped)
        np.testing.assert_array_equal(pixels(turned), np.rot90(pixels(plain), turned.quarter_turns))
        turns.append(turned.quarter_turns)
    assert set(turns) == {0, 1, 2, 3}
    flips = [turning(image, seed).flipped for seed in range(60)]
    assert abs(np.corrcoef(flips, turns)[0, 1]) < 0.4
    with pytest.raises(InputError, match="view.quarter_turns: expected square views, got 32x48"):
        TrainView(replace(config, quarter_turns=True), size=(32, 48))


@each_backend
def test_the_seed_alone_determines_a_view(backend):
    image, other = photo(40, 60), photo(25, 30, seed=1)
    config = ViewConfig(backend=backend, size=16, **COLOURFUL)
    view_of = TrainView(config)
    alone = [TrainView(config)(image, seed) for seed in (3, 2**64 - 1)]
    view_of(other, 9)
    again = [view_of(image, 3), pickle.loads(pickle.dumps(view_of))(image, 2**64 - 1)]
    for first, second in zip(alone, again, strict=True):
        assert torch.equal(first.image, second.image)
        assert (first.box, first.flipped) == (second.box, second.flipped)
    assert alone[0].box != alone[1].box


@each_backend
def test_global_random_states_are_neither_used_nor_changed(backend):
    view_of = TrainView(ViewConfig(backend=backend, size=16, **COLOURFUL))
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    for seed in range(5):
        view_of(photo(20, 30), seed)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    assert random.getstate() == python_state


@each_backend
def test_the_image_itself_is_left_as_it_was(backend):
    image = photo(16, 16)  # as large as the view, so that nothing needs to be copied before the colours change
    before = image.copy()
    config = ViewConfig(backend=backend, size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), **COLOURFUL)
    view_of = TrainView(config)
    for seed in range(40):
        view_of(image, seed)
    EvalView((16, 16))(image)
    np.testing.assert_array_equal(image, before)


# The two backends


def geometry(config: ViewConfig, num_views: int) -> dict[str, np.ndarray]:
    """What the boxes and flips of many views of a 45 x 80 image are like."""
    view_of = TrainView(config, (8, 8))
    image = photo(45, 80)
    views = [view_of(image, seed) for seed in range(num_views)]
    x1, y1, x2, y2 = np.array([view.box for view in views]).T
    return {
        "area": (x2 - x1) * (y2 - y1),
        "ratio": (x2 - x1) * 80 / ((y2 - y1) * 45),
        "x": x1,
        "y": y1,
        "flip": np.array([view.flipped for view in views], dtype=float),
    }


def test_both_backends_draw_from_the_same_distributions():
    config = ViewConfig(scale=(0.1, 0.8), ratio=(0.5, 1.5), flip=0.3)
    ours, twins = (geometry(replace(config, backend=backend), 1500) for backend in ("albumentations", "torchvision"))
    for name in ("area", "ratio", "x", "y"):
        assert ks_2samp(ours[name], twins[name]).pvalue > 0.01, name
        # Three standard errors of a difference of means.
        assert abs(ours[name].mean() - twins[name].mean()) < 3 * ours[name].std() * np.sqrt(2 / 1500), name
    for drawn in (ours, twins):
        assert abs(drawn["flip"].mean() - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 1500)
        assert 0.09 < drawn["area"].min() < 0.12
        assert 0.45 < drawn["ratio"].min() < 0.56
        assert 1.4 < drawn["ratio"].max() < 1.6


@each_backend
def test_flips_do_not_depend_on_the_crop(backend):
    drawn = geometry(ViewConfig(backend=backend), 1500)
    for name in ("area", "ratio", "x", "y"):
        # Correlation; albumentations' own seeding gives -0.5 with the area.
        assert abs(np.corrcoef(drawn[name], drawn["flip"])[0, 1]) < 0.08, name


def test_both_backends_give_the_same_pixels_for_the_whole_image():
    image = photo(45, 80)
    config = ViewConfig(scale=(1.0, 1.0), ratio=(80 / 45, 80 / 45), flip=0.0, interpolation="bicubic")
    ours, twin = (TrainView(replace(config, backend=b), (30, 20))(image, 0) for b in ("albumentations", "torchvision"))
    assert ours.box == twin.box == (0, 0, 1, 1)
    assert torch.equal(ours.image, twin.image)
    assert np.abs(pixels(ours) - resize_with_pillow(image, (30, 20), "bicubic")).max() <= 3


@pytest.mark.parametrize(
    ("position", "largest", "mean"),
    [
        (0, 0, 0),  # identity
        (1, 1, 1),  # autocontrast
        (2, 12, 4),  # equalize: the two shift the cumulated histogram by up to one of its bins
        (3, 0, 0),  # posterize
        (4, 0, 0),  # solarize
        (5, 1, 0.6),  # sharpness: rounded, or cut off to a whole number
    ],
)
def test_photometric_operations_agree(position, largest, mean):
    image = photo(120, 160)
    ours = views._albumentations_operations(7.0)[position]
    twin = views._torchvision_operations(7.0)[position]
    changed = ours(image=image.copy())["image"].astype(int)
    expected = twin(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy().astype(int)
    inner = np.s_[1:-1, 1:-1]  # sharpness leaves the border as it is in one and not in the other
    assert np.abs(changed - expected)[inner].max() <= largest
    assert np.abs(changed - expected)[inner].mean() <= mean
    if position:
        assert np.abs(changed - image).mean() > 0.2


@pytest.mark.parametrize(
    ("position", "name", "adjust"),
    [
        (6, "brightness", F.adjust_brightness),
        (7, "contrast", F.adjust_contrast),
        (8, "saturation", F.adjust_saturation),
    ],
)
def test_photometric_factors_agree(position, name, adjust):
    image = photo(60, 80)
    ours = views._albumentations_operations(7.0)[position]
    twin = views._torchvision_operations(7.0)[position]
    for factors in (getattr(ours, name), getattr(twin, name)):
        assert factors == pytest.approx((0.37, 1.63))
    for seed in range(5):
        ours.set_random_seed(seed)
        changed = ours(image=image.copy())["image"].astype(int)
        factor = ours.params[name]
        assert abs(factor - 1) > 0.01
        expected = adjust(torch.from_numpy(image).permute(2, 0, 1), factor).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(changed - expected).max() <= 2


@each_backend
def test_cutout_is_one_rectangle_of_one_colour(backend):
    image = photo(60, 80)
    config = ViewConfig(backend=backend)
    plain, cut = TrainView(config, (32, 40)), TrainView(replace(config, cutout=0.3), (32, 40))
    corners, colours = [], set()
    for seed in range(40):
        after = pixels(cut(image, seed))
        changed = (after != pixels(plain(image, seed))).any(axis=2)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert np.ptp(rows) + 1 == 9  # int(0.3 * 32)
        assert np.ptp(columns) + 1 == 12  # 0.3 * 40
        hole = after[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (hole == hole[0, 0]).all()
        colours.add(tuple(hole[0, 0]))
        corners.append((rows[0], columns[0]))
    assert len(colours) == 40
    # Evenly spread over the 24 rows and 29 columns where it fits.
    assert np.mean(corners, axis=0) == pytest.approx([11.5, 14], abs=4)


# Resizing


@pytest.mark.parametrize("interpolation", RESAMPLING)
@pytest.mark.parametrize("size", [(128, 128), (90, 230), (500, 640)])
def test_the_resizer_is_pillows(interpolation, size):
    image = photo(375, 500)
    view = EvalView(size, interpolation)(image)
    difference = np.abs(pixels(view) - resize_with_pillow(image, size, interpolation))
    assert difference.max() <= 3
    assert difference.mean() < 0.03
    assert (view.box, view.flipped) == ((0, 0, 1, 1), False)


@each_backend
def test_training_views_are_antialiased(backend):
    stripes = np.zeros((90, 90, 3), dtype=np.uint8)
    stripes[:, ::2] = 254
    view = TrainView(ViewConfig(backend=backend, scale=(1.0, 1.0), ratio=(1.0, 1.0)), (28, 28))(stripes, 0)
    assert np.abs(pixels(view)[:, 1:-1] - 127).max() < 12  # without antialiasing: stripes between 0 and 254


def test_evaluation_crop_is_timms():
    image = photo(91, 140)
    expected_of = timm.data.create_transform(
        input_size=(3, 64, 64), interpolation="bicubic", crop_pct=0.875, mean=(0, 0, 0), std=(1, 1, 1)
    )
    for turned in (image, image.transpose(1, 0, 2)):
        expected = (expected_of(Image.fromarray(turned)) * 255).round().permute(1, 2, 0).numpy()
        view = EvalView((64, 64), "bicubic", "crop", 0.875)(turned)
        assert np.abs(pixels(view) - expected).max() <= 3


@pytest.mark.parametrize(("size", "crop_pct"), [((12, 16), 0.8), ((16, 10), 1.0), ((14, 14), 0.9)])
def test_evaluation_crop_states_its_box(size, crop_pct):
    image = ramp(27, 41)
    view = EvalView(size, "bilinear", "crop", crop_pct)(image)
    x1, y1, x2, y2 = view.box
    columns = (x1 + (np.arange(size[1]) + 0.5) / size[1] * (x2 - x1)) * 41 - 0.5
    rows = (y1 + (np.arange(size[0]) + 0.5) / size[0] * (y2 - y1)) * 27 - 0.5
    inner = pixels(view)[2:-2, 2:-2]
    assert np.abs(inner[..., 0] - 6 * columns[None, 2:-2]).max() <= 1.5
    assert np.abs(inner[..., 1] - 9 * rows[2:-2, None]).max() <= 1.5
    assert x1 + x2 == pytest.approx(1, abs=0.1)
    assert y1 + y2 == pytest.approx(1, abs=0.1)
    # crop_pct of the side that fits more tightly, up to the rounding to whole pixels; the aspect ratio is kept.
    assert max(x2 - x1, y2 - y1) == pytest.approx(crop_pct, abs=0.05)
    assert (x2 - x1) * 41 / ((y2 - y1) * 27) == pytest.approx(size[1] / size[0], rel=0.05)


# Bad options


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("backend", "kornia"),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.5, 1.5)),
        ("ratio", (2.0, 1.0)),
        ("flip", 1.5),
        ("color_jitter", -0.1),
        ("hue", 0.6),
        ("randaugment_ops", -1),
        ("randaugment_magnitude", 11.0),
        ("cutout", 1.0),
        ("eval_resize", "pad"),
        ("crop_pct", 0.0),
        ("interpolation", "nearest"),
    ],
)
def test_a_bad_option_is_named(field, value):
    with pytest.raises(InputError, match=rf"^view\.{field}: expected .*, got .*{str(value)[-3:-1]}") as error:
        ViewConfig(**{field: value})
    assert "\n" not in str(error.value)
