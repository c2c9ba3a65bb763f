"""images.py against Pillow's own conversions, the arithmetic of its docstring, and files broken on purpose."""

import io
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from mlvision.data import check
from mlvision.data import images as images_module
from mlvision.data import jpeg as jpeg_module
from mlvision.data.images import (
    FORMATS,
    check_size,
    decode_image,
    drop_unreadable,
    read_image,
    read_record,
    read_size,
    rgb_array,
)
from mlvision.data.manifest import Manifest, Record
from mlvision.errors import InputError

ORIENTATION = 0x0112


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth picture without symmetry, so that JPEG keeps it and every turn shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, channels), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


@pytest.mark.parametrize("size", [(37, 53), (1, 1), (129, 70)])
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"subsampling": 0, "quality": 100}),
        ("JPEG", "RGB", {"subsampling": 1, "progressive": True}),
        ("JPEG", "RGB", {"keep_rgb": True}),
        ("JPEG", "RGB", {"quality": 20, "restart_marker_blocks": 2}),
        ("JPEG", "L", {}),
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("BMP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ],
)
def test_opaque_files_are_bit_for_bit_what_pillow_reads(size, kind, mode, options):
    data = encode(Image.fromarray(picture(*size)).convert(mode), kind, **options)

    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    np.testing.assert_array_equal(decode_image(data, "x"), expected)


def test_files_that_both_read_alike_take_the_fast_path_and_others_do_not(monkeypatch):
    monkeypatch.setattr(images_module, "_decode_by_pillow", lambda *_: pytest.fail("Pillow was asked"))
    colour, grey = Image.fromarray(picture(20, 30)), Image.fromarray(picture(20, 30, 1)[:, :, 0])
    for image in (colour, grey):
        decode_image(encode(image, "JPEG"), "x")
        decode_image(encode(image, "JPEG", exif=exif(6)), "x")
        decode_image(encode(image, "PNG"), "x")

    of_pillow = np.full((1, 1, 3), 9, dtype=np.uint8)
    monkeypatch.setattr(images_module, "_decode_by_pillow", lambda *_: of_pillow)
    for data in (
        encode(colour, "PNG", exif=exif(6)),
        encode(colour.convert("CMYK"), "JPEG"),
        encode(colour.convert("RGBA"), "PNG"),
        encode(colour.convert("P"), "PNG"),
        encode(colour, "PNG", transparency=(0, 0, 0)),
    ):
        assert decode_image(data, "x") is of_pillow


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_as_pillow_does(kind, orientation):
    data = encode(Image.fromarray(picture(24, 40)), kind, exif=exif(orientation))

    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))

    read = decode_image(data, "x")
    assert read.shape == ((40, 24, 3) if orientation >= 5 else (24, 40, 3))
    np.testing.assert_array_equal(read, expected)


def test_exif_rotation_by_hand():
    # Exif 2.32, tag Orientation: 6 means that row 0 of the file is the right side of the picture, column 0 its top;
    # 3 means that row 0 is the bottom, column 0 the right side.
    stored = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    turned = decode_image(encode(Image.fromarray(stored), "PNG", exif=exif(6)), "x")
    upside_down = decode_image(encode(Image.fromarray(stored), "PNG", exif=exif(3)), "x")

    np.testing.assert_array_equal(turned[:, :, 0], [[4, 1], [5, 2], [6, 3]])
    np.testing.assert_array_equal(upside_down[:, :, 0], [[6, 5, 4], [3, 2, 1]])


def test_a_broken_exif_block_does_not_cost_the_image():
    data = encode(Image.fromarray(picture(20, 30)), "JPEG", exif=b"Exif\0\0garbage")

    assert decode_image(data, "x").shape == (20, 30, 3)


