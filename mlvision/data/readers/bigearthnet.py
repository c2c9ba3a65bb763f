"""BigEarthNet: Sentinel-2 patches of 1.2 km with land-cover labels, of version 1 (JSON files) and 2 (a parquet file)."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from mlvision.data.bands import Band, BandStack, check_bands, rgb_channels
from mlvision.data.manifest import Manifest
from mlvision.data.readers.base import DataConfig, check_files, check_root
from mlvision.data.records import Record, Records
from mlvision.errors import InputError, first_line, listed, shown
from mlvision.progress import track
from mlvision.text_files import find_split_file, read_json, read_text

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
RGB = ("B04", "B03", "B02")
GRID = 120  # pixels of 10 m; bands of 20 m have 60, those of 60 m have 20
VERSIONS = ("v1", "v2")
_FOLDERS = {"v1": "BigEarthNet-v1.0", "v2": "BigEarthNet-S2"}

CLASSES_43 = (
    "Continuous urban fabric",
    "Discontinuous urban fabric",
    "Industrial or commercial units",
    "Road and rail networks and associated land",
    "Port areas",
    "Airports",
    "Mineral extraction sites",
    "Dump sites",
    "Construction sites",
    "Green urban areas",
    "Sport and leisure facilities",
    "Non-irrigated arable land",
    "Permanently irrigated land",
    "Rice fields",
    "Vineyards",
    "Fruit trees and berry plantations",
    "Olive groves",
    "Pastures",
    "Annual crops associated with permanent crops",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland",
    "Moors and heathland",
    "Sclerophyllous vegetation",
    "Transitional woodland/shrub",
    "Beaches, dunes, sands",
    "Bare rock",
    "Sparsely vegetated areas",
    "Burnt areas",
    "Inland marshes",
    "Peatbogs",
    "Salt marshes",
    "Salines",
    "Intertidal flats",
    "Water courses",
    "Water bodies",
    "Coastal lagoons",
    "Estuaries",
    "Sea and ocean",
)

# The 19 classes, each with those of the 43 that it joins. Eleven of the 43 are in none.
JOINED = {
    "Urban fabric": ("Continuous urban fabric", "Discontinuous urban fabric"),
    "Industrial or commercial units": ("Industrial or commercial units",),
    "Arable land": ("Non-irrigated arable land", "Permanently irrigated land", "Rice fields"),
    "Permanent crops": (
        "Vineyards",
        "Fruit trees and berry plantations",
        "Olive groves",
        "Annual crops associated with permanent crops",
    ),
    "Pastures": ("Pastures",),
    "Complex cultivation patterns": ("Complex cultivation patterns",),
    "Land principally occupied by agriculture, with significant areas of natural vegetation": (
        "Land principally occupied by agriculture, with significant areas of natural vegetation",
    ),
    "Agro-forestry areas": ("Agro-forestry areas",),
    "Broad-leaved forest": ("Broad-leaved forest",),
    "Coniferous forest": ("Coniferous forest",),
    "Mixed forest": ("Mixed forest",),
    "Natural grassland and sparsely vegetated areas": ("Natural grassland", "Sparsely vegetated areas"),
    "Moors, heathland and sclerophyllous vegetation": ("Moors and heathland", "Sclerophyllous vegetation"),
    "Transitional woodland, shrub": ("Transitional woodland/shrub",),
    "Beaches, dunes, sands": ("Beaches, dunes, sands",),
    "Inland wetlands": ("Inland marshes", "Peatbogs"),
    "Coastal wetlands": ("Salt marshes", "Salines"),
    "Inland waters": ("Water courses", "Water bodies"),
    "Marine waters": ("Coastal lagoons", "Estuaries", "Sea and ocean"),
}
CLASSES_19 = tuple(JOINED)


@dataclass(frozen=True)
class BigEarthNetConfig(DataConfig):
    """Version 1: lists and patch folders. Version 2: metadata.parquet and folders of tiles with patch folders."""

    name: Annotated[str, "which reader: a key of DATASETS"] = "bigearthnet"
    version: Annotated[str, "v1 or v2 (reBEN)"] = "v2"
    images: Annotated[str, "folder of the Sentinel-2 patches under root; empty: the version's own name"] = ""
    lists: Annotated[str, "v1: CSV of patch names under root, {split} is the split's name"] = "{split}.csv"
    metadata: Annotated[str, "v2: parquet file under root"] = "metadata.parquet"
    num_classes: Annotated[int, "19, or (v1) the original 43"] = 19
    bands: Annotated[list[str], "bands in channel order; three give uint8, others float32 and model.in_chans"] = field(
        default_factory=lambda: list(RGB)
    )
    scaling: Annotated[str, "stored numbers to [0, 1]: reflectance_3000 or reflectance_10000 becomes 1"] = (
        "reflectance_3000"
    )

    def read(self, split: str) -> Manifest:
        """Reads one split.

        Version 1 takes the patches of a list (first column; no header) and their labels from each patch folder's
        `<patch>_labels_metadata.json`. With 19 classes the eleven classes that are in none of them are dropped, and patches
        that have no label then are left out, as published. Version 2 takes rows of the parquet file by its column `split`;
        its labels are of the 19 classes. An image is its chosen bands on the 10 m grid, coarser ones resized bilinearly.

        Raises:
            InputError: a file, column, class, band or split is not there; pyarrow, which version 2 needs, is not installed.

        Source: Sumbul et al., "BigEarthNet: A Large-Scale Benchmark Archive for Remote Sensing Image Understanding", IGARSS
        2019; Sumbul et al., "BigEarthNet-MM", GRSM 2021 (19 classes; 269,695 / 123,723 / 125,866 patches); Clasen et al.,
        "reBEN: Refined BigEarthNet Dataset for Remote Sensing Image Analysis", IGARSS 2025 (version 2).
        """
        if self.version not in VERSIONS:
            raise InputError(f"data.version={self.version}: expected one of {', '.join(VERSIONS)}")
        if self.num_classes not in ((19, 43) if self.version == "v1" else (19,)):
            expected = "19 or 43" if self.version == "v1" else "19 in version 2"
            raise InputError(f"data.num_classes={self.num_classes}: expected {expected}")
        check_bands(self.bands, BANDS, self.scaling)
        root = check_root(self)
        folder = self.images or _FOLDERS[self.version]
        classes = CLASSES_19 if self.num_classes == 19 else CLASSES_43
        stack = BandStack(
            tuple(Band(band, f"{{path}}/{{name}}_{band}.tif") for band in self.bands),
            self.scaling,
            GRID,
            rgb_channels(self.bands, RGB),
        )
        read = _read_v1 if self.version == "v1" else _read_v2
        source, labels_of = read(self, split, root, folder)
        class_of = {name: c for c, name in enumerate(classes)}
        records = Records(
            Record(key, os.path.join(root, key), tuple(sorted(class_of[name] for name in labels)), bands=stack)
            for key, labels in labels_of.items()
            if labels
        )
        if not records:
            raise InputError(f"{source}: split {split!r} has no patch with a label")
        check_files(self, records, source)
        protocol = (
            f"BigEarthNet {self.version}, {os.path.basename(source)}, split {split}, {len(records):,} of {len(labels_of):,} "
            f"patches (the others have none of the {len(classes)} classes), bands {' '.join(self.bands)}, {self.scaling}, "
            "10 m grid, bilinear"
        )
        return Manifest(classes, records, split, protocol)


# The file that names the patches, and the class names of each patch by its key.
_Patches = tuple[str, dict[str, set[str]]]


def _read_v1(config: BigEarthNetConfig, split: str, root: str, folder: str) -> _Patches:
    source = find_split_file(root, config.lists, split, "list")
    reader = csv.reader(io.StringIO(read_text(source)))
    try:
        names = [row[0].strip() for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{source}, line {reader.line_num}: {error}") from error
    joined = {old: new for new, many in JOINED.items() for old in many} if config.num_classes == 19 else None
    labels_of: dict[str, set[str]] = {}
    for line, name in enumerate(track(names, len(names), f"labels of {split}"), start=1):
        key = f"{folder}/{name}"
        if not name or key in labels_of:
            raise InputError(f"{source}, line {line}: {f'repeats {shown(name)}' if name else 'names no patch'}")
        labels = _read_labels(os.path.join(root, key, f"{name}_labels_metadata.json"))
        labels_of[key] = labels if joined is None else {joined[label] for label in labels if label in joined}
    return source, labels_of


def _read_labels(path: str) -> set[str]:
    """The labels that one patch's JSON file states."""
    document = read_json(path)
    labels = document.get("labels") if isinstance(document, dict) else None
    if not isinstance(labels, list) or not labels:
        raise InputError(f"{path}: labels is {shown(labels)}, expected a list of class names")
    return _known(labels, CLASSES_43, path)


