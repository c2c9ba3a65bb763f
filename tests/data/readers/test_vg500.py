"""vg500.py on the files that SSGRL's repository reads: two lists, and a JSON object of class numbers."""

import json

import pytest

from mlvision.data import build_manifest
from mlvision.errors import InputError

LABELS = {"2360596.jpg": [499, 3, 3], "107899.jpg": [0], "1.jpg": [], "77.jpg": [1]}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "train_list_500.txt").write_text("2360596.jpg\n107899.jpg\n1.jpg\n")
    (tmp_path / "test_list_500.txt").write_text("77.jpg\n")
    (tmp_path / "vg_category_500_labels_index.json").write_text(json.dumps(LABELS))
    for folder, names in (("VG_100K", ["2360596.jpg", "1.jpg"]), ("VG_100K_2", ["107899.jpg", "77.jpg", "1.jpg"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    return tmp_path


def read(root, split="train", **options):
    return build_manifest("vg500", root=str(root), split=split, **options)


def test_records_by_hand(root):
    manifest = read(root)

    assert len(manifest.classes) == 500
    assert manifest.classes[499] == "class 499"
    assert [(r.key, r.labels) for r in manifest.records] == [
        ("VG_100K/2360596.jpg", (3, 499)),
        ("VG_100K_2/107899.jpg", (0,)),
        ("VG_100K/1.jpg", ()),  # in both folders: the first counts
    ]
    assert manifest.records[1].path == str(root / "VG_100K_2" / "107899.jpg")
    assert [r.key for r in read(root, "test").records] == ["VG_100K_2/77.jpg"]
    assert "train_list_500.txt, 3 images, 500 classes" in manifest.protocol


def test_class_names_come_from_a_file(root):
    (root / "names.txt").write_text("man\nwindow\n")
    (root / "vg_category_500_labels_index.json").write_text(json.dumps({name: [1] for name in LABELS}))
    assert read(root, classes="names.txt", num_classes=2).classes == ("man", "window")
    with pytest.raises(InputError, match="names.txt: names 2 classes, data.num_classes is 500"):
        read(root, classes="names.txt")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({**LABELS, "1.jpg": [500]}, "labels_index.json: '1.jpg' has .500., expected a list of classes 0 to 499"),
        ({**LABELS, "1.jpg": [-1]}, "'1.jpg' has .-1."),
        ({**LABELS, "1.jpg": "3"}, "'1.jpg' has '3'"),
        ({"2360596.jpg": []}, "train_list_500.txt, line 2: image '107899.jpg' has no labels in .*labels_index.json"),
        ([[1], [2]], "labels_index.json: expected an object, image name to class numbers"),
    ],
)
def test_faulty_labels_are_refused(root, labels, message):
    (root / "vg_category_500_labels_index.json").write_text(json.dumps(labels))
    with pytest.raises(InputError, match=message):
        read(root)


def test_missing_files_are_named(root):
    with pytest.raises(InputError, match="val_list_500.txt: no such list; splits there: test, train"):
        read(root, "val")
    (root / "VG_100K_2" / "107899.jpg").unlink()
    with pytest.raises(InputError, match="1 of its 3 image files are missing, the first is .*VG_100K/107899.jpg"):
        read(root)
    assert len(read(root, check_files=False)) == 3
    with pytest.raises(InputError, match="data.num_classes=0"):
        read(root, num_classes=0)
