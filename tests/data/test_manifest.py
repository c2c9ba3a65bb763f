"""manifest.py: targets, hashes, carving a validation part, and the refusals that protect an evaluation."""

import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlvision.data import DataConfig
from mlvision.data.manifest import (
    Manifest,
    carve_validation,
    check_disjoint,
    check_same_classes,
    true_paths,
)
from mlvision.data.readers.base import check_files, check_root
from mlvision.data.records import Record, Records
from mlvision.errors import InputError


def manifest(keys, split="train", folder="data", classes=("cat", "dog", "owl")):
    return Manifest(classes, tuple(Record(key, f"{folder}/{key}", (0,)) for key in keys), split, "made up")


def numbered(num):
    return [f"{i:04d}.jpg" for i in range(num)]


def test_targets_are_one_zero_and_nan():
    records = (Record("a", "a", (0, 2)), Record("b", "b", (), unknown=(1,)), Record("c", "c", (1,), unknown=(0, 2)))

    targets = Manifest(("cat", "dog", "owl"), records, "train").targets

    assert targets.dtype == np.float32
    np.testing.assert_array_equal(targets, [[1, 0, 1], [0, np.nan, 0], [np.nan, 1, np.nan]])


def test_hash_is_that_of_the_lines_of_json():
    """Label-map stores and checkpoints carry it: it must never change."""
    records = (Record('a"b\u00e9\U0001f600.jpg', "/x", (0, 1)), Record("c.jpg", "/y", (), (1,)))
    lines = r"""["a\"b\u00e9\ud83d\ude00.jpg", [0, 1], []]
["c.jpg", [], [1]]
"""
    assert Manifest(("cat", "dog"), records, "train").hash == hashlib.sha256(lines.encode()).hexdigest()


def test_hash_tells_keys_labels_and_order_apart():
    records = [Record("a", "x/a", (0,)), Record("b", "x/b", (1,))]
    hashes = {
        Manifest(("cat", "dog"), tuple(chosen), "train").hash
        for chosen in (
            records,
            records[::-1],
            records[:1],
            [records[0], Record("b", "x/b", (0,))],
            [records[0], Record("b", "x/b", (1,), unknown=(0,))],
            [records[0], Record("c", "x/b", (1,))],
        )
    }
    assert len(hashes) == 6
    elsewhere = tuple(Record(r.key, f"/other/{r.key}", r.labels) for r in records)
    assert Manifest(("cat", "dog"), elsewhere, "test").hash == Manifest(("cat", "dog"), tuple(records), "train").hash


def test_other_labels_are_of_the_same_images_and_say_why():
    records = (Record("a", "x/a", (0,), difficult=(2,)), Record("b", "x/b", (1,)), Record("c", "x/c", (), (0,)))
    before = Manifest(("cat", "dog", "owl"), records, "train", "made up").select([2, 0])
    after = before.relabel([(1, 2), ()], [(), (0, 2)], "shuffled")
    assert list(after.records) == [Record("c", "x/c", (1, 2)), Record("a", "x/a", (), (0, 2), difficult=(2,))]
    assert list(after.label_lists()) == [([1, 2], []), ([], [0, 2])]
    assert list(before.label_lists()) == [([], [0]), ([0], [])]
    assert (after.protocol, before.protocol) == ("made up; shuffled", "made up")
    assert Manifest(("cat",), (), "train").noted("nothing there").protocol == "nothing there"


def test_class_names_must_differ():
    with pytest.raises(InputError, match="twice: cat"):
        Manifest(("cat", "dog", "cat"), (), "train")


@settings(deadline=None)
@given(st.integers(2, 120), st.floats(0.01, 0.99), st.integers(0, 5))
def test_carving_parts_the_images(num, fraction, seed):
    whole = manifest(numbered(num))
    if not 0 < round(fraction * num) < num:
        with pytest.raises(InputError, match="data.val_fraction: "):
            carve_validation(whole, fraction, seed)
        return

    train, val = carve_validation(whole, fraction, seed)

    train_keys, val_keys = [r.key for r in train.records], [r.key for r in val.records]
    assert len(val_keys) == round(fraction * num)
    assert sorted(train_keys + val_keys) == numbered(num)
    assert train_keys == sorted(train_keys)  # the manifest's order is the sorted one
    assert val_keys == sorted(val_keys)
    check_disjoint(train, val)