def _read_v2(config: BigEarthNetConfig, split: str, root: str, folder: str) -> _Patches:
    source = os.path.join(root, config.metadata)
    columns = _read_parquet(source, ("patch_id", "labels", "split"))
    splits = columns["split"]
    labels_of: dict[str, set[str]] = {}
    for row, (patch, labels) in enumerate(zip(columns["patch_id"], columns["labels"], strict=True)):
        if splits[row] != split:
            continue
        if not isinstance(patch, str) or patch.count("_") < 2 or not isinstance(labels, list):
            raise InputError(
                f"{source}, row {row}: patch_id {shown(patch)}, labels {shown(labels)}: expected a name and a list"
            )
        # The folder of a tile is named like its patches, without their row and column.
        key = f"{folder}/{patch.rsplit('_', 2)[0]}/{patch}"
        if key in labels_of:
            raise InputError(f"{source}, row {row}: repeats {shown(patch)}")
        labels_of[key] = _known(labels, CLASSES_19, f"{source}, row {row}")
    if not labels_of:
        names = listed(sorted({str(name) for name in splits}))
        raise InputError(f"{source}: split {split!r} does not exist; splits: {names}")
    return source, labels_of


def _read_parquet(source: str, names: Sequence[str]) -> Mapping[str, list[Any]]:
    """Columns of a parquet file as lists."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{source}: reading parquet needs pyarrow: pip install -r requirements-parquet.txt") from None
    try:
        table = pyarrow.parquet.read_table(source)
        columns = {n: table.column(n).to_pylist() for n in names if table.column_names.count(n) == 1}
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise InputError(f"{source}: cannot be read: {first_line(error)}") from error
    for name in names:
        if name not in columns:
            raise InputError(f"{source}: expected one column {name!r}; columns: {listed(table.column_names)}")
    return columns


def _known(labels: Sequence[Any], classes: Sequence[str], where: str) -> set[str]:
    foreign = [label for label in labels if label not in classes]
    if foreign:
        raise InputError(f"{where}: label {shown(foreign[0])} is not one of BigEarthNet's {len(classes)} classes")
    return set(labels)