def test_cmyk_and_ycck_jpeg():
    # A red page: no cyan, full magenta and yellow, no black.
    red = Image.merge("CMYK", [Image.new("L", (24, 16), ink) for ink in (0, 255, 255, 0)])
    cmyk = encode(red, "JPEG", quality=100)
    np.testing.assert_allclose(decode_image(cmyk, "x").mean((0, 1)), [255, 0, 0], atol=3)

    # The same page as YCCK: Adobe stores ink amounts as if they were RGB, so (0, 255, 255) -> Y, Cb, Cr = 179, 171, 1,
    # and black inverted (255). Pillow inverts what it writes; the last byte of the Adobe segment says YCCK (2).
    planes = Image.merge("CMYK", [Image.new("L", (24, 16), 255 - value) for value in (179, 171, 1, 255)])
    data = bytearray(encode(planes, "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2
    np.testing.assert_allclose(decode_image(bytes(data), "x").mean((0, 1)), [255, 0, 0], atol=3)


@pytest.mark.parametrize("extension", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_channels_are_divided_by_257_and_rounded(extension, channels):
    stored = np.random.default_rng(0).integers(0, 65536, (12, 20, channels), dtype=np.uint16)
    stored[0, :4] = np.array([0, 65535, 128, 129])[:, None]  # 128 / 257 rounds down, 129 / 257 up
    data = cv2.imencode(extension, stored)[1].tobytes()

    expected = np.broadcast_to(np.round(stored[:, :, ::-1] / 257), (12, 20, 3))

    np.testing.assert_array_equal(decode_image(data, "x"), expected)
    assert decode_image(data, "x")[0, :4, 0].tolist() == [0, 255, 0, 1]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_files_are_turned_once(kind):
    stored = np.array([[0, 257, 514], [771, 1028, 1285]], dtype=np.uint16)

    read = decode_image(encode(Image.fromarray(stored), kind, exif=exif(6)), "x")

    np.testing.assert_array_equal(read[:, :, 0], [[3, 0], [4, 1], [5, 2]])


def test_16_bit_transparency_is_composited_over_white():
    bgra = np.random.default_rng(1).integers(0, 65536, (9, 14, 4), dtype=np.uint16)
    bgra[0, 0, 3], bgra[0, 1, 3] = 0, 65535
    opacity = bgra[:, :, 3:] / 65535
    expected = np.round((bgra[:, :, 2::-1] * opacity + 65535 * (1 - opacity)) / 257)

    read = decode_image(cv2.imencode(".png", bgra)[1].tobytes(), "x")

    np.testing.assert_array_equal(read, expected)
    assert read[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_composited_over_white(mode):
    colour = picture(16, 27, 3)
    alpha = np.random.default_rng(2).integers(0, 256, (16, 27), dtype=np.uint8)
    alpha[0, 0], alpha[0, 1] = 0, 255
    image = Image.fromarray(colour).convert(mode)
    opaque = np.asarray(image.convert("RGB")).astype(float)
    image.putalpha(Image.fromarray(alpha))
    opacity = alpha[:, :, None] / 255

    read = decode_image(encode(image, "PNG"), "x")

    np.testing.assert_allclose(read, opaque * opacity + 255 * (1 - opacity), atol=1)
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read[0, 1].tolist() == opaque[0, 1].tolist()


def test_palette_with_and_without_transparency():
    indices = np.array([[0, 1, 2], [2, 0, 1]], dtype=np.uint8)
    image = Image.fromarray(indices, mode="P")
    image.putpalette([10, 20, 30, 200, 100, 0, 7, 8, 9])
    colours = np.array([[10, 20, 30], [200, 100, 0], [7, 8, 9]])
    np.testing.assert_array_equal(decode_image(encode(image, "PNG"), "x"), colours[indices])

    colours[1] = 255  # the transparent entry shows the white behind it
    for kind in ("PNG", "GIF"):
        data = encode(image, kind, transparency=1)
        np.testing.assert_array_equal(decode_image(data, "x"), colours[indices])


def test_a_colour_declared_transparent_shows_white():
    stored = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)

    read = decode_image(encode(Image.fromarray(stored), "PNG", transparency=(4, 5, 6)), "x")

    assert read.tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_pillow_images_read_as_their_files_do():
    for data in (
        encode(Image.fromarray(picture(20, 33)), "JPEG", exif=exif(8)),
        encode(Image.fromarray(picture(20, 33)).convert("CMYK"), "JPEG"),
        encode(Image.fromarray(picture(20, 33, 4)), "PNG"),
        encode(Image.fromarray(picture(20, 33, 1)[:, :, 0].astype(np.uint16) * 200), "PNG"),
    ):
        np.testing.assert_array_equal(rgb_array(Image.open(io.BytesIO(data))), decode_image(data, "x"))


TRUNCATED = {
    "baseline": lambda: encode(Image.fromarray(picture(160, 225)), "JPEG"),
    "progressive": lambda: encode(Image.fromarray(picture(160, 225)), "JPEG", progressive=True),
    "exif": lambda: encode(Image.fromarray(picture(160, 225)), "JPEG", exif=exif(3)),
    "cmyk": lambda: encode(Image.fromarray(picture(160, 225)).convert("CMYK"), "JPEG"),
    "png": lambda: encode(Image.fromarray(picture(160, 225)), "PNG"),
    "palette": lambda: encode(Image.fromarray(picture(160, 225)).convert("P"), "PNG"),
    "16-bit": lambda: cv2.imencode(".png", picture(160, 225).astype(np.uint16) * 200)[1].tobytes(),
    "tiff": lambda: encode(Image.fromarray(picture(160, 225)), "TIFF"),
    "webp": lambda: encode(Image.fromarray(picture(160, 225)), "WEBP"),
}


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", TRUNCATED)
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, kind, share):
    data = TRUNCATED[kind]()
    path = tmp_path / "photo.img"
    path.write_bytes(data[: int(len(data) * share)])

    with pytest.raises(InputError, match=f"{path}: ") as caught:
        read_image(str(path))
    assert "\n" not in str(caught.value)
    path.write_bytes(data)
    assert read_image(str(path)).shape == (160, 225, 3)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95, 0.999])
