"""imagenet.py on class folders as the ILSVRC archives unpack, and ReaL lists as their README describes them."""

import json
import os

import pytest

from mlvision.data import build_manifest
from mlvision.data.manifest import check_same_classes
from mlvision.errors import InputError

WNIDS = ("n01440764", "n01443537", "n02979186")


@pytest.fixture
def root(tmp_path):
    for number, wnid in enumerate(reversed(WNIDS)):
        folder = tmp_path / "train" / wnid
        folder.mkdir(parents=True)
        for i in range(number + 1):
            (folder / f"{wnid}_{7 - i}.JPEG").touch()
        (folder / "readme.txt").touch()
    (tmp_path / "val").mkdir()
    for number in range(1, 6):
        (tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").touch()
    (tmp_path / "real.json").write_text(json.dumps([[], [2, 0], [1], [], [2]]))
    return tmp_path


def read(root, split="train", **options):
    return build_manifest("imagenet", root=str(root), split=split, **options)


def sort_into_classes(root, of_number):
    for number, wnid in of_number.items():
        (root / "val" / wnid).mkdir(exist_ok=True)
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        (root / "val" / name).rename(root / "val" / wnid / name)


def test_class_folders_by_hand(root):
    manifest = read(root)

    assert manifest.classes == WNIDS
    # n02979186 was made first, with one image; n01440764 last, with three.
    assert [(r.key, r.labels) for r in manifest.records] == [
        ("train/n01440764/n01440764_5.JPEG", (0,)),
        ("train/n01440764/n01440764_6.JPEG", (0,)),
        ("train/n01440764/n01440764_7.JPEG", (0,)),
        ("train/n01443537/n01443537_6.JPEG", (1,)),
        ("train/n01443537/n01443537_7.JPEG", (1,)),
        ("train/n02979186/n02979186_7.JPEG", (2,)),
    ]
    assert manifest.records[0].path == str(root / "train" / "n01440764" / "n01440764_5.JPEG")
    assert manifest.protocol == (
        "train, 6 images of 3 classes, one label an image, that of its folder; "
        "left out: 3 files of other kinds (n01440764/readme.txt)"
    )


def test_hidden_folders_are_no_classes_and_links_are_followed_once(root):
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / ".ipynb_checkpoints" / "copy.jpg").touch()
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "a.jfif").touch()
    (root / "train" / "n03000000").symlink_to(root / "elsewhere")
    (root / "train" / WNIDS[2] / "round").symlink_to(root / "train")
    (root / "train" / WNIDS[2] / "deeper").mkdir()
    (root / "train" / WNIDS[2] / "deeper" / "b.png").touch()
    (root / "train" / WNIDS[2] / "._b.png").touch()

    manifest = read(root)

    assert manifest.classes == (*WNIDS, "n03000000")
    assert [(r.key, r.labels) for r in manifest.records[7:]] == [("train/n03000000/a.jfif", (3,))]
    assert [r.key for r in manifest.records if r.labels == (2,)] == [
        f"train/{WNIDS[2]}/deeper/b.png",
        f"train/{WNIDS[2]}/{WNIDS[2]}_7.JPEG",
    ]
    assert "2 hidden (.ipynb_checkpoints), 1 links to a folder that is read already" in manifest.protocol


def test_names_that_are_not_utf_8_stay_readable(root):
    folder = os.fsencode(root / "train") + b"/caf\xe9"
    os.mkdir(folder)
    open(folder + b"/\xff.jpg", "wb").close()

    manifest = read(root)

    assert manifest.classes[0] == "caf\\udce9"
    assert manifest.records[0].key == "train/caf\\udce9/\\udcff.jpg"
    assert os.path.isfile(manifest.records[0].path)


