"""Image files to arrays: one decoder for every file that a data set may hold.

OpenCV decodes what it surely decodes right (plain 8-bit JPEG and PNG); Pillow decodes the rest, strictly. On a plain
file both give the same bytes, so which one ran is never visible in a result.
"""

import io
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from tqdm import tqdm

from mlvision.data.manifest import Manifest, Record
from mlvision.errors import InputError

# Files that a folder of images is searched for, in lower case.
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"))

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_JPEG_APP1 = 0xE1  # Exif or XMP: may hold a rotation
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, Huffman-coded
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_GREY_OR_RGB = (0, 2)
# Not among them: tRNS (transparency), eXIf and text (rotation), acTL (animation).
_PNG_PLAIN_CHUNKS = frozenset(
    (b"IHDR", b"IDAT", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"pHYs", b"tIME", b"bKGD")
)
_EIGHT_BIT_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))
_EXIF_ORIENTATION = 0x0112
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


def read_image(path: str) -> UInt8[np.ndarray, "H W 3"]:
    """Reads an image file as upright RGB.

    Exif rotation is applied. 16-bit channels are divided by 257 and rounded, so 65535 becomes 255. Transparent pixels
    are composited over white. CMYK is converted without a colour profile. Of an animation, the first frame is read.

    Raises:
        InputError: the file is missing, truncated, not an image, or of a kind that has no such reading.
    """
    return decode_image(read_bytes(path), path)


def read_bytes(path: str) -> bytes:
    """The content of the file at `path`, an image."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def decode_image(data: bytes, path: str) -> UInt8[np.ndarray, "H W 3"]:
    """As `read_image`, from the file's content; `path` is for the message of an error."""
    if not data:
        raise InputError(f"{path}: the file is empty")
    if _is_plain_jpeg(data) or _is_plain_png(data):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if image is not None:
            return image
    try:
        return _decode_strictly(data)
    except Exception as error:  # Pillow's plugins raise whatever their parsing stumbles over
        reason = (
            "not an image file" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
        )
        raise InputError(f"{path}: cannot be decoded: {reason}") from error


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
            f"{record.path}: the image is {width} x {height}, its annotation states {stated_width} x {stated_height}: "
            "the aspect ratios differ by more than 1 %"
        )


def read_size(path: str) -> tuple[int, int]:
    """Width and height of the upright image in a file; only the header is decoded.

    Raises:
        InputError: the file cannot be read, or is not an image.
    """
    try:
        with Image.open(io.BytesIO(read_bytes(path))) as image:
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except InputError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsing stumbles over
        raise InputError(f"{path}: its size cannot be read: {' '.join(str(error).split())}") from error


def record_files(record: Record) -> list[str]:
    """The files that hold a record's image."""
    return [record.path] if record.bands is None else record.bands.files(record.path)


def decode_record(record: Record, contents: Sequence[bytes]) -> Shaped[np.ndarray, "H W C"]:
    """A record's image out of the contents of its files, its shape checked.

    Raises:
        InputError: as `read_image` or `BandStack.decode`, or another shape than the annotation states.
    """
    if record.bands is None:
        (content,) = contents
        image = decode_image(content, record.path)
    else:
        image = record.bands.decode(record.path, contents)
    check_size(record, image)
    return image


def read_record(record: Record) -> Shaped[np.ndarray, "H W C"]:
    """Reads a record's image and checks its shape: uint8 of 3 channels, or float32 in [0, 1] of other bands."""
    return decode_record(record, [read_bytes(path) for path in record_files(record)])


def folder_manifest(folder: Path, classes: tuple[str, ...]) -> Manifest:
    """The images below a folder, of whose labels nothing is known.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"images: {folder} is not a folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise InputError(f"images: no image below {folder} (looked for {', '.join(sorted(SUFFIXES))})")
    unknown = tuple(range(len(classes)))
    records = (Record(p.relative_to(folder).as_posix(), str(p), labels=(), unknown=unknown) for p in paths)
    return Manifest(classes, tuple(records), split=str(folder))


def drop_unreadable(manifest: Manifest, num_workers: int = 0) -> tuple[Manifest, list[tuple[str, str]]]:
    """Decodes every image once: the manifest without the bad ones, and (key, reason) of each bad one.

    Raises:
        InputError: no image is left.
    """

    def reason(record: Record) -> str | None:
        try:
            read_record(record)
        except InputError as error:
            return str(error)
        return None

    # Threads: both decoders release the interpreter lock.
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        checked = pool.map(reason, manifest.records)
        reasons = list(tqdm(checked, total=len(manifest), desc=f"decoding {manifest.split}", disable=None))
    bad = [(record.key, why) for record, why in zip(manifest.records, reasons, strict=True) if why is not None]
    if not bad:
        return manifest, []
    if len(bad) == len(manifest):
        raise InputError(f"split {manifest.split!r}: none of its {len(manifest):,} images can be read; {bad[0][1]}")
    note = f"{len(bad):,} unreadable images left out"
    manifest = replace(manifest, protocol=f"{manifest.protocol}; {note}" if manifest.protocol else note)
    return manifest.select(i for i, why in enumerate(reasons) if why is None), bad


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether this is a complete 8-bit grey or three-channel JPEG without Exif.

    The end marker is looked for because OpenCV 4 fills what a truncated file lacks with grey and reports nothing; a
    file with bytes after the marker goes to Pillow, which knows the difference.
    """
    if not (data.startswith(_JPEG_START) and data.endswith(_JPEG_END)):
        return False
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _JPEG_APP1:
            return False
        if marker in _JPEG_FRAMES:
            precision, num_channels = data[position + 4], data[position + 9]
            return precision == 8 and num_channels in (1, 3)
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return False


def _is_plain_png(data: bytes) -> bool:
    """Whether this is a complete 8-bit grey or RGB PNG without transparency, rotation or animation."""
    if not (data.startswith(_PNG_START) and len(data) > 33 and data[24] == 8 and data[25] in _PNG_GREY_OR_RGB):
        return False
    position = len(_PNG_START)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            return True
        if kind not in _PNG_PLAIN_CHUNKS:
            return False
        position += 12 + length
    return False


def _decode_strictly(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes any file that Pillow knows; an incomplete one raises."""
    image = Image.open(io.BytesIO(data))
    image.load()
    depth = _bit_depth(image, data)
    if depth == 16:  # Pillow keeps only the upper byte of 16-bit colour
        return _upright(_from_16_bit(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)), image)
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
