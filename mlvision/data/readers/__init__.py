"""Readers: one file per format, whose Config reads a split as a Manifest. A new one is a file and a line in DATASETS."""

import dataclasses
import difflib
import gc
from typing import Any

from mlvision.data.manifest import Manifest, check_distinct_images
from mlvision.data.readers.base import DataConfig, check_inside
from mlvision.data.readers.bigearthnet import BigEarthNetConfig
from mlvision.data.readers.coco import CocoConfig
from mlvision.data.readers.csv_table import CsvConfig
from mlvision.data.readers.imagenet import ImagenetConfig
from mlvision.data.readers.matrix import MatrixConfig
from mlvision.data.readers.nuswide import NuswideConfig
from mlvision.data.readers.sen12ms import Sen12msConfig
from mlvision.data.readers.vg500 import Vg500Config
from mlvision.data.readers.voc import VocConfig
from mlvision.errors import InputError

DATASETS: dict[str, type[DataConfig]] = {
    "bigearthnet": BigEarthNetConfig,
    "coco": CocoConfig,
    "csv": CsvConfig,
    "imagenet": ImagenetConfig,
    "matrix": MatrixConfig,
    "nuswide": NuswideConfig,
    "sen12ms": Sen12msConfig,
    "vg500": Vg500Config,
    "voc": VocConfig,
}
DataConfig.choices = DATASETS


def build_manifest(name: str, *, split: str, **options: Any) -> Manifest:
    """Reads one split of a data set: `build_manifest("coco", root="coco", split="val2017")`.

    Args:
        name: a key of `DATASETS`.
        split: the data set's own name of the split.
        options: fields of the reader's Config.

    Raises:
        InputError: an unknown reader, option or split, or data that cannot be used.
    """
    if name not in DATASETS:
        raise InputError(f"data.name={name}: expected one of {', '.join(DATASETS)}")
    config_class = DATASETS[name]
    known = [option.name for option in dataclasses.fields(config_class)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            raise InputError(
                f"{option}: no such option of {name!r}; " + (f"did you mean {near[0]}?" if near else ", ".join(known))
            )
    return read_split(config_class(name=name, **options), split)


def read_split(config: DataConfig, split: str) -> Manifest:
    """Reads one split of the data set that `config` describes, and checks its images' names."""
    # Readers make millions of lists and objects, none of them garbage: looking through them all again and again, whenever
    # some more have been made, would take as long as the reading.
    collects = gc.isenabled()
    gc.disable()
    try:
        manifest = config.read(split)
    finally:
        if collects:
            gc.enable()
    check_inside(config, manifest)
    check_distinct_images(manifest)
    return dataclasses.replace(manifest, max_pixels=config.max_pixels)


__all__ = [
    "DATASETS",
    "BigEarthNetConfig",
    "CocoConfig",
    "CsvConfig",
    "DataConfig",
    "ImagenetConfig",
    "MatrixConfig",
    "NuswideConfig",
    "Sen12msConfig",
    "Vg500Config",
    "VocConfig",
    "build_manifest",
    "read_split",
]
