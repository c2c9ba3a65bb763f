"""Tiny data sets written in the layouts that their publishers use; each function cites what it copies."""

import csv
import json
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import pyarrow
import pyarrow.parquet
import tifffile

from mlvision.data import (
    BigEarthNetConfig,
    CocoConfig,
    CsvConfig,
    ImagenetConfig,
    MatrixConfig,
    NuswideConfig,
    Sen12msConfig,
    Vg500Config,
    VocConfig,
)
from mlvision.data.readers.base import DataConfig


class VocObject(NamedTuple):
    """One object of a VOC annotation; the box in VOC's pixels, counted from 1."""

    name: str
    box: tuple[float, float, float, float]
    difficult: int | None = 0


def voc_annotation(image_id: str, size: tuple[int, int], objects: Sequence[VocObject]) -> str:
    """The XML of one image as VOC2007's development kit has it; the person has a part, as some have in later years."""
    elements = []
    for name, box, difficult in objects:
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
        part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        elements.append(
            f"<object><name>{escape(name)}</name><pose>Unspecified</pose><truncated>0</truncated>{flag}"
            f"<bndbox>{corners}</bndbox>{part if name == 'person' else ''}</object>"
        )
    return (
        f"<annotation><folder>VOC2007</folder><filename>{image_id}.jpg</filename>"
        "<source><database>The VOC2007 Database</database></source>"
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        f"<segmented>0</segmented>{''.join(elements)}</annotation>\n"
    )


def write_voc(root: Path, splits: Mapping[str, Mapping[str, tuple[tuple[int, int], Sequence[VocObject]]]]) -> None:
    """ImageSets/Main/{split}.txt and Annotations/{image}.xml, and an empty JPEGImages/{image}.jpg where there is none."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{image}\n" for image in images))
        for image, (size, objects) in images.items():
            (root / "Annotations" / f"{image}.xml").write_text(voc_annotation(image, size, objects))
            path = root / "JPEGImages" / f"{image}.jpg"
            if not path.exists():
                path.touch()


def write_nuswide(
    root: Path,
    concepts: Sequence[str],
    images: Mapping[str, tuple[str, Sequence[int]]],
    order: Mapping[str, Sequence[int]],
) -> None:
    """NUS-WIDE's archives unpacked: lists with backslashes, and a file of 0 and 1 for each concept and list.

    `images`: name to (split, a value for each concept), in the order of Imagelist.txt; `order`: the rows of each split's own
    list. Source of the layout: the names of the files in ImageList.zip, Groundtruth.zip and ConceptsList.zip.
    """
    names = list(images)
    columns = {name: values for name, (_, values) in images.items()}
    lists = {"": names, **{split: [names[row] for row in rows] for split, rows in order.items()}}
    for folder in ("ImageList", "ConceptsList", "Groundtruth/AllLabels", "Groundtruth/TrainTestLabels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ConceptsList" / "Concepts81.txt").write_text("".join(f"{concept}\n" for concept in concepts))
    for split, listed in lists.items():
        (root / "ImageList" / f"{split}Imagelist.txt").write_text("".join(f"{name}\r\n" for name in listed))
        for c, concept in enumerate(concepts):
            path = f"TrainTestLabels/Labels_{concept}_{split}.txt" if split else f"AllLabels/Labels_{concept}.txt"
            (root / "Groundtruth" / path).write_text("".join(f"{columns[name][c]}\n" for name in listed))
    for name in names:
        path = root / "Flickr" / name.replace("\\", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()


BIGEARTHNET_SIDES = {"B02": 120, "B03": 120, "B04": 120, "B08": 120, "B01": 20, "B09": 20}  # pixels; the others have 60


def write_bands(folder: Path, bands: Sequence[str], value: int, texture: int = 1) -> None:
    """A patch folder of BigEarthNet: `<patch>_<band>.tif`, uint16, of 10, 20 and 60 m; band i holds i * 100 + value.

    The first pixel of each band is 0, so that rows, columns and bands cannot be confused unseen. Random numbers below
    `texture` are added, for networks that are to learn from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(value)
    for i, band in enumerate(bands):
        side = BIGEARTHNET_SIDES.get(band, 60)
        plane = (i * 100 + value + rng.integers(0, texture, (side, side))).astype(np.uint16)
        plane[0, 0] = 0
        tifffile.imwrite(folder / f"{folder.name}_{band}.tif", plane, photometric="minisblack")


