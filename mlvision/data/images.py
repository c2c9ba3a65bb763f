"""Image files to arrays: one decoder for every file that a data set may hold.

OpenCV decodes what it surely decodes right (8-bit JPEG, plain 8-bit PNG); Pillow decodes the rest, strictly. On a plain
file both give the same bytes, so which one ran is never visible in a result.
"""

import io
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import cv2
import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from mlvision.data import jpeg
from mlvision.data.limits import MAX_PIXELS, check_pixels
from mlvision.data.manifest import Manifest
from mlvision.data.records import Record
from mlvision.errors import InputError, printable
from mlvision.progress import Progress
from mlvision.text_files import read_bytes

T = TypeVar("T")

# Pillow's names of the formats that are read, each with the suffixes of its files in lower case. Pillow knows others, which
# hold no photograph, are only recognised, or are handed to a further program (EPS).
FORMATS = {
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    "PCX": (".pcx",),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pfm", ".pgm", ".pnm", ".ppm"),
    "QOI": (".qoi",),
    "SGI": (".bw", ".rgb", ".rgba", ".sgi"),
    "TGA": (".icb", ".tga", ".vda", ".vst"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_GREY_OR_RGB = (0, 2)
# Not among them: tRNS (transparency), eXIf and text (rotation), acTL (animation).
_PNG_PLAIN_CHUNKS = frozenset(
    (b"IHDR", b"IDAT", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"pHYs", b"tIME", b"bKGD")
)
_EIGHT_BIT_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))
_EXIF_ORIENTATION = 0x0112
_TIFF_SIDES = (256, 257)  # width, height
_TIFF_BITS_PER_SAMPLE = 258

# What turns the stored rows and columns into the upright picture, by the value of the Exif tag Orientation.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
}


