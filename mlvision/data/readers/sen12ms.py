"""SEN12MS: Sentinel-2 patches of 256 x 256 pixels whose land-cover shares are made multi-labels."""

import os
import pickle
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float64

from mlvision.data.bands import Band, BandStack, check_bands, rgb_channels
from mlvision.data.manifest import Manifest
from mlvision.data.readers.base import DataConfig, check_files, check_root
from mlvision.data.records import Record, Records
from mlvision.errors import InputError, shown
from mlvision.text_files import find_split_file, read_names

# Channels of a Sentinel-2 file in their order.
BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
RGB = ("B4", "B3", "B2")

IGBP = (
    "Evergreen needleleaf forests",
    "Evergreen broadleaf forests",
    "Deciduous needleleaf forests",
    "Deciduous broadleaf forests",
    "Mixed forests",
    "Closed shrublands",
    "Open shrublands",
    "Woody savannas",
    "Savannas",
    "Grasslands",
    "Permanent wetlands",
    "Croplands",
    "Urban and built-up lands",
    "Cropland/natural vegetation mosaics",
    "Permanent snow and ice",
    "Barren",
    "Water bodies",
)
# The simplified classes, each with the columns of the full scheme whose shares it adds up.
SIMPLIFIED = {
    "Forest": (0, 1, 2, 3, 4),
    "Shrubland": (5, 6),
    "Savanna": (7, 8),
    "Grassland": (9,),
    "Wetlands": (10,),
    "Croplands": (11, 13),
    "Urban/built-up": (12,),
    "Snow/ice": (14,),
    "Barren": (15,),
    "Water": (16,),
}
SCHEMES = {"simplified": tuple(SIMPLIFIED), "full": IGBP}

_FILE = re.compile(r"(ROIs\d+_[a-z]+)_(s2_\d+)_p\d+\.tif")
# What a pickle of numpy arrays by name is made of. A pickle may name any function to be called: others are refused.
_PICKLED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class Sen12msConfig(DataConfig):
    """The archive's folders ROIs.../s2_..., and the lists and label file of the authors' repository."""

    name: Annotated[str, "which reader: a key of DATASETS"] = "sen12ms"
    images: Annotated[str, "folder under root that holds ROIs1158_spring and the other seasons"] = "."
    lists: Annotated[str, "list of Sentinel-2 file names under root, {split} is the split's name"] = "{split}_list.txt"
    labels: Annotated[str, "land-cover shares of every patch under root"] = "IGBP_probability_labels.pkl"
    scheme: Annotated[str, "classes: simplified (10) or full (17 of IGBP)"] = "simplified"
    threshold: Annotated[float, "least share of a patch that makes a class present"] = 0.1
    bands: Annotated[list[str], "bands in channel order; three give uint8, others float32 and model.in_chans"] = field(
        default_factory=lambda: list(RGB)
    )
    scaling: Annotated[str, "stored numbers to [0, 1]: reflectance_10000 or reflectance_3000 becomes 1"] = (
        "reflectance_10000"
    )

    def read(self, split: str) -> Manifest:
        """Reads one split, sorted by file name as the authors' script sorts it.

        A class is present where its share of the patch reaches `threshold`; shares of joined classes are added up first. The
        label file is a pickle: numbers and numpy arrays are read out of it, and one that asks for anything else is refused.

        DEVIATION: RGB is red, green, blue (B4, B3, B2), as pretrained weights expect; the authors' own "RGB" is B2, B3, B4.

        Raises:
            InputError: a list or label file is missing or malformed, or a patch has no shares; the message names file and
                line.

        Source: Schmitt et al., "SEN12MS - a curated dataset of georeferenced multi-spectral Sentinel-1/2 imagery for deep
        learning and data fusion", ISPRS Annals 2019; Schmitt & Wu, "Remote sensing image classification with the SEN12MS
        dataset", ISPRS Annals 2021 (labels, lists of 162,555 training and 18,106 test patches, threshold 0.1).
        """
        if self.scheme not in SCHEMES:
            raise InputError(f"data.scheme={self.scheme}: expected one of {', '.join(SCHEMES)}")
        if not 0 < self.threshold <= 1:
            raise InputError(f"data.threshold={self.threshold}: expected a share above 0, at most 1")
        check_bands(self.bands, BANDS, self.scaling)
        root = check_root(self)
        source = find_split_file(root, self.lists, split, "list")
        label_file = os.path.join(root, self.labels)
        shares_of = _read_pickle(label_file)
        stack = BandStack(
            tuple(Band(band, "{path}", BANDS.index(band)) for band in self.bands),
            self.scaling,
            rgb=rgb_channels(self.bands, RGB),
        )
        records = []
        for line, name in enumerate(read_names(source, "patch"), start=1):
            match = _FILE.fullmatch(name)
            if match is None:
                raise InputError(
                    f"{source}, line {line}: {shown(name)}, expected a file such as ROIs1158_spring_s2_1_p30.tif"
                )
            if name not in shares_of:
                raise InputError(f"{source}, line {line}: {name} has no entry in {label_file}")
            present = _shares(shares_of[name], name, label_file, self.scheme) >= self.threshold
            key = os.path.normpath(os.path.join(self.images, match[1], match[2], name))
            records.append(Record(key, os.path.join(root, key), tuple(np.flatnonzero(present).tolist()), bands=stack))
        columns = Records(sorted(records, key=lambda record: os.path.basename(record.key)))
        check_files(self, columns, source)
        protocol = (
            f"SEN12MS, {os.path.basename(source)}, {len(records):,} patches, {self.scheme} classes present from a share of "
            f"{self.threshold:g}, bands {' '.join(self.bands)}, {self.scaling}"
        )
        return Manifest(SCHEMES[self.scheme], columns, split, protocol)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; expected nothing but numbers and numpy arrays")
        return super().find_class(module, name)


def _read_pickle(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises whatever its operations stumble over
        raise InputError(f"{path}: cannot be read as a pickle: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected file names and their shares")
    return content


def _shares(values: Any, name: str, source: str, scheme: str) -> Float64[np.ndarray, " C"]:
    """The share of each class of the scheme in one patch."""
    try:
        shares = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        shares = np.zeros(0)
    if shares.shape != (len(IGBP),) or not ((shares >= 0) & (shares <= 1.001)).all():
        raise InputError(
            f"{source}: {name}: expected {len(IGBP)} shares of the IGBP classes in [0, 1], got {shown(values)}"
        )
    return shares if scheme == "full" else np.array([shares[list(columns)].sum() for columns in SIMPLIFIED.values()])