def test_a_truncated_jpeg_is_an_error_whatever_opencv_says(monkeypatch, share):
    # OpenCV 4 fills the missing rows with grey and returns the image; OpenCV 5 returns None.
    monkeypatch.setattr(images_module.cv2, "imdecode", lambda *_: np.full((160, 225, 3), 128, dtype=np.uint8))
    data = encode(Image.fromarray(picture(160, 225)), "JPEG")

    with pytest.raises(InputError, match="photo.jpg: cannot be decoded: .*[Tt]runcated"):
        decode_image(data[: int(len(data) * share)], "photo.jpg")


def test_bytes_after_the_end_of_a_jpeg_are_passed_over():
    data = encode(Image.fromarray(picture(160, 225)), "JPEG")
    for padding in (b"\0" * 512, b"some camera's private notes", data):
        np.testing.assert_array_equal(decode_image(data + padding, "x"), decode_image(data, "x"))


JPEGS = {
    "baseline": lambda image: encode(image, "JPEG", quality=90),
    "progressive": lambda image: encode(image, "JPEG", quality=90, progressive=True),
    "own tables": lambda image: encode(image, "JPEG", quality=50, optimize=True),
    "restarts": lambda image: encode(image, "JPEG", quality=90, restart_marker_blocks=8),
    "grey": lambda image: encode(image.convert("L"), "JPEG"),
    "cmyk": lambda image: encode(image.convert("CMYK"), "JPEG"),
    "exif": lambda image: encode(image, "JPEG", exif=exif(6)),
}
END = b"\xff\xd9"
# What a broken download or disk makes of a file: (content, its half) to content.
DAMAGE = {
    "second half zeros": lambda data, half: data[:half] + bytes(len(data) - half),
    "second half zeros, closed": lambda data, half: data[:half] + bytes(len(data) - half - 2) + END,
    "second half 0xff": lambda data, half: data[:half] + b"\xff" * (len(data) - half),
    "second half 0xff, closed": lambda data, half: data[:half] + b"\xff" * (len(data) - half - 2) + END,
    "cut": lambda data, half: data[:half],
    "cut and closed": lambda data, half: data[:half] + END,
    "last hundredth lost, closed": lambda data, half: data[: len(data) * 99 // 100] + END,
    "end marker lost": lambda data, half: data[:-2],
    "a sector lost": lambda data, half: data[:half] + data[half + 512 :],
    "a sector twice": lambda data, half: data[: half + 512] + data[half:],
    "noise": lambda data, half: (
        data[:half] + np.random.default_rng(0).integers(0, 256, len(data) - half - 2, dtype=np.uint8).tobytes() + END
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", JPEGS)
def test_a_damaged_jpeg_is_an_error_that_says_so(capfd, kind, damage):
    noise = np.random.default_rng(1).normal(scale=12, size=(240, 320, 3))
    data = JPEGS[kind](Image.fromarray((picture(240, 320) + noise).clip(0, 255).astype(np.uint8)))
    assert decode_image(data, "x").size == 240 * 320 * 3

    with pytest.raises(InputError, match="photo.jpg: cannot be decoded: ") as caught:
        decode_image(DAMAGE[damage](data, len(data) // 2), "photo.jpg")

    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # what libjpeg printed is in the error


def test_other_words_on_standard_error_arrive_there(capfd):
    data = bytearray(encode(Image.fromarray(picture(16, 24)), "JPEG"))
    data[data.index(b"JFIF") + 5] = 7  # a revision that libjpeg does not know, and reads all the same

    def decode() -> str:
        os.write(2, b"half a line, ")
        os.write(2, b"Corrupt JPEG data: 3 extraneous bytes before marker 0xd9\nand the rest\n")
        return "value"

    assert decode_image(bytes(data), "x").shape == (16, 24, 3)
    assert jpeg_module._Listener().hear(decode) == ("value", "Corrupt JPEG data: 3 extraneous bytes before marker 0xd9")
    assert capfd.readouterr().err == (
        "Warning: unknown JFIF revision number 7.01\n" + "half a line, and the rest\n" * 2  # heard twice: again, alone
    )


def test_damage_is_told_of_the_right_file_among_threads():
    whole = encode(Image.fromarray(picture(90, 120)), "JPEG")
    contents = [whole if i % 3 else whole[: len(whole) // 2] + END for i in range(120)]

    def is_damaged(content: bytes) -> bool:
        try:
            decode_image(content, "x")
        except InputError:
            return True
        return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(is_damaged, contents)) == [i % 3 == 0 for i in range(120)]


def test_decoding_goes_on_without_standard_error(tmp_path):
    data = encode(Image.fromarray(picture(90, 120)), "JPEG")
    (tmp_path / "whole.jpg").write_bytes(data)
    (tmp_path / "bad.jpg").write_bytes(data[: len(data) // 2] + END)
    code = """
import os, sys
from mlvision.data.images import read_image
os.close(2)
print(read_image(sys.argv[1]).shape)
try:
    read_image(sys.argv[2])
except ValueError as error:
    print(error)
"""
    names = [str(tmp_path / name) for name in ("whole.jpg", "bad.jpg")]
    run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)

    assert run.stdout.startswith("(90, 120, 3)\n")
    assert "bad.jpg: cannot be decoded: damaged: Corrupt JPEG data: premature end of data segment" in run.stdout


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("kind", ["IHDR", "gAMA", "tEXt", "IDAT", "IEND"])
def test_every_checksum_of_a_png_counts(kind, depth):
    pixels = picture(160, 225).astype(np.uint16) * 200 if depth == 16 else picture(160, 225)
    data = cv2.imencode(".png", pixels)[1].tobytes()
    data = data[:33] + chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"tEXt", b"Title\0a") + data[33:]
    whole = decode_image(data, "x")
    assert whole.shape == (160, 225, 3)

    start = data.index(kind.encode())
    length = int.from_bytes(data[start - 4 : start])
    for position in {
        start + 4 + length,
        start + 7 + length,
        start + 3 + length,
    }:  # checksum, or the last byte before it
        damaged = bytearray(data)
        damaged[position] ^= 1
        with pytest.raises(InputError, match="photo.png: cannot be decoded: damaged: the checksum of its chunk"):
            decode_image(bytes(damaged), "photo.png")
    np.testing.assert_array_equal(decode_image(data + b"padding", "x"), whole)


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("kind", TRUNCATED)
def test_zeros_in_place_of_the_rest_are_an_error_where_the_format_can_tell(kind, share):
    data = TRUNCATED[kind]()
    kept = int(len(data) * share)
    try:
        read = decode_image(data[:kept] + bytes(len(data) - kept), "photo.img")
    except InputError as error:
        assert str(error).startswith("photo.img: ")  # noqa: PT017
    else:  # raw pixels and video frames have neither checksums nor an end
        assert kind in ("tiff", "webp")
        assert read.shape == (160, 225, 3)


FORMAT_OF = {
    suffix: kind for kind, suffixes in FORMATS.items() for suffix in suffixes if suffix not in (".mpo", ".avifs")
}


@pytest.mark.parametrize("suffix", sorted(FORMAT_OF))
def test_every_suffix_is_pillows_and_every_format_is_read_within_one_limit(monkeypatch, suffix):
    Image.init()
    assert Image.registered_extensions()[suffix] == FORMAT_OF[suffix]
    data = encode(Image.fromarray(picture(24, 40)), FORMAT_OF[suffix])
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit, far below what is allowed here

    read = decode_image(data, "x", max_pixels=24 * 40)

    assert Image.MAX_IMAGE_PIXELS == 100
    np.testing.assert_array_equal(read, expected)
    with pytest.raises(InputError, match=r"photo: 40 x 24 pixels are more than max_pixels allows \(959\)"):
        decode_image(data, "photo", max_pixels=24 * 40 - 1)


@pytest.mark.parametrize("kind", ["PNG", "palette PNG", "JPEG", "exif JPEG", "TIFF", "BMP", "GIF"])
def test_the_size_is_looked_at_before_anything_is_decoded(monkeypatch, kind):
    image = Image.fromarray(picture(300, 500))
    options = {"exif": exif(6)} if kind.startswith("exif") else {}
    data = encode(image.convert("P") if kind.startswith("palette") else image, kind.split()[-1], **options)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))

    with pytest.raises(InputError, match="500 x 300 pixels"):
        decode_image(data, "x", max_pixels=149_999)


def test_headers_that_promise_gigabytes_are_refused_with_one_line():
    huge = struct.pack(">II5B", 40_000, 40_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", huge) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    bmp = bytearray(encode(Image.fromarray(picture(8, 8)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 40_000, 40_000)
    for data in (png, bytes(bmp)):
        with pytest.raises(InputError, match="x.img: 40,000 x 40,000 pixels are more than max_pixels allows"):
            decode_image(data, "x.img")
    with pytest.raises(InputError, match="x.img: cannot be decoded: "):  # the limit raised: OpenCV's own, then Pillow
        decode_image(png, "x.img", max_pixels=2**31)


def test_the_size_of_a_large_file_is_read_up_to_the_limit(tmp_path):
    header = bytearray(encode(Image.fromarray(picture(8, 8)), "BMP"))
    header[18:26] = struct.pack("<ii", 20_000, 19_000)  # more than twice Pillow's own limit
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.bmp")
    with open(path, "wb") as file:
        file.write(header)

    assert read_size(path, max_pixels=20_000 * 19_000) == (20_000, 19_000)
    with pytest.raises(InputError, match=r"caf\\udce9.bmp: 20,000 x 19,000 pixels are more than max_pixels allows"):
        read_size(path)
    with open(path, "wb") as file:
        file.write(b"<html>")
    with pytest.raises(InputError, match=r"caf\\udce9.bmp: cannot be decoded: not an image file"):
        read_size(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_decoded_image(tmp_path, kind, orientation):
    path = tmp_path / "image"
    path.write_bytes(encode(Image.fromarray(picture(30, 20)), kind, exif=exif(orientation)))

    assert read_size(str(path)) == read_image(str(path)).shape[1::-1]
    assert read_size(str(path)) in ((30, 20), (20, 30))


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "device.jpg"):
        with pytest.raises(InputError, match=f"{name}: cannot be read: a pipe, socket or device, expected a regular"):
            read_image(str(tmp_path / name))
    for name in ("a\0b.jpg", "half a pair \ud800.jpg"):
        with pytest.raises(InputError, match="not a valid file name") as caught:
            read_image(str(tmp_path / name))
        str(caught.value).encode()


def test_errors_about_names_that_are_not_utf_8_are_text(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    with open(path, "wb") as file:
        file.write(b"<html>")
    for name in (path, path + "missing"):
        with pytest.raises(InputError, match=r"caf\\udce9.jpg") as caught:
            read_image(name)
        str(caught.value).encode()


def test_what_is_no_image_is_an_error_that_names_it(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>404 not found</html>")
    Image.fromarray(np.zeros((4, 5), dtype=np.float32)).save(tmp_path / "float.tiff")
    for name, message in {
        "empty.jpg": "the file is empty",
        "page.jpg": "not an image file",
        "missing.jpg": "No such file",
        ".": "Is a directory",
        "float.tiff": "32 bits a channel; expected 8 or 16",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            read_image(str(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)


def record(width: int, height: int) -> Record:
    return Record("photo.jpg", "folder/photo.jpg", (), size=(width, height))


def test_size_of_a_resized_copy_is_accepted_and_another_shape_is_not():
    blank = np.zeros((224, 337, 3), dtype=np.uint8)
    check_size(Record("photo.jpg", "photo.jpg", ()), blank)  # nothing stated
    check_size(record(337, 224), blank)
    check_size(record(640, 426), blank)  # 1.50446 against 1.50235
    check_size(record(3370, 2218), blank)  # 0.99 %
    for width, height in ((426, 640), (3370, 2205), (3370, 2275)):  # rotated, 1.6 % off, 1.6 % off the other way
        with pytest.raises(InputError, match=f"folder/photo.jpg: .*337 x 224.*{width} x {height}"):
            check_size(record(width, height), blank)


def test_size_allows_for_the_rounding_of_thumbnails():
    check_size(record(640, 426), np.zeros((7, 10, 3), dtype=np.uint8))  # 5 % off, but 10 x 6.66 is the exact copy
    check_size(record(640, 10), np.zeros((1, 10, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="aspect"):
        check_size(record(640, 426), np.zeros((10, 10, 3), dtype=np.uint8))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600), st.sampled_from([np.floor, np.round, np.ceil]))
def test_size_accepts_every_resized_copy(width, height, long_side, rounded):
    scale = long_side / max(width, height)
    copy = [max(1, int(rounded(side * scale))) for side in (height, width)]
    if scale * min(width, height) >= 1:
        check_size(record(width, height), np.zeros((*copy, 3), dtype=np.uint8))


def write_images(folder: Path, num: int) -> Manifest:
    records = []
    for i in range(num):
        path = folder / f"{i}.png"
        Image.fromarray(picture(8, 8 + i, seed=i)).save(path)
        records.append(Record(path.name, str(path), (0,), size=(8 + i, 8)))
    return Manifest(("a",), tuple(records), "train", "all of them")


def test_read_record_checks_what_it_reads(tmp_path):
    good = write_images(tmp_path, 3).records[2]

    np.testing.assert_array_equal(read_record(good), picture(8, 10, seed=2))
    with pytest.raises(InputError, match="aspect"):
        read_record(Record(good.key, good.path, (), size=(8, 10)))


@pytest.mark.parametrize("num_workers", [0, 3])
def test_unreadable_images_are_left_out_and_listed(tmp_path, num_workers):
    manifest = write_images(tmp_path, 9)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:50])
    (tmp_path / "7.png").write_text("no image")

    kept, bad = drop_unreadable(manifest, num_workers)

    assert [r.key for r in kept.records] == [f"{i}.png" for i in (0, 1, 3, 4, 5, 6, 8)]
    assert [key for key, _ in bad] == ["2.png", "7.png"]
    assert "not an image file" in bad[1][1]
    assert kept.protocol == "all of them; 2 unreadable images left out"
    assert kept.split == "train"


def test_dropping_unreadable_images_leaves_a_sound_manifest_as_it_is(tmp_path):
    manifest = write_images(tmp_path, 3)
    assert drop_unreadable(manifest, 2) == (manifest, [])
    for path in tmp_path.iterdir():
        path.write_text("no image")
    with pytest.raises(InputError, match="'train': none of its 3 images can be read"):
        drop_unreadable(manifest, 2)


@pytest.mark.parametrize(
    "decode_all", [lambda manifest: drop_unreadable(manifest, 2), lambda manifest: check._check_split(manifest, 2)]
)
def test_the_terminal_is_recognised_before_standard_error_is_listened_to(tmp_path, decode_all, monkeypatch, capsys):
    (tmp_path / "a.jpg").write_bytes(encode(Image.fromarray(picture(9, 12)), "JPEG"))
    manifest = Manifest(("cat",), (Record("a.jpg", str(tmp_path / "a.jpg"), (0,)),), "train")
    events = []
    decode = jpeg_module.decode
    monkeypatch.setattr(jpeg_module, "decode", lambda data: events.append("decode") or decode(data))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: events.append("isatty") or True, raising=False)
    # Threads that are as fast as can be.
    monkeypatch.setattr(ThreadPoolExecutor, "map", lambda pool, work, items: [work(item) for item in items])

    decode_all(manifest)

    assert events[0] == "isatty"
    assert events.count("decode") == 1
    assert "train" in capsys.readouterr().err


def test_a_forked_process_hears_for_itself():
    whole = encode(Image.fromarray(picture(90, 120)), "JPEG")
    decode_image(whole, "x")
    with pytest.raises(InputError):
        decode_image(whole[: len(whole) // 2] + END, "x")
    child = os.fork()
    if not child:
        code = 1
        try:
            decode_image(whole[: len(whole) // 2] + END, "x")
        except InputError:
            code = 0 if decode_image(whole, "x").shape == (90, 120, 3) else 2
        finally:
            os._exit(code)
    for _ in range(20):  # at the same time
        decode_image(whole, "x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
