"""Images with labels: one reader per format gives a Manifest; views and loader make batches of it."""

from mlvision.data.manifest import Manifest
from mlvision.data.readers import (
    DATASETS,
    BigEarthNetConfig,
    CocoConfig,
    CsvConfig,
    DataConfig,
    ImagenetConfig,
    MatrixConfig,
    NuswideConfig,
    Sen12msConfig,
    Vg500Config,
    VocConfig,
    build_manifest,
    read_split,
)
from mlvision.data.records import Boxes, Record

__all__ = [
    "DATASETS",
    "BigEarthNetConfig",
    "Boxes",
    "CocoConfig",
    "CsvConfig",
    "DataConfig",
    "ImagenetConfig",
    "Manifest",
    "MatrixConfig",
    "NuswideConfig",
    "Record",
    "Sen12msConfig",
    "Vg500Config",
    "VocConfig",
    "build_manifest",
    "read_split",
]
