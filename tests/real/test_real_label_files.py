"""The readers on published label files, whose statistics are known; skipped where MLVISION_REAL_DATA does not say where."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from layouts import VocObject, write_voc

from mlvision.commands.prepare_data import main
from mlvision.data import build_manifest
from mlvision.data.manifest import check_disjoint
from mlvision.data.readers.voc import VOC_CLASSES
from mlvision.metrics import real_accuracy


def lines(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return file.read().splitlines()


# VOC2007: images that show each class by an object that is not difficult, as table 1 of the devkit's documentation has them
# for trainval, and as analyses of the set that others published have them for test.
VOC_COUNTS = {
    "trainval": [238, 243, 330, 181, 244, 186, 713, 337, 445, 141, 200, 421, 287, 245, 2008, 245, 96, 229, 261, 256],
    "test": [204, 239, 282, 172, 212, 174, 721, 322, 417, 127, 190, 418, 274, 222, 2007, 224, 97, 223, 259, 229],
}
VOC_IMAGES = {"trainval": 5011, "test": 4952}


def voc_folder(root: Path, labels: Path, split: str) -> np.ndarray:
    """A split's annotations written as XML from the published boxes; `[N, 20]` with 1, -1, and 0 for difficult alone.

    The flag of each object is published for the test split; in the other, those of the image-set lists stand in: an object
    is difficult where its class is shown by difficult objects alone.
    """
    rows = list(csv.reader(lines(labels / f"multilabel_{split}.csv.gz")))
    assert rows[0][1:] == list(VOC_CLASSES)
    table = {row[0]: [int(cell) for cell in row[1:]] for row in rows[1:]}
    objects = {}
    for line in lines(labels / f"boxes_{split}.txt.gz"):
        name, *numbers = line.split()
        objects[name.removesuffix(".jpg")] = np.array(numbers, dtype=int).reshape(-1, 5)
    flags = {image: [int(table[image][c] == 0) for c in of_image[:, 4]] for image, of_image in objects.items()}
    if split == "test":
        listed = [line.split() for line in lines(labels / "boxes_test_difficult.txt.gz")]
        flags = {row[0].removesuffix(".jpg"): [int(flag) for flag in row[1:]] for row in listed}
    images = {
        # Sizes are not published with these boxes: every image of VOC is at most 500 pixels wide and high.
        image: (
            (500, 500),
            [
                VocObject(VOC_CLASSES[number[4]], tuple(number[:4].tolist()), flag)
                for number, flag in zip(objects[image], flags[image], strict=True)
            ],
        )
        for image in table
    }
    write_voc(root, {split: images})
    return np.array(list(table.values()))


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_voc2007_counts_are_the_official_ones(real_data, tmp_path, split):
    official = voc_folder(tmp_path, real_data / "label_files" / "voc2007", split)
    options = {"root": str(tmp_path), "split": split, "test": "none"}

    unknown = build_manifest("voc", difficult="unknown", **options)

    assert len(unknown) == VOC_IMAGES[split]
    assert (unknown.targets == 1).sum(axis=0).tolist() == VOC_COUNTS[split]
    np.testing.assert_array_equal(np.isnan(unknown.targets), official == 0)
    np.testing.assert_array_equal(unknown.targets == 1, official == 1)
    for row, record in enumerate(unknown.records):
        assert record.difficult == tuple(np.flatnonzero(official[row] == 0).tolist())
    if split == "test":
        for convention, positives in (("negative", official == 1), ("positive", official >= 0)):
            np.testing.assert_array_equal(build_manifest("voc", difficult=convention, **options).targets, positives)
        # 24,640 objects that are not difficult, says the devkit: 12,608 in trainval, 12,032 in test.
        assert sum(int((~record.boxes.difficult).sum()) for record in unknown.records) == 12032
        assert sum(len(record.boxes) for record in unknown.records) == 14976


@pytest.mark.parametrize(
    ("name", "num_classes", "labels", "counts"),
    [
        # Rows, classes and all labels of both lists; then images of a few classes, counted by cutting columns from the text.
        ("nuswide_81_m", 81, (24357, 12156), {0: (42, 18), 1: (1701, 813), 8: (911, 446)}),
        ("coco", 80, (29412, 14755), {0: (246, 121), 2: (505, 256)}),
    ],
)
def test_statistics_of_published_matrices_are_printed(real_data, tmp_path, capsys, name, num_classes, labels, counts):
    for split in ("train", "test"):
        rows = lines(real_data / "label_files" / "other" / f"{name}_{split}.txt.gz")
        (tmp_path / f"{split}.txt").write_text("\n".join(rows) + "\n")
    arguments = ["data.name=matrix", f"data.root={tmp_path}", f"out={tmp_path}/check"]
    if (
        name == "coco"
    ):  # the lists' columns are in alphabetical order: column 49 is the person, by far the most frequent
        names = sorted((real_data / "label_files" / "coco" / "coco80_names.txt").read_text().splitlines())
        (tmp_path / "names").write_text("\n".join(names))
        arguments.append("data.classes=names")

    assert main(["check", *arguments, "labels_only=true"]) == 0

    saved = json.loads((tmp_path / "check" / "check.json").read_text())
    assert len(saved["classes"]) == num_classes
    printed = capsys.readouterr().out
    for number, (split, num_images) in enumerate((("train", 10_000), ("test", 5_000))):
        summary = saved["splits"][split]
        assert (summary["images"], summary["labels"], summary["unknown"]) == (num_images, labels[number], 0)
        assert f"{num_images:,} images x {num_classes} classes, {labels[number]:,} labels" in printed
        present = summary["classes"]["present"]
        assert {c: present[c] for c in counts} == {c: n[number] for c, n in counts.items()}
        if name == "coco":
            assert saved["classes"][49] == "person"
            assert max(present) == present[49]
    if name == "coco":
        shown = [saved["splits"][split]["classes"]["present"][49] for split in ("train", "test")]
        assert ["person", *(f"{number:,}" for number in shown)] in [line.split() for line in printed.splitlines()]
    assert saved["overlaps"] == []


def test_real_labels_have_3163_empty_lists(real_data, tmp_path):
    files = real_data / "label_files" / "imagenet"
    (tmp_path / "real.json").write_text(lines(files / "real.json.gz")[0])
    (tmp_path / "names.json").write_text((files / "imagenet_simple_labels.json").read_text())

    manifest = build_manifest(
        "imagenet", root=str(tmp_path), split="val", real="real.json", classes="names.json", check_files=False
    )

    # 50,000 validation images; the counts are those of the file's publishers and of counting its brackets.
    assert len(manifest) == 50_000 - 3_163
    assert "3,163 images with an empty list left out" in manifest.protocol
    assert sum(len(record.labels) > 1 for record in manifest.records) == 7_443
    assert sum(len(record.labels) for record in manifest.records) == 57_553
    assert len(manifest.classes) == 1000
    # The first list is empty, the second is [970, 795], the third [230, 231].
    assert [(r.key, r.labels) for r in manifest.records[:2]] == [
        ("val/ILSVRC2012_val_00000002.JPEG", (795, 970)),
        ("val/ILSVRC2012_val_00000003.JPEG", (230, 231)),
    ]
    assert [manifest.classes[c] for c in manifest.records[0].labels] == ["ski", "alp"]


def test_real_accuracy_leaves_the_empty_lists_out(real_data):
    lists = json.loads(lines(real_data / "label_files" / "imagenet" / "real.json.gz")[0])
    # Of every ten images, nine get a class that fits (where one does), the tenth a class that does not.
    chosen = [
        (labels[-1] if row % 10 else next(c for c in range(1000) if c not in labels)) if labels else 0
        for row, labels in enumerate(lists)
    ]
    scores = np.zeros((50_000, 1000), dtype=np.float32)
    scores[np.arange(50_000), chosen] = 1

    wrong = sum(bool(labels) for labels in lists[::10])
    assert real_accuracy(scores, lists) == pytest.approx(1 - wrong / (50_000 - 3_163), abs=1e-12)


def test_vg500_lists_have_the_published_numbers(real_data, tmp_path):
    names = {}
    for split, published in (("train", 82_904), ("test", 10_000)):
        names[split] = lines(real_data / "label_files" / "other" / f"vg500_{split}_images.txt.gz")
        (tmp_path / f"{split}_list_500.txt").write_text("\n".join(names[split]) + "\n")
        assert len(names[split]) == published
    # The label file is not published with the lists: the last digits of a name stand in for its class.
    labels = {name: [int(name.removesuffix(".jpg")) % 500] for split in names for name in names[split]}
    (tmp_path / "vg_category_500_labels_index.json").write_text(json.dumps(labels))

    train, test = (build_manifest("vg500", root=str(tmp_path), split=s, check_files=False) for s in ("train", "test"))

    assert (len(train), len(test), len(train.classes)) == (82_904, 10_000, 500)
    assert [r.labels for r in test.records] == [(int(name[:-4]) % 500,) for name in names["test"]]
    check_disjoint(train, test)