def read_image(path: str, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """Reads an image file as upright RGB.

    Exif rotation is applied. 16-bit channels are divided by 257 and rounded, so 65535 becomes 255. Transparent pixels
    are composited over white. CMYK is converted without a colour profile. Of an animation, the first frame is read.

    A damaged file is refused where its format or decoder can tell: by a checksum (PNG), by data that end early or are
    left over (JPEG). Changed bytes in the middle of a JPEG or WebP may decode to another picture, which nobody can tell.

    Args:
        path: the file.
        max_pixels: width times height that an image may have; its header is looked at before it is decoded.

    Raises:
        InputError: the file is missing, not a regular file, truncated, damaged, too large, not an image, or of a kind that
            has no such reading.
    """
    return decode_image(read_bytes(path), path, max_pixels)


def decode_image(data: bytes, path: str, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """As `read_image`, from the file's content; `path` is for the message of an error."""
    path = printable(path)
    if not data:
        raise InputError(f"{path}: the file is empty")
    if data.startswith(jpeg.START):
        return _decode_jpeg(data, path, max_pixels)
    if data.startswith(_PNG_START):
        return _decode_png(data, path, max_pixels)
    return _decode_by_pillow(data, path, max_pixels)


def rgb_array(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """A Pillow image as upright RGB, by the rules of `read_image`.

    Raises:
        ValueError: its mode has no such reading.
    """
    image.load()
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        stored = _from_16_bit(np.asarray(image).astype(np.uint16))
    elif image.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"pixels of mode {image.mode}; expected 8 or 16 bits a channel")
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        stored = np.array(Image.alpha_composite(white, layer).convert("RGB"))
    else:
        stored = np.array(image.convert("RGB"))
    return _upright(stored, image)


def check_size(record: Record, image: Shaped[np.ndarray, "H W C"]) -> None:
    """Refuses a decoded image that has another shape than its annotation states, so boxes would miss their objects.

    A resized copy is fine: aspect ratios may differ by 1 %, or by what rounding each side to whole pixels explains.
    """
    if record.size is None:
        return
    (height, width), (stated_width, stated_height) = image.shape[:2], record.size
    ratio = (width * stated_height) / (height * stated_width)
    narrowest = ((width - 1) * stated_height) / ((height + 1) * stated_width)
    widest = ((width + 1) * stated_height) / ((height - 1) * stated_width) if height > 1 else float("inf")
    if max(ratio, 1 / ratio) > 1.01 and not narrowest <= 1 <= widest:
        raise InputError(
            f"{printable(record.path)}: the image is {width} x {height}, its annotation states {stated_width} x "
            f"{stated_height}: the aspect ratios differ by more than 1 %"
        )


def read_size(path: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the upright image in a file; of a PNG, whose rotation may follow its pixels, they are decoded too.

    Raises:
        InputError: the file cannot be read, is too large, or is not an image.
    """
    with _pillow_image(read_bytes(path), printable(path), max_pixels) as image:
        # As stored: versions of Pillow differ in whether they have turned a TIFF's `size` before its pixels are decoded.
        stored = (image.tag_v2[tag] for tag in _TIFF_SIDES) if isinstance(image, TiffImageFile) else image.size
        width, height = stored
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def record_files(record: Record) -> list[str]:
    """The files that hold a record's image."""
    return [record.path] if record.bands is None else record.bands.files(record.path)


def file_sizes(manifest: Manifest) -> list[int | None]:
    """Bytes of each record's files together; None if one is not there."""
    bands = manifest.records[0].bands if len(manifest) else None

    def sizes(paths: Sequence[str]) -> list[int | None]:
        return [_total_size([path] if bands is None else bands.files(path)) for path in paths]

    paths = manifest.paths
    # Threads, since network storage takes its time to answer; many files each, since local storage does not.
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(sizes, (paths[start : start + 1000] for start in range(0, len(paths), 1000)))
        return [size for part in parts for size in part]


def _total_size(paths: Sequence[str]) -> int | None:
    try:
        return sum(os.stat(path).st_size for path in paths)
    except (OSError, ValueError):
        return None


def decode_record(
    record: Record, contents: Sequence[bytes], max_pixels: int = MAX_PIXELS
) -> Shaped[np.ndarray, "H W C"]:
    """A record's image out of the contents of its files, its shape checked.

    Raises:
        InputError: as `read_image` or `BandStack.decode`, or another shape than the annotation states.
    """
    if record.bands is None:
        (content,) = contents
        image = decode_image(content, record.path, max_pixels)
    else:
        image = record.bands.decode(record.path, contents, max_pixels)
    check_size(record, image)
    return image


def read_record(record: Record, max_pixels: int = MAX_PIXELS) -> Shaped[np.ndarray, "H W C"]:
    """Reads a record's image and checks its shape: uint8 of 3 channels, or float32 in [0, 1] of other bands."""
    return decode_record(record, [read_bytes(path) for path in record_files(record)], max_pixels)


def read_photo(record: Record, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """A record's image as a picture to look at: of other bands than three colours those that stand for them."""
    pixels = read_record(record, max_pixels)
    if record.bands is not None:
        pixels = pixels[:, :, record.bands.rgb]
    return pixels if pixels.dtype == np.uint8 else np.round(pixels * 255).astype(np.uint8)


def map_records(work: Callable[[Record], T], manifest: Manifest, num_workers: int, what: str) -> list[T]:
    """What `work` returns for each record, in their order; `what` is done is shown as in `Progress`."""
    results = []
    # The bar before the pool: it looks whether standard error is a terminal, and while a JPEG is decoded that is a file.
    # Threads: both decoders release the interpreter lock.
    with Progress(len(manifest), what) as progress, ThreadPoolExecutor(max(1, num_workers)) as pool:
        for result in pool.map(work, manifest.records):
            results.append(result)
            progress.update()
    return results


def drop_unreadable(manifest: Manifest, num_workers: int = 0) -> tuple[Manifest, list[tuple[str, str]]]:
    """Decodes every image once: the manifest without the bad ones, and (key, reason) of each bad one.

    Raises:
        InputError: no image is left.
    """

    def reason(record: Record) -> str | None:
        try:
            read_record(record, manifest.max_pixels)
        except InputError as error:
            return str(error)
        return None

    reasons = map_records(reason, manifest, num_workers, f"decoding {manifest.split}")
    bad = [(record.key, why) for record, why in zip(manifest.records, reasons, strict=True) if why is not None]
    if not bad:
        return manifest, []
    if len(bad) == len(manifest):
        raise InputError(f"split {manifest.split!r}: none of its {len(manifest):,} images can be read; {bad[0][1]}")
    manifest = manifest.noted(f"{len(bad):,} unreadable images left out")
    return manifest.select(i for i, why in enumerate(reasons) if why is None), bad


def _decode_jpeg(data: bytes, path: str, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    header = jpeg.read_header(data)
    if header is not None:
        check_pixels(header.width, header.height, max_pixels, path)
    if header is not None and not header.is_closed:
        raise InputError(f"{path}: cannot be decoded: truncated, the end marker of a JPEG file is missing")
    # Of the kinds that Pillow decodes, or of a header that it alone understands, it looks at the size first.
    image = None if header is not None and header.plain else _decode_by_pillow(data, path, max_pixels)
    stored, complaint = jpeg.decode(data)
    if complaint:
        raise InputError(f"{path}: cannot be decoded: damaged: {complaint}")
    if image is not None:
        return image
    if stored is None:
        return _decode_by_pillow(data, path, max_pixels)
    if header is not None and header.has_exif:
        with _pillow_image(data, path, max_pixels) as opened:
            return _upright(stored, opened)
    return stored


def _decode_png(data: bytes, path: str, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    kinds = _png_chunks(data, path)
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    check_pixels(width, height, max_pixels, path)
    if depth == 8 and colour in _PNG_GREY_OR_RGB and kinds <= _PNG_PLAIN_CHUNKS:
        image = jpeg.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if image is not None:
            return image
    return _decode_by_pillow(data, path, max_pixels)


def _png_chunks(data: bytes, path: str) -> set[bytes]:
    """The kinds of chunks before the end, each with its checksum compared: no decoder looks at all of them."""
    kinds: set[bytes] = set()
    position = len(_PNG_START)
    view = memoryview(data)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(data[end : end + 4]):
            name = kind.decode("ascii", "backslashreplace")
            raise InputError(f"{path}: cannot be decoded: damaged: the checksum of its chunk {name!r} is wrong")
        if not kinds and (kind, length) != (b"IHDR", 13):
            raise InputError(f"{path}: cannot be decoded: damaged: a PNG file without a header")
        if kind == b"IEND":
            return kinds
        kinds.add(kind)
        position = end + 4
    raise InputError(f"{path}: cannot be decoded: truncated, the end chunk of a PNG file is missing")


@cache
def _formats_here() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class _PillowLimit:
    """Pillow's own limit on pixels, a global that is no argument of any call: lifted while a thread decodes here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._limit: int | None = None

    @contextmanager
    def lifted(self) -> Iterator[None]:
        with self._lock:
            if not self._num_inside:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if not self._num_inside:
                    Image.MAX_IMAGE_PIXELS = self._limit


_PILLOW_LIMIT = _PillowLimit()


@contextmanager
def _pillow_image(data: bytes, path: str, max_pixels: int) -> Iterator[Image.Image]:
    """The file as Pillow opens it, its size checked and its pixels not yet decoded.

    Raises:
        InputError: whatever Pillow's plugins raise, here and while the caller decodes.
    """
    try:
        with _PILLOW_LIMIT.lifted():
            image = Image.open(io.BytesIO(data), formats=_formats_here())
            check_pixels(image.width, image.height, max_pixels, path)
            yield image
    except InputError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsing stumbles over
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "not an image file, or a damaged one" if unknown else " ".join(str(error).split())
        raise InputError(f"{path}: cannot be decoded: {reason or type(error).__name__}") from error


def _decode_by_pillow(data: bytes, path: str, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes any file of `FORMATS`; an incomplete one is refused."""
    with _pillow_image(data, path, max_pixels) as image:
        image.load()
        depth = _bit_depth(image, data)
        if depth == 16:  # Pillow keeps only the upper byte of 16-bit colour
            stored = _from_16_bit(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
            return _upright(stored, image)
        if depth > 8:
            raise ValueError(f"{depth} bits a channel; expected 8 or 16")
        return rgb_array(image)


def _upright(stored: UInt8[np.ndarray, "rows columns 3"], image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """The stored pixels, turned as the Exif block of `image` says. (Pillow and OpenCV have turned a TIFF's already.)"""
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    return np.ascontiguousarray(_UPRIGHT[orientation](stored)) if orientation in _UPRIGHT else stored


def _bit_depth(image: Image.Image, data: bytes) -> int:
    """Bits a channel of the file, which Pillow's mode does not tell."""
    if image.format == "PNG":
        return data[24]
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (1,)))
    return 8


def _from_16_bit(stored: np.ndarray | None) -> UInt8[np.ndarray, "H W 3"]:
    """OpenCV's 16-bit grey, BGR or BGRA to 8-bit RGB over white."""
    if stored is None or stored.dtype != np.uint16 or stored.shape[2:] not in ((), (3,), (4,)):
        raise ValueError("16-bit image of a kind that OpenCV does not read")
    colour = np.atleast_3d(stored).astype(np.float64)
    if colour.shape[2] == 4:
        opacity = colour[:, :, 3:] / 65535
        colour = colour[:, :, :3] * opacity + 65535 * (1 - opacity)
    rgb = np.round(colour / 257).astype(np.uint8)[:, :, ::-1]
    return np.ascontiguousarray(np.broadcast_to(rgb, (*rgb.shape[:2], 3)))
