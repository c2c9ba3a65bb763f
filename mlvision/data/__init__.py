"""Images with labels: one reader per format gives a Manifest; views and loader make batches of it."""

import dataclasses
import difflib
import gc
from collections.abc import Callable
from typing import Any

from mlvision.data.bigearthnet import BigEarthNetConfig, read_bigearthnet
from mlvision.data.coco import CocoConfig, read_coco
from mlvision.data.csv_table import CsvConfig, read_csv
from mlvision.data.imagenet import ImagenetConfig, read_imagenet
from mlvision.data.manifest import DataConfig, Manifest, check_distinct_images, check_inside
from mlvision.data.matrix import MatrixConfig, read_matrix
from mlvision.data.nuswide import NuswideConfig, read_nuswide
from mlvision.data.records import Boxes, Record
from mlvision.data.sen12ms import Sen12msConfig, read_sen12ms
from mlvision.data.vg500 import Vg500Config, read_vg500
from mlvision.data.voc import VocConfig, read_voc
from mlvision.errors import InputError

DATASETS: dict[str, tuple[type[DataConfig], Callable[[Any, str], Manifest]]] = {
    "bigearthnet": (BigEarthNetConfig, read_bigearthnet),
    "coco": (CocoConfig, read_coco),
    "csv": (CsvConfig, read_csv),
    "imagenet": (ImagenetConfig, read_imagenet),
    "matrix": (MatrixConfig, read_matrix),
    "nuswide": (NuswideConfig, read_nuswide),
    "sen12ms": (Sen12msConfig, read_sen12ms),
    "vg500": (Vg500Config, read_vg500),
    "voc": (VocConfig, read_voc),
}
DataConfig.choices = {name: config for name, (config, _) in DATASETS.items()}


def build_manifest(name: str, *, split: str, **options: Any) -> Manifest:
    """Reads one split of a data set: `build_manifest("coco", root="coco", split="val2017")`.

    Args:
        name: a key of `DATASETS`.
        split: the data set's own name of the split.
        options: fields of the reader's Config.

    Raises:
        InputError: an unknown reader, option or split, or data that cannot be used.
    """
    config_class, _ = _look_up(name)
    known = [option.name for option in dataclasses.fields(config_class)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            raise InputError(
                f"{option}: no such option of {name!r}; " + (f"did you mean {near[0]}?" if near else ", ".join(known))
            )
    return read_split(config_class(name=name, **options), split)


def read_split(config: DataConfig, split: str) -> Manifest:
    """Reads one split with the reader that `config.name` chooses."""
    _, read = _look_up(config.name)
    # Readers make millions of lists and objects, none of them garbage: looking through them all again and again, whenever
    # some more have been made, would take as long as the reading.
    collects = gc.isenabled()
    gc.disable()
    try:
        manifest = read(config, split)
    finally:
        if collects:
            gc.enable()
    check_inside(config, manifest)
    check_distinct_images(manifest)
    return dataclasses.replace(manifest, max_pixels=config.max_pixels)


def _look_up(name: str) -> tuple[type[DataConfig], Callable[[Any, str], Manifest]]:
    if name not in DATASETS:
        raise InputError(f"data.name={name}: expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


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
