"""Image names that data files give: whatever the format, they stay below `data.root` and are text."""

import json

import numpy as np
import pytest
from layouts import VocObject, write_nuswide, write_voc
from PIL import Image

from mlvision.data import build_manifest
from mlvision.data.images import read_record
from mlvision.errors import InputError


def write_csv(root, *names):
    text = "".join(f"{name},1\n" for name in names)
    (root / "labels.csv").write_text(f"image,a\n{text}", encoding="utf-8", errors="surrogatepass")
    return {"name": "csv", "split": "all"}


def write_coco(root, *names):
    (root / "annotations").mkdir(exist_ok=True)
    document = {
        "images": [{"id": i, "file_name": name, "width": 6, "height": 4} for i, name in enumerate(names)],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 2, 2]} for i, _ in enumerate(names)],
    }
    (root / "annotations" / "instances_train.json").write_text(json.dumps(document))
    return {"name": "coco", "images": ".", "split": "train"}


def write_matrix(root, *names):
    np.save(root / "train.npy", np.ones((len(names), 1)))
    (root / "names.txt").write_text("".join(f"{name}\n" for name in names))
    return {"name": "matrix", "labels": "{split}.npy", "names": "names.txt", "split": "train"}


def write_nus(root, *names):
    write_nuswide(root, ["a"], {name: ("Train", [1]) for name in names}, {"Train": range(len(names))})
    return {"name": "nuswide", "images": ".", "split": "Train", "check_files": False}


def write_vg(root, *names):
    (root / "train_list_500.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "vg_category_500_labels_index.json").write_text(json.dumps({name: [0] for name in names}))
    return {"name": "vg500", "images": ["."], "split": "train", "check_files": False}


@pytest.fixture
def outside(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "secret.jpg")
    (tmp_path / "set").mkdir()
    return tmp_path


@pytest.mark.parametrize("write", [write_csv, write_coco, write_matrix, write_nus, write_vg])
@pytest.mark.parametrize("name", ["../secret.jpg", "deep/../../secret.jpg"])
def test_names_that_leave_the_root_are_refused_unless_asked_for(outside, write, name):
    options = write(outside / "set", name)

    with pytest.raises(
        InputError, match=r"split '\w+': the image .*secret.jpg lies outside data.root=.*/set; data.outs"
    ):
        build_manifest(root=str(outside / "set"), **options)
    manifest = build_manifest(root=str(outside / "set"), outside_root=True, **options)
    assert manifest.records[0].path.endswith("secret.jpg")


@pytest.mark.parametrize("write", [write_csv, write_coco, write_matrix])
def test_absolute_names_are_refused_unless_asked_for(outside, write):
    options = write(outside / "set", str(outside / "secret.jpg"))

    with pytest.raises(InputError, match="lies outside data.root"):
        build_manifest(root=str(outside / "set"), **options)
    assert len(build_manifest(root=str(outside / "set"), outside_root=True, **options)) == 1


def test_voc_lists_too(outside):
    write_voc(outside / "set", {"trainval": {"a": ((6, 4), [VocObject("cat", (1, 1, 3, 3))])}})
    (outside / "set" / "ImageSets" / "Main" / "trainval.txt").write_text("../../secret\n")
    (outside / "secret.xml").write_text((outside / "set" / "Annotations" / "a.xml").read_text())

    with pytest.raises(InputError, match="the image ../secret.jpg lies outside data.root"):
        build_manifest("voc", root=str(outside / "set"), split="trainval")


def test_links_below_the_root_may_lead_out(outside):
    (outside / "set" / "link.jpg").symlink_to(outside / "secret.jpg")
    (outside / "set" / "a..b.jpg").symlink_to(outside / "secret.jpg")
    options = write_csv(outside / "set", "link.jpg")
    with open(outside / "set" / "labels.csv", "a") as file:
        file.write("a..b.jpg,0\n./deep/../link2.jpg,0\n")
    (outside / "set" / "link2.jpg").symlink_to(outside / "secret.jpg")

    assert len(build_manifest(root=str(outside / "set"), **options)) == 3


@pytest.mark.parametrize("write", [write_csv, write_coco, write_matrix, write_nus, write_vg])
@pytest.mark.parametrize(
    ("given", "again"),
    [("a.jpg", "../set/a.jpg"), ("a.jpg", "{root}/a.jpg"), ("../set/a.jpg", "{root}/a.jpg"), ("a.jpg", "linked/a.jpg")],
)
@pytest.mark.parametrize("through", ["set", "link to set"])
def test_one_file_by_two_names_is_refused(outside, write, given, again, through, monkeypatch):
    root = outside / "set"
    (root / "a.jpg").write_bytes((outside / "secret.jpg").read_bytes())
    (root / "linked").symlink_to(root)
    (outside / "link to set").symlink_to(root)
    monkeypatch.chdir(outside)  # `root` may be relative, and a name absolute
    given, again = (name.format(root=outside / through) for name in (given, again))
    options = write(root, given, again) | {"outside_root": True}

    for check_files in (True, False):
        with pytest.raises(
            InputError, match=f"split '\\w+': the images {given} and {again} are one file, .*a.jpg: exp"
        ):
            build_manifest(root=through, **(options | {"check_files": check_files}))


def test_two_files_of_one_key_are_refused(tmp_path):
    for name in ("a\n.jpg", r"a\n.jpg"):
        path = tmp_path / "train" / "cat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    with pytest.raises(InputError, match=r"split 'train': the files .* and .* are both called train/cat/a\\n.jpg in"):
        build_manifest("imagenet", root=str(tmp_path), split="train")


def test_half_of_a_surrogate_pair_is_no_name(outside):
    options = write_coco(outside / "set", "\ud800.jpg")

    with pytest.raises(InputError) as missing:
        build_manifest(root=str(outside / "set"), **options)
    manifest = build_manifest(root=str(outside / "set"), check_files=False, **options)
    with pytest.raises(InputError, match=r"ud800.jpg: not a valid file name") as caught:
        read_record(manifest.records[0])
    for error in (missing, caught):
        str(error.value).encode()


def test_the_limit_of_pixels_reaches_the_manifest(outside):
    Image.new("RGB", (6, 4)).save(outside / "set" / "a.jpg")
    options = write_csv(outside / "set", "a.jpg")

    assert build_manifest(root=str(outside / "set"), max_pixels=23, **options).select([0]).max_pixels == 23
    with pytest.raises(InputError, match="data.max_pixels: expected 1 to 1073741824, got 0"):
        build_manifest(root=str(outside / "set"), max_pixels=0, **options)
