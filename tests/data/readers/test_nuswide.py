"""nuswide.py on the layout of the official archives ImageList, Groundtruth and ConceptsList."""

import numpy as np
import pytest
from layouts import write_nuswide

from mlvision.data import build_manifest
from mlvision.data.readers.nuswide import VARIANTS
from mlvision.errors import InputError

CONCEPTS = ("airport", "animal", "lake")
# Rows of Imagelist.txt, in its order: neither split's list is in that order.
IMAGES = {
    "actor\\0001_2124494179.jpg": ("Train", (0, 1, 1)),
    "actor\\0002_174174086.jpg": ("Test", (1, 0, 0)),
    "zoo\\0003_99.jpg": ("Train", (0, 0, 0)),
    "zoo\\0004_98.jpg": ("Test", (0, 0, 1)),
    "zoo\\0005_97.jpg": ("Train", (1, 1, 0)),
}
ORDER = {"Train": [4, 0, 2], "Test": [3, 1]}


@pytest.fixture
def root(tmp_path):
    write_nuswide(tmp_path, CONCEPTS, IMAGES, ORDER)
    return tmp_path


def read(root, split="Train", **options):
    return build_manifest("nuswide", root=str(root), split=split, **options)


@pytest.mark.parametrize("labels", ["all", "split"])
def test_rows_are_joined_in_the_lists_order(root, labels):
    train, test = read(root, labels=labels), read(root, "Test", labels=labels)

    assert train.classes == CONCEPTS
    assert [r.key for r in train.records] == [
        "Flickr/zoo/0005_97.jpg",
        "Flickr/actor/0001_2124494179.jpg",
        "Flickr/zoo/0003_99.jpg",
    ]
    assert train.records[0].path == str(root / "Flickr" / "zoo" / "0005_97.jpg")
    np.testing.assert_array_equal(train.targets, [[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(test.targets, [[0, 0, 1], [1, 0, 0]])


def test_the_protocol_names_the_variant(root):
    everything, annotated = read(root), read(root, protocol="annotated")

    assert len(annotated) == 2
    assert "every image (3 of 3: not a variant known by its number of images), 3 concepts" in everything.protocol
    assert f"records sha256 {everything.hash[:16]}" in everything.protocol
    assert "images with at least one label (2 of 3: not a variant" in annotated.protocol
    assert f"records sha256 {annotated.hash[:16]}" in annotated.protocol


def test_a_variant_known_by_its_count_is_named(root, monkeypatch):
    monkeypatch.setitem(VARIANTS, ("Train", 3), "ours")
    assert "(3 of 3: ours)" in read(root).protocol


def test_missing_images_are_refused_or_skipped(root):
    (root / "Flickr" / "zoo" / "0005_97.jpg").unlink()
    with pytest.raises(InputError, match="TrainImagelist.txt: 1 of its 3 image files are missing"):
        read(root)
    skipped = read(root, missing="skip")
    assert [r.labels for r in skipped.records] == [(1, 2), ()]
    assert "every image, 1 files missing and left out (2 of 3" in skipped.protocol
    assert len(read(root, check_files=False)) == 3


def label_file(root, name):
    return root / "Groundtruth" / name


def test_values_other_than_0_and_1_are_refused_with_their_line(root):
    # As line 78,372 of the published Labels_lake_Train.txt has it.
    path = label_file(root, "TrainTestLabels/Labels_lake_Train.txt")
    path.write_text("0\n-1130179\n0\n")
    with pytest.raises(InputError, match=f"{path}, line 2: '-1130179', expected 0 or 1"):
        read(root, labels="split")
    assert len(read(root)) == 3
    path = label_file(root, "AllLabels/Labels_animal.txt")
    path.write_text("1\n0\n-1\n0\n1\n")
    with pytest.raises(InputError, match="AllLabels/Labels_animal.txt, line 3: '-1', expected 0 or 1"):
        read(root)


def test_rows_that_do_not_fit_are_refused(root):
    label_file(root, "AllLabels/Labels_animal.txt").write_text("1\n0\n")
    with pytest.raises(InputError, match="Labels_animal.txt: has 2 rows, .*ImageList/Imagelist.txt names 5 images"):
        read(root)
    label_file(root, "TrainTestLabels/Labels_animal_Test.txt").write_text("1\n")
    with pytest.raises(InputError, match="Labels_animal_Test.txt: has 1 rows, .*TestImagelist.txt names 2 images"):
        read(root, "Test", labels="split")
    label_file(root, "AllLabels/Labels_airport.txt").unlink()
    with pytest.raises(InputError, match="AllLabels/Labels_airport.txt: cannot be read: No such file"):
        read(root)


def test_lists_that_do_not_fit_are_refused(root):
    lists = root / "ImageList"
    (lists / "TrainImagelist.txt").write_text("actor\\0001_2124494179.jpg\nsea\\1.jpg\n")
    with pytest.raises(InputError, match="TrainImagelist.txt: image 'sea.*1.jpg' is not in .*Imagelist.txt"):
        read(root)
    with pytest.raises(InputError, match="ValImagelist.txt: no such list; splits there: Test, Train"):
        read(root, "Val")
    (lists / "Imagelist.txt").write_text("a\\1.jpg\na\\1.jpg\n")
    with pytest.raises(InputError, match="Imagelist.txt, line 2: repeats the image"):
        read(root)
    for option in ("protocol", "labels", "missing"):
        with pytest.raises(InputError, match=f"data.{option}=some: expected one of"):
            read(root, **{option: "some"})


def test_a_split_without_labels_is_empty(root):
    label_file(root, "AllLabels/Labels_airport.txt").write_text("0\n" * 5)
    label_file(root, "AllLabels/Labels_lake.txt").write_text("0\n" * 5)
    with pytest.raises(InputError, match="TestImagelist.txt: split 'Test' is empty: none of its 2 images is left"):
        read(root, "Test", protocol="annotated")
