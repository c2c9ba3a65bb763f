"""bands.py: bands of GeoTIFF files as images, by hand; and views of images that have other channels than three."""

import io

import cv2
import numpy as np
import pytest
import tifffile
import torch

from mlvision.data.bands import Band, BandStack, check_bands, read_tiff, rgb_channels
from mlvision.data.images import read_record, record_files
from mlvision.data.limits import MAX_PIXELS
from mlvision.data.loader import ImageDataset, LoaderConfig, eval_loader
from mlvision.data.manifest import Manifest, Record
from mlvision.data.views import EvalView, TrainView, ViewConfig
from mlvision.errors import InputError


def tiff(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, photometric="minisblack", **options)
    return buffer.getvalue()


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 10_000, shape, dtype=np.uint16)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("layout", ["contig", "separate"])
def test_both_layouts_of_many_channels_read_the_same(layout, compression):
    stored = numbers(5, 7, 13)
    array = stored if layout == "contig" else np.moveaxis(stored, 2, 0)
    np.testing.assert_array_equal(
        read_tiff(tiff(array, planarconfig=layout, compression=compression), "x", MAX_PIXELS), stored
    )
    np.testing.assert_array_equal(read_tiff(tiff(stored[:, :, 0]), "x", MAX_PIXELS), stored[:, :, :1])


@pytest.mark.parametrize("channels", [1, 3])
def test_lzw_is_read_with_channels_in_the_files_order(channels):
    stored = numbers(6, 9, channels)
    # OpenCV takes blue, green, red and writes red, green, blue.
    content = cv2.imencode(".tif", stored[:, :, ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 5])[1].tobytes()
    np.testing.assert_array_equal(read_tiff(content, "x", MAX_PIXELS), stored)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98])
def test_truncated_files_are_refused(share):
    content = tiff(numbers(40, 30), compression="zlib")
    with pytest.raises(InputError, match="B04.tif: (the file is empty|cannot be decoded: .)") as caught:
        read_tiff(content[: int(len(content) * share)], "B04.tif", MAX_PIXELS)
    assert "\n" not in str(caught.value)


def test_what_is_no_tiff_is_refused():
    with pytest.raises(InputError, match="B04.tif: cannot be decoded: not a TIFF file"):
        read_tiff(b"<html>404</html>", "B04.tif", MAX_PIXELS)


def folder_stack(*names: str, grid: int = 4, scaling: str = "reflectance_10000") -> BandStack:
    return BandStack(tuple(Band(name, f"{{path}}/{{name}}_{name}.tif") for name in names), scaling, grid)


@pytest.fixture
def patch(tmp_path):
    """A patch of 4 x 4 pixels at 10 m, 2 x 2 at 20 m; one pixel of each band differs."""
    folder = tmp_path / "S2A_7_9"
    folder.mkdir()
    for value, name in enumerate(("B02", "B03", "B04", "B08"), start=1):
        plane = np.full((4, 4), 1000 * value, dtype=np.uint16)
        plane[0, value - 1] = 0
        (folder / f"S2A_7_9_{name}.tif").write_bytes(tiff(plane))
    (folder / "S2A_7_9_B05.tif").write_bytes(tiff(np.array([[0, 4000], [0, 4000]], dtype=np.uint16)))
    return str(folder)


def record(path: str, stack: BandStack) -> Record:
    return Record("S2A_7_9", path, (0,), bands=stack)


def test_three_bands_are_a_picture(patch):
    image = read_record(record(patch, folder_stack("B04", "B03", "B02", scaling="reflectance_3000")))

    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image[3, 3].tolist() == [255, 170, 85]  # 3000, 2000 and 1000 of 3000
    assert image[0].tolist() == [[255, 170, 0], [255, 0, 85], [0, 170, 85], [255, 170, 85]]


def test_other_numbers_of_bands_are_float_and_clipped(patch):
    image = read_record(record(patch, folder_stack("B08", "B02", scaling="reflectance_3000")))

    assert image.dtype == np.float32
    assert image.shape == (4, 4, 2)
    np.testing.assert_allclose(image[3, 3], [1, 1 / 3], rtol=1e-6)  # 4000 of 3000 is clipped
    np.testing.assert_allclose(image[0, :, 0], [1, 1, 1, 0])


def test_coarse_bands_are_resized_to_the_grid_bilinearly(patch):
    image = read_record(record(patch, folder_stack("B05", "B02")))

    # Two pixels over four: their centres lie at 0.5 and 2.5 of the four, so the values run 0, 1/4, 3/4, 1 between them.
    np.testing.assert_allclose(image[:, :, 0], np.tile([0, 0.1, 0.3, 0.4], (4, 1)), atol=1e-6)
    with pytest.raises(InputError, match="S2A_7_9: its bands are of different sizes: B05 2 x 2, B02 4 x 4"):
        read_record(record(patch, folder_stack("B05", "B02", grid=0)))