def test_carving_depends_on_seed_and_key_alone():
    def carved(keys, seed):
        return {record.key for record in carve_validation(manifest(keys), 0.2, seed)[1].records}

    keys = numbered(500)
    assert carved(keys, 0) == carved(keys, 0) == carved(keys[::-1], 0)
    # Another seed draws anew: two draws of 100 of 500 share 20 on average, with a standard deviation of 3.6.
    assert 5 < len(carved(keys, 0) & carved(keys, 1)) < 35
    # One more image moves at most a few others across the border.
    assert len(carved(keys, 0) & carved([*keys, "new.jpg"], 0)) >= 98


def test_carving_says_so_in_the_protocol_and_the_split():
    train, val = carve_validation(manifest(numbered(10)), 0.3, seed=7)

    assert (train.split, val.split) == ("train", "train-val")
    assert train.protocol == val.protocol == "made up; 3 of 10 images carved out for validation (seed 7)"


@pytest.mark.parametrize(("num", "fraction"), [(10, 0.0), (10, 0.04), (10, 0.96), (10, 1.0), (1, 0.5), (10, -0.2)])
def test_carving_refuses_an_empty_part(num, fraction):
    with pytest.raises(InputError, match=f"data.val_fraction: {fraction} of the {num} images of split 'train'"):
        carve_validation(manifest(numbered(num)), fraction, 0)


def test_shared_images_are_refused_by_key_and_by_path():
    train = manifest(numbered(20), folder="a")
    check_disjoint(train, manifest(["other.jpg"], "test", folder="a"))
    with pytest.raises(InputError, match=r"'train' and 'test' share 2 images: 0003.jpg, 0005.jpg$"):
        check_disjoint(train, manifest(["x.jpg", "0003.jpg", "0005.jpg"], "test", folder="b"))
    with pytest.raises(InputError, match=r"share 7 images: 0000.jpg, .*, 0004.jpg and 2 others$"):
        check_disjoint(train, manifest(numbered(7), "test", folder="b"))
    same_file = Manifest(train.classes, (Record("by another name", "b/../a/0003.jpg", ()),), "test")
    with pytest.raises(InputError, match="share 1 images: by another name"):
        check_disjoint(train, same_file)


def test_images_are_shared_through_links_to_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "a" / "link.jpg").symlink_to("0001.jpg")
    train = manifest(["0001.jpg"], folder=str(tmp_path / "a"))
    classes = train.classes

    check_disjoint(train, Manifest(classes, (Record("link", str(tmp_path / "b" / "link.jpg"), ()),), "test"))
    with pytest.raises(InputError, match="share 1 images: other"):
        check_disjoint(train, Manifest(classes, (Record("other", str(tmp_path / "b" / "0001.jpg"), ()),), "test"))


def test_true_paths_need_no_file_system():
    assert true_paths(["/x.jpg", "/nowhere/../y/./x.jpg", "/\0/x.jpg", "/\ud800/x.jpg"]) == [
        "/x.jpg", "/y/x.jpg", "/\0/x.jpg", "/\ud800/x.jpg"
    ]  # fmt: skip
    assert true_paths(["x.jpg"]) == [f"{os.getcwd()}/x.jpg"]


def test_class_lists_must_agree():
    train = manifest(["a"])
    check_same_classes(train, manifest(["b"], "test"))
    with pytest.raises(InputError, match="'train' .3 classes. and 'test' .3 classes.*class 1 is 'dog'.*and 'owl' in"):
        check_same_classes(train, manifest(["b"], "test", classes=("cat", "owl", "dog")))
    with pytest.raises(InputError, match="class 2 is 'owl' in the first and missing in the second"):
        check_same_classes(train, manifest(["b"], "test", classes=("cat", "dog")))


def test_root_must_be_a_folder(tmp_path):
    assert check_root(DataConfig("coco", root=str(tmp_path))) == str(tmp_path)
    with pytest.raises(InputError, match="data.root is not set"):
        check_root(DataConfig("coco"))
    with pytest.raises(InputError, match=f"data.root={tmp_path}/none is not a folder; make one"):
        check_root(DataConfig("coco", root=f"{tmp_path}/none"), hint="; make one")


def test_missing_files_are_counted_and_the_first_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "sub/b.jpg"):
        (tmp_path / name).touch()
    records = [Record(name, str(tmp_path / name), ()) for name in ("a.jpg", "sub/b.jpg")]
    check_files(DataConfig("csv"), Records(records), "labels.csv")
    absent = [Record(name, str(tmp_path / name), ()) for name in ("sub/a.jpg", "b.jpg", "none/a.jpg")]
    with pytest.raises(
        InputError, match=f"labels.csv: 3 of its 5 image files are missing, the first is {tmp_path}/sub/a"
    ):
        check_files(DataConfig("csv"), Records([*records, *absent]), "labels.csv")
    check_files(DataConfig("csv", check_files=False), Records([*records, *absent]), "labels.csv")