def write_bigearthnet_v1(root: Path, split: str, patches: Mapping[str, Sequence[str]], bands: Sequence[str]) -> None:
    """BigEarthNet-v1.0/<patch>/ with bands and `<patch>_labels_metadata.json`, and a list of patches without a header.

    Keys of the JSON as the archive's manual states them: labels, coordinates, projection, tile_source, acquisition_date. The
    list has the Sentinel-1 patch in a second column, as those of BigEarthNet-MM do.
    """
    for i, (patch, labels) in enumerate(patches.items()):
        folder = root / "BigEarthNet-v1.0" / patch
        write_bands(folder, bands, 500 + i)
        document = {
            "labels": list(labels),
            "coordinates": {"ulx": 304800, "uly": 6000000, "lrx": 306000, "lry": 5998800},
            "projection": "WGS 84 / UTM zone 29N",
            "tile_source": "S2A_MSIL1C_20170617T113321_N0205_R080_T29UPU_20170617T113319.SAFE",
            "acquisition_date": "2017-06-17 11:33:21",
        }
        (folder / f"{patch}_labels_metadata.json").write_text(json.dumps(document))
    (root / f"{split}.csv").write_text("".join(f"{patch},S1A_IW_GRDH_{i}\n" for i, patch in enumerate(patches)))


def write_bigearthnet_v2(
    root: Path, rows: Sequence[tuple[str, Sequence[str], str]], bands: Sequence[str], texture: int = 1
) -> None:
    """metadata.parquet with (patch_id, labels, split) and further columns, and BigEarthNet-S2/<tile>/<patch>/ with bands."""
    for i, (patch, _, _) in enumerate(rows):
        write_bands(root / "BigEarthNet-S2" / "_".join(patch.split("_")[:-2]) / patch, bands, 500 + i, texture)
    table = {
        "patch_id": [patch for patch, _, _ in rows],
        "labels": [list(labels) for _, labels, _ in rows],
        "split": [split for _, _, split in rows],
        "country": ["Austria"] * len(rows),
        "contains_seasonal_snow": [False] * len(rows),
        "contains_cloud_or_shadow": [False] * len(rows),
    }
    pyarrow.parquet.write_table(pyarrow.table(table), root / "metadata.parquet")


def write_sen12ms(root: Path, split: str, patches: Mapping[str, Sequence[float]], texture: int = 1) -> None:
    """ROIs.../s2_.../<file> with 13 channels of uint16, `<split>_list.txt`, and the shares of all splits in one pickle.

    Channel i of patch n (counted from 1) holds 100 * i + n, and 0 in its first pixel; `texture` as in `write_bands`.
    """
    for n, name in enumerate(patches, start=1):
        season, scene = name.split("_s2_")
        folder = root / season / f"s2_{scene.split('_')[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(n).integers(0, texture, (8, 8, 13))
        channels = (100 * np.arange(13) + n + noise).astype(np.uint16)
        channels[0, 0] = 0
        tifffile.imwrite(folder / name, channels, photometric="minisblack", planarconfig="contig")
    (root / f"{split}_list.txt").write_text("".join(f"{name}\n" for name in patches))
    path = root / "IGBP_probability_labels.pkl"
    shares = pickle.loads(path.read_bytes()) if path.exists() else {}
    shares |= {name: np.array(values) for name, values in patches.items()}
    path.write_bytes(pickle.dumps(shares))


# Whole data sets, one per reader of DATASETS


def make_data(data: DataConfig, scenes_root: Path, root: Path) -> None:
    """A data set of a few images in the layout that a reader's options expect, with its splits and label columns."""
    splits = [s for s in (data.train, data.val, data.test) if s]
    photos = sorted((scenes_root / "images" / "train").iterdir())
    LAYOUTS[data.name](data, splits, photos, root)


