"""Images that are put together from the bands of GeoTIFF files, as satellites deliver them."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import tifffile
from jaxtyping import Float32, Shaped

from mlvision.data.limits import check_pixels
from mlvision.errors import InputError

# Stored numbers that become 0 and 1, by name; what lies outside is clipped. Sentinel-2 stores 10,000 x reflectance.
SCALINGS = {
    "reflectance_10000": (0.0, 10_000.0),  # all that a surface can reflect; what SEN12MS's own scripts do
    "reflectance_3000": (0.0, 3_000.0),  # land without clouds fills the range: the usual true-colour picture
}


@dataclass(frozen=True)
class Band:
    """Where one band is stored.

    Attributes:
        name: its official name, such as B8A.
        file: path of its file; `{path}` stands for the record's path, `{name}` for the last part of that.
        channel: which channel of the file it is, counted from 0.
    """

    name: str
    file: str
    channel: int = 0


@dataclass(frozen=True)
class BandStack:
    """How a record's bands become an image; one object serves all records of a manifest.

    Three bands give uint8, as photographs do, and go through every view and model; any other number gives float32.

    Attributes:
        bands: the image's channels, in order.
        scaling: a key of `SCALINGS`.
        grid: side in pixels to which coarser bands are resized, bilinearly; 0: all bands must agree as they are.
        rgb: the three channels that show the image to a person.
    """

    bands: tuple[Band, ...]
    scaling: str
    grid: int = 0
    rgb: tuple[int, int, int] = (0, 1, 2)

    def __len__(self) -> int:
        return len(self.bands)

    def files(self, path: str) -> list[str]:
        """The files of the record at `path`, each once, in the order in which the bands first need them."""
        return list(dict.fromkeys(self._file(band, path) for band in self.bands))

    def decode(self, path: str, contents: Sequence[bytes], max_pixels: int) -> Shaped[np.ndarray, "H W C"]:
        """The image of the record at `path` out of its files' contents, in [0, 255] for uint8, in [0, 1] for float32.

        Raises:
            InputError: a file is no GeoTIFF that can be read, lacks a channel, has another shape than the others, or holds
                numbers that are not finite; the message names the file.
        """
        files = dict(zip(self.files(path), contents, strict=True))
        stored = {file: read_tiff(content, file, max_pixels) for file, content in files.items()}
        planes = []
        for band in self.bands:
            file = self._file(band, path)
            channels = stored[file]
            if band.channel >= channels.shape[2]:
                raise InputError(
                    f"{file}: has {channels.shape[2]} channels, band {band.name} is number {band.channel + 1}"
                )
            planes.append(self._scale(channels[:, :, band.channel], file))
        shapes = {plane.shape for plane in planes}
        if len(shapes) > 1:
            shown = ", ".join(
                f"{band.name} {p.shape[1]} x {p.shape[0]}" for band, p in zip(self.bands, planes, strict=True)
            )
            raise InputError(f"{path}: its bands are of different sizes: {shown}")
        image = np.stack(planes, axis=2)
        return np.round(image * 255).astype(np.uint8) if len(self.bands) == 3 else image

    def _file(self, band: Band, path: str) -> str:
        return band.file.replace("{path}", path).replace("{name}", os.path.basename(path))

    def _scale(self, plane: Shaped[np.ndarray, "h w"], file: str) -> Float32[np.ndarray, "H W"]:
        low, high = SCALINGS[self.scaling]
        scaled = (plane.astype(np.float32) - low) / np.float32(high - low)
        if not np.isfinite(scaled).all():
            raise InputError(f"{file}: holds numbers that are not finite")
        scaled = np.clip(scaled, 0, 1)
        if not self.grid or scaled.shape == (self.grid, self.grid):
            return scaled
        if scaled.shape[0] != scaled.shape[1]:
            raise InputError(f"{file}: is {scaled.shape[1]} x {scaled.shape[0]} pixels, expected a square")
        return cv2.resize(scaled, (self.grid, self.grid), interpolation=cv2.INTER_LINEAR)


def check_bands(bands: Sequence[str], known: Sequence[str], scaling: str) -> None:
    """Refuses a choice of bands or scaling that a reader cannot make.

    Raises:
        InputError: naming the option and what there is.
    """
    if not bands or len(set(bands)) != len(bands) or not set(bands) <= set(known):
        raise InputError(f"data.bands={list(bands)}: expected different ones of {', '.join(known)}")
    if scaling not in SCALINGS:
        raise InputError(f"data.scaling={scaling}: expected one of {', '.join(SCALINGS)}")


def rgb_channels(bands: Sequence[str], rgb: Sequence[str]) -> tuple[int, int, int]:
    """Where red, green and blue stand among `bands`; the first channels where not all three are there."""
    if set(rgb) <= set(bands):
        red, green, blue = (list(bands).index(name) for name in rgb)
        return red, green, blue
    last = len(bands) - 1
    return 0, min(1, last), min(2, last)


def read_tiff(content: bytes, path: str, max_pixels: int) -> Shaped[np.ndarray, "h w channels"]:
    """The first image of a TIFF with its stored numbers, channels last.

    Raises:
        InputError: it is empty or cut short, no TIFF, of more than `max_pixels`, or compressed in a way that cannot be
            read here.
    """
    if not content:
        raise InputError(f"{path}: the file is empty")
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            page = file.pages.first
            check_pixels(page.imagewidth, page.imagelength, max_pixels, path)
            array, axes = page.asarray(), page.axes
    except InputError:
        raise
    except Exception as error:  # whatever parsing stumbles over
        # tifffile leaves some compressions (LZW) to a further package; OpenCV knows them for up to four channels.
        array = (
            cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
            if "imagecodecs" in str(error)
            else None
        )
        if array is None:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{path}: cannot be decoded: {reason}") from error
        array = array[:, :, None] if array.ndim == 2 else array[:, :, [2, 1, 0, *range(3, array.shape[2])]]
        axes = "YXS"
    # A damaged header may promise other axes than the array has.
    if array.ndim != len(axes) or axes not in ("YX", "SYX", "YXS"):
        raise InputError(f"{path}: cannot be decoded: its axes are {axes} of {array.shape}, expected an image")
    if axes == "YX":
        return array[:, :, None]
    return np.moveaxis(array, 0, 2) if axes == "SYX" else array