def test_real_lists_are_found_by_the_number_of_the_image(root):
    manifest = read(root, "val", real="real.json")

    assert [(r.key[-8:-5], r.labels) for r in manifest.records] == [("002", (0, 2)), ("003", (1,)), ("005", (2,))]
    assert "2 images with an empty list left out" in manifest.protocol
    check_same_classes(read(root), manifest)
    # In class folders, the order is that of the paths and the lists stay those of the numbers.
    sort_into_classes(root, {1: WNIDS[2], 2: WNIDS[2], 3: WNIDS[0], 4: WNIDS[1], 5: WNIDS[0]})
    sorted_in = read(root, "val", real="real.json")
    assert [(r.key[-8:-5], r.labels) for r in sorted_in.records] == [("003", (1,)), ("005", (2,)), ("002", (0, 2))]
    # Without ReaL, the folder's label, and every image.
    assert [r.labels for r in read(root, "val").records] == [(0,), (0,), (1,), (2,), (2,)]
    assert read(root, "train", real="real.json").hash == read(root).hash


def test_class_names_come_from_a_file(root):
    (root / "names.json").write_text('["tench", "goldfish", "player"]')
    (root / "names.txt").write_text("tench\ngoldfish\nplayer\n")
    for name in ("names.json", "names.txt"):
        assert read(root, classes=name).classes == ("tench", "goldfish", "player")
    assert read(root, classes="names.txt").hash == read(root).hash
    (root / "names.txt").write_text("tench\ngoldfish\n")
    with pytest.raises(InputError, match="names.txt: names 2 classes, .*train has 3 class folders"):
        read(root, classes="names.txt")
    (root / "names.json").write_text('{"0": "tench"}')
    with pytest.raises(InputError, match="names.json: expected a list of class names"):
        read(root, classes="names.json")
    (root / "names.json").write_text('["crane", "goldfish", "crane"]')
    with pytest.raises(InputError, match="these occur twice: crane"):
        read(root, classes="names.json")


def test_real_labels_are_read_where_no_image_is(root, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "real.json").write_text((root / "real.json").read_text())
    (tmp_path / "labels" / "names.txt").write_text("tench\ngoldfish\nplayer\n")
    options = {"real": "real.json", "classes": "names.txt", "check_files": False}

    manifest = read(tmp_path / "labels", "val", **options)

    assert manifest.hash == read(root, "val", real="real.json").hash
    with pytest.raises(InputError, match="labels/train: no class folders there"):
        read(tmp_path / "labels", "val", **{**options, "check_files": True})
    with pytest.raises(InputError, match="labels/train: no class folders there"):
        read(tmp_path / "labels", "val", **{**options, "classes": ""})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"1": [0]}', "real.json: expected a list with a list of class numbers"),
        ("[[0], 1]", "real.json: entry 1, counted from 0, is 1, expected classes 0 to 2"),
        ("[[0], [3]]", "entry 1, counted from 0, is .3., expected classes 0 to 2"),
        ("[[0], [true]]", "entry 1, counted from 0, is .True."),
        ("[[0], [1]]", "val/ILSVRC2012_val_00000003.JPEG: .*real.json has 2 lists, none for number 3"),
        ("[[0], [1]", "real.json, line 1, column 10: "),
    ],
)
def test_faulty_real_lists_are_refused(root, document, message):
    (root / "real.json").write_text(document)
    with pytest.raises(InputError, match=message):
        read(root, "val", real="real.json")


def test_images_and_folders_out_of_place_are_refused(root):
    with pytest.raises(InputError, match="val/ILSVRC2012_val_0000000..JPEG: an image outside the class folders"):
        read(root, "val")
    (root / "val" / "photo.jpg").touch()
    with pytest.raises(InputError, match="val/photo.jpg: expected a name such as ILSVRC2012_val_00000001.JPEG"):
        read(root, "val", real="real.json")
    (root / "val" / "photo.jpg").unlink()
    (root / "val" / "n00000000").mkdir()
    with pytest.raises(InputError, match="val/n00000000: a folder of no class of the training split .3 classes"):
        read(root, "val", real="real.json")
    with pytest.raises(InputError, match="test: no such folder"):
        read(root, "test")
    (root / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no image there"):
        read(root, "empty")
    with pytest.raises(InputError, match="training: no class folders there; .*data.train=training"):
        read(root, train="training")
