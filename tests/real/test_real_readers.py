"""The readers on real images and labels; skipped where MLVISION_REAL_DATA does not say where these are."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlvision.data import build_manifest
from mlvision.data.images import read_image, read_record
from mlvision.data.manifest import check_disjoint, check_same_classes

UCMERCED = {
    "images": "images",
    "ignore_columns": ["landuse_class"],
    "split_rule": "file_number",
    "splits": {"train": "00-49", "val": "50-59", "test": "60-79"},
}
COCO = {"annotations": "instances_{split}.json", "images": "images"}


def test_ucmerced_splits_and_label_counts(real_data):
    root = real_data / "ucmerced_multilabel"
    manifests = {split: build_manifest("csv", root=str(root), split=split, **UCMERCED) for split in UCMERCED["splits"]}

    assert {split: len(manifest) for split, manifest in manifests.items()} == {"train": 1050, "val": 210, "test": 420}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        check_disjoint(manifests[a], manifests[b])
        check_same_classes(manifests[a], manifests[b])
    # Counted again, without the csv module: names end in two digits, none of the fields is quoted.
    lines = [line.split(",") for line in (root / "labels.csv").read_text().split("\n") if line]
    assert manifests["train"].classes == tuple(lines[0][2:])
    assert len(manifests["train"].classes) == 17
    for split, (low, high) in {"train": (0, 49), "val": (50, 59), "test": (60, 79)}.items():
        rows = [fields for fields in lines[1:] if low <= int(fields[0][-6:-4]) <= high]
        expected = np.array([fields[2:] for fields in rows], dtype=np.float32)
        np.testing.assert_array_equal(manifests[split].targets, expected)
        assert [r.key for r in manifests[split].records] == [f"images/{fields[0]}" for fields in rows]


@pytest.mark.parametrize(
    ("split", "num_images", "num_annotated", "num_annotations"),
    [("train2017", 337, 334, 2838), ("val2017", 206, 204, 1786)],
)
def test_coco_subset_counts(real_data, split, num_images, num_annotated, num_annotations):
    root = real_data / "coco_subset"
    everything = build_manifest("coco", root=str(root), split=split, protocol="all", **COCO)
    annotated = build_manifest("coco", root=str(root), split=split, **COCO)

    assert (len(everything), len(annotated), len(everything.classes)) == (num_images, num_annotated, 80)
    assert sum(len(record.boxes) for record in annotated.records) == num_annotations
    document = json.loads((root / f"instances_{split}.json").read_text())
    name_of = {category["id"]: category["name"] for category in document["categories"]}
    assert everything.classes == tuple(name_of[i] for i in sorted(name_of))
    pairs = {(a["image_id"], name_of[a["category_id"]]) for a in document["annotations"]}
    present = {
        (int(Path(record.key).stem), everything.classes[c]) for record in everything.records for c in record.labels
    }
    assert present == pairs
    assert sum(record.boxes.crowd.sum() for record in annotated.records) == sum(
        a["iscrowd"] for a in document["annotations"]
    )


def test_coco_subset_files_are_resized_copies(real_data):
    root = real_data / "coco_subset"
    train, val = (build_manifest("coco", root=str(root), split=s, **COCO) for s in ("train2017", "val2017"))
    check_disjoint(train, val)
    check_same_classes(train, val)
    sizes = {
        image["file_name"]: image["small_size"]
        for split in ("train2017", "val2017")
        for image in json.loads((root / f"instances_{split}.json").read_text())["images"]
    }
    for record in val.records:
        image = read_record(record)  # compares the shape with the annotation's
        assert list(image.shape[1::-1]) == sizes[Path(record.key).name] != list(record.size)
        assert record.boxes.xyxy.min() >= 0
        assert record.boxes.xyxy.max() <= 1


def test_coco_subset_agrees_with_an_independent_box_list(real_data):
    # `file x1 y1 x2 y2 class ...` of full val2017 in pixels, made by another project; x2 and y2 are the last pixel's.
    folder = real_data / "label_files" / "coco"
    names = (folder / "coco80_names.txt").read_text().split("\n")
    manifest = build_manifest("coco", root=str(real_data / "coco_subset"), split="val2017", **COCO)
    listed = {}
    with gzip.open(folder / "coco17_val_boxes.txt.gz", "rt") as file:
        for line in file:
            name, *numbers = line.split()
            listed[name] = np.array(numbers, dtype=float).reshape(-1, 5)
    compared = 0
    for record in manifest.records:
        theirs = listed.get(Path(record.key).name)
        if theirs is None:
            continue
        assert {manifest.classes[c] for c in record.labels} == {names[int(c)] for c in theirs[:, 4]}
        if len(theirs) == len(record.boxes):
            theirs[:, 2:4] += 1
            np.testing.assert_array_equal([names.index(manifest.classes[c]) for c in record.boxes.labels], theirs[:, 4])
            np.testing.assert_allclose(record.boxes.xyxy * np.tile(record.size, 2), theirs[:, :4], atol=0.02)
            compared += len(theirs)
    assert compared > 1000


def test_photos_decode_as_pillow_decodes_them(real_data):
    files = sorted((real_data / "imagenet_samples" / "images").glob("*.jpg"))[::25]
    for path in files:
        np.testing.assert_array_equal(read_image(str(path)), np.asarray(Image.open(path).convert("RGB")))
    assert len(files) == 20