def test_channels_of_one_file(tmp_path):
    stored = numbers(3, 5, 13)
    path = tmp_path / "scene.tif"
    path.write_bytes(tiff(stored, planarconfig="contig"))
    stack = BandStack((Band("B10", "{path}", 10), Band("B2", "{path}", 1)), "reflectance_10000")

    assert record_files(record(str(path), stack)) == [str(path)]
    np.testing.assert_allclose(read_record(record(str(path), stack)), stored[:, :, [10, 1]] / 10_000, rtol=1e-6)
    with pytest.raises(InputError, match="scene.tif: has 13 channels, band B14 is number 14"):
        read_record(record(str(path), BandStack((Band("B14", "{path}", 13),), "reflectance_10000")))


def test_faulty_bands_are_refused(patch):
    def write(array):
        with open(f"{patch}/S2A_7_9_B02.tif", "wb") as file:
            file.write(tiff(array))

    stack = folder_stack("B02", "B03")
    write(np.full((4, 4), np.nan, dtype=np.float32))
    with pytest.raises(InputError, match="S2A_7_9_B02.tif: holds numbers that are not finite"):
        read_record(record(patch, stack))
    write(numbers(2, 3))
    with pytest.raises(InputError, match="S2A_7_9_B02.tif: is 3 x 2 pixels, expected a square"):
        read_record(record(patch, stack))
    with pytest.raises(InputError, match="S2A_7_9_B11.tif: cannot be read: No such file"):
        read_record(record(patch, folder_stack("B11")))


def test_choices_that_cannot_be_made_are_refused():
    check_bands(["B03", "B02"], ("B02", "B03", "B04"), "reflectance_3000")
    for bands in ([], ["B02", "B02"], ["B99"]):
        with pytest.raises(InputError, match=r"data.bands=.*expected different ones of B02, B03"):
            check_bands(bands, ("B02", "B03"), "reflectance_3000")
    with pytest.raises(InputError, match="data.scaling=bright: expected one of reflectance_10000, reflectance_3000"):
        check_bands(["B02"], ("B02",), "bright")
    rgb = ("B04", "B03", "B02")
    assert rgb_channels(["B01", "B02", "B03", "B04"], rgb) == (3, 2, 1)
    assert rgb_channels(["B08", "B02"], rgb) == (0, 1, 1)


def scene(channels: int) -> np.ndarray:
    return np.random.default_rng(1).random((23, 37, channels), dtype=np.float32)


@pytest.mark.parametrize("backend", ["albumentations", "torchvision"])
def test_each_channel_is_seen_as_any_other(backend):
    image = scene(7)
    view = TrainView(
        ViewConfig(size=16, backend=backend, scale=(0.3, 0.9), quarter_turns=True, interpolation="bicubic")
    )
    for seed in range(6):
        whole = view(image, seed)
        for channels in ([0, 1, 2], [4, 5, 6], [6, 0, 3]):
            part = view(np.ascontiguousarray(image[:, :, channels]), seed)
            assert (part.box, part.flipped, part.quarter_turns) == (whole.box, whole.flipped, whole.quarter_turns)
            torch.testing.assert_close(part.image, whole.image[channels])
        assert whole.image.dtype == torch.float32
        assert 0 <= whole.image.min() < whole.image.max() <= 1


def test_evaluation_views_of_bands_stay_in_range_and_channels_last():
    image = (scene(5) > 0.5).astype(np.float32)
    seen = EvalView((9, 12), interpolation="bicubic")(image).image
    assert seen.shape == (5, 9, 12)
    assert seen.min() >= 0
    assert seen.max() <= 1
    assert seen.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("option", ["color_jitter", "hue", "randaugment_ops", "cutout"])
def test_changes_of_colour_need_three_channels(option):
    view = TrainView(ViewConfig(size=16, **{option: 1 if option == "randaugment_ops" else 0.3}))
    with pytest.raises(InputError, match=f"view.{option}: expected 0 for images of 5 channels"):
        view(scene(5), 0)


def test_batches_of_bands(patch):
    stack = folder_stack("B08", "B04", "B03", "B02")
    manifest = Manifest(("sea",), tuple(record(patch, stack) for _ in range(3)), "test")
    assert manifest.num_channels == 4

    (batch,) = eval_loader(manifest, EvalView((4, 4)), LoaderConfig(num_workers=0, eval_batch_size=3))

    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (3, 4, 4, 4)
    torch.testing.assert_close(batch.images[1], ImageDataset(manifest, EvalView((4, 4)))[0, 0].views[0].image)
    np.testing.assert_allclose(batch.images[2, :, 3, 3], [0.4, 0.3, 0.2, 0.1], rtol=1e-5)