def make_bigearthnet(data: BigEarthNetConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    several = (["Pastures", "Mixed forest"], ["Mixed forest"], ["Marine waters"])
    patches = [
        (f"S2A_MSIL2A_20170613T101031_T33UUP_{i}_57", several[i % 3], splits[i % len(splits)]) for i in range(24)
    ]
    assert data.version == "v2"
    write_bigearthnet_v2(root, patches, data.bands, texture=2000)


def make_sen12ms(data: Sen12msConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    for number, split in enumerate(splits):
        shares = [[float(c == 5 * (i % 3)) for c in range(17)] for i in range(24)]
        write_sen12ms(
            root, split, {f"ROIs1158_spring_s2_{number}_p{i}.tif": shares[i] for i in range(24)}, texture=9000
        )


def make_coco(data: CocoConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    scenes_root = photos[0].parents[2]
    for number, split in enumerate(splits):
        name = "instances_test.json" if number else "instances_train.json"
        annotations = root / data.annotations.format(split=split)
        annotations.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes_root / "annotations" / name, annotations)
        shutil.copytree(scenes_root / "images", root / data.images.format(split=split), dirs_exist_ok=True)


def make_csv(data: CsvConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    images = root / data.images
    images.mkdir(parents=True, exist_ok=True)
    names = [f"place{number:02d}.jpg" for number in range(80)]
    for name, path in zip(names, photos, strict=False):
        shutil.copy(path, images / name)
    with open(root / data.file, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([data.image_column, *data.ignore_columns, "sea", "sand", "trees"])
        writer.writerows(
            [n, *["-" for _ in data.ignore_columns], i % 2, int(i % 3 == 0), int(i % 5 > 1)]
            for i, n in enumerate(names)
        )


def make_nuswide(data: NuswideConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    images, order = {}, {}
    for split, chosen in shares(splits, photos):
        order[split] = list(range(len(images), len(images) + len(chosen)))
        images |= {f"sea\\{p.name}": (split, (i % 2, int(i % 3 == 0), 1)) for i, p in enumerate(chosen)}
    write_nuswide(root, ("airport", "animal", "beach"), images, order)
    for path in photos:
        shutil.copy(path, root / data.images / "sea")


def make_vg500(data: Vg500Config, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    labels = {path.name: [i % 3, 499] for i, path in enumerate(photos)}
    (root / data.labels).write_text(json.dumps(labels))
    (root / data.images[1]).mkdir()
    for split, chosen in shares(splits, photos):
        (root / data.lists.format(split=split)).write_text("".join(f"{path.name}\n" for path in chosen))
        for path in chosen:
            shutil.copy(path, root / data.images[1])


def make_voc(data: VocConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    for number, (split, chosen) in enumerate(shares(splits, photos)):
        objects = [
            VocObject("cat", (1, 1, 9, 20)),
            VocObject("dog", (5, 6, 30, 17)),
            VocObject("sofa", (2, 2, 9, 9), 1),
        ]
        images = {f"{number}{i:05d}": ((48, 48), objects[i % 3 :]) for i in range(len(chosen))}
        write_voc(root, {split: images})
        for image, path in zip(images, chosen, strict=True):
            shutil.copy(path, root / "JPEGImages" / f"{image}.jpg")


def make_imagenet(data: ImagenetConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    for split, chosen in shares(splits, photos):
        for i, path in enumerate(chosen):
            folder = root / data.images.format(split=split) / ("n01440764", "n01443537", "n02979186")[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"ILSVRC2012_{split}_{i + 1:08d}.JPEG")
    if data.real:
        (root / data.real).write_text(json.dumps([[0, i % 3][: i % 4] for i in range(len(photos))]))


def make_matrix(data: MatrixConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    for split, chosen in shares(splits, photos):
        folder = root / f"{split}2014"
        folder.mkdir()
        rows = []
        for i, path in enumerate(chosen):
            shutil.copy(path, folder)
            rows.append(f"{split}2014/{path.name} {i % 2} {int(i % 3 == 0)} {int(i % 5 > 1)}\n")
        (root / data.labels.format(split=split)).write_text("".join(rows))


LAYOUTS: dict[str, Callable[[Any, Sequence[str], Sequence[Path], Path], None]] = {
    "bigearthnet": make_bigearthnet,
    "coco": make_coco,
    "csv": make_csv,
    "imagenet": make_imagenet,
    "matrix": make_matrix,
    "nuswide": make_nuswide,
    "sen12ms": make_sen12ms,
    "vg500": make_vg500,
    "voc": make_voc,
}


def shares(splits: Sequence[str], photos: Sequence[Path]) -> list[tuple[str, Sequence[Path]]]:
    """Equally many photos for each split."""
    num = len(photos) // len(splits)
    return [(split, photos[i * num : (i + 1) * num]) for i, split in enumerate(splits)]
