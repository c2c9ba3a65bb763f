"""Tiny data sets written in the layouts that their publishers use; each function cites what it copies."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import pyarrow
import pyarrow.parquet
import tifffile


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
