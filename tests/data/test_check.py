"""check.py and tools/prepare_data.py on small folders whose faults are planted, so that every number is known."""

import csv
import json
import os
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageColor

from mlvision.commands.prepare_data import main
from mlvision.data import CocoConfig, CsvConfig
from mlvision.data import check as check_module
from mlvision.data.check import DataCheck, SplitCheck, check_data, contact_sheet, format_check, write_check
from mlvision.data.manifest import Manifest
from mlvision.data.records import Boxes, Record
from mlvision.errors import InputError
from mlvision.files import spreadsheet_text

ROWS = """image,part,cat,dog,owl
a.png,train,1,1,0
b.png,train,1,0,-1
c.png,train,0,,0
d.png,train,1,0,0
e.png,test,0,1,0
f.png,test,1,1,0
g.png,test,1,0,0
"""


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 14, 3), dtype=np.uint8))


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "labels.csv").write_text(ROWS)
    for seed, name in enumerate("abcdefg"):
        picture(seed).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def faulty(root):
    """d repeats b, f repeats a across the splits, c is no image, g is cut short."""
    (root / "d.png").write_bytes((root / "b.png").read_bytes())
    (root / "f.png").write_bytes((root / "a.png").read_bytes())
    (root / "c.png").write_text("no image")
    (root / "g.png").write_bytes((root / "g.png").read_bytes()[:-60])
    return root


def config(root) -> CsvConfig:
    return CsvConfig(root=str(root), split_column="part")


def arguments(root, out) -> list[str]:
    return ["check", "data.name=csv", f"data.root={root}", "data.split_column=part", f"out={out}"]


def test_counts_of_a_sound_folder(root):
    check = check_data(config(root))

    train, test = (check.splits[name].summary() for name in ("train", "test"))
    assert train["classes"] == {"present": [3, 1, 0], "unknown": [0, 1, 1], "difficult": [0, 0, 0]}
    assert (train["images"], train["labels"], train["unknown"], train["boxes"]) == (4, 4, 2, 0)
    assert train["labels_per_image"] == {"mean": 1.0, "min": 0, "max": 2, "images": {0: 1, 1: 2, 2: 1}}
    assert test["classes"]["present"] == [2, 2, 0]
    assert check.problems() == []
    assert check.overlaps == []
    printed = format_check(check)
    assert "problems found: 0" in printed
    assert "note: test shows 1 of the classes in no image: owl" in printed


@pytest.mark.parametrize("num_workers", [0, 3])
def test_planted_faults_are_found(faulty, num_workers):
    check = check_data(config(faulty), num_workers)

    train, test = check.splits["train"], check.splits["test"]
    assert [key for key, _ in train.unreadable] == ["c.png"]
    assert [key for key, _ in test.unreadable] == ["g.png"]
    assert train.duplicates == [["b.png", "d.png"]]
    assert test.duplicates == []
    (overlap,) = check.overlaps
    assert (overlap.splits, overlap.keys, overlap.contents) == (("train", "test"), [], [("a.png", "f.png")])
    assert len(check.problems()) == 4
    assert "train and test: the same file: a.png, f.png" in check.problems()


def test_boxes_and_shared_keys_are_counted_in_coco_files(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "images" / f"{i}.png")
    for split, shown in (("train", (0, 1)), ("test", (1, 2))):
        images = [{"id": i, "file_name": f"{i}.png", "width": 28, "height": 18} for i in shown]
        boxes = [
            {"id": 10 * i + k, "image_id": i, "category_id": 5, "bbox": [2, 3, 9, 9], "iscrowd": k}
            for i in shown
            for k in (0, 1)
        ]
        document = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "cat"}]}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))

    check = check_data(CocoConfig(root=str(tmp_path), images="images"))

    summary = check.splits["train"].summary()
    assert (summary["boxes"], summary["crowd_boxes"], summary["labels"]) == (4, 2, 2)
    assert check.overlaps[0].keys == ["images/1.png"]
    assert check.problems() == ["train and test: both hold images/1.png"]


def test_labels_alone_are_counted_where_the_images_are_not(root, tmp_path, capsys):
    expected = check_data(config(root)).splits["train"].summary()
    for path in root.glob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match="4 of its 4 image files are missing"):
        main(arguments(root, tmp_path / "report"))

    assert main([*arguments(root, tmp_path / "report"), "labels_only=true"]) == 0

    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["check.csv", "check.json"]
    saved = json.loads((tmp_path / "report" / "check.json").read_text())
    assert saved["labels_only"] is True
    assert saved["splits"]["train"]["classes"] == expected["classes"]
    assert saved["splits"]["train"]["hash"] == expected["hash"]
    assert saved["splits"]["train"]["unreadable"] == []
    assert "note: no image was looked for or opened" in capsys.readouterr().out


def test_training_may_not_be_judged_on_itself(root):
    with pytest.raises(InputError, match="data.train=all is also named as val or test"):
        check_data(CsvConfig(root=str(root), ignore_columns=["part"], train="all", test="all"))
    with pytest.raises(InputError, match="nothing to check"):
        check_data(CsvConfig(root=str(root), train="", test=""))


def test_files_hold_the_same_numbers(faulty, tmp_path):
    check = check_data(config(faulty))
    write_check(check, tmp_path / "out", samples=3, seed=0)

    saved = json.loads((tmp_path / "out" / "check.json").read_text())
    assert saved["classes"] == ["cat", "dog", "owl"]
    assert saved["problems"] == check.problems()
    assert saved["splits"]["train"]["duplicates"] == [["b.png", "d.png"]]
    assert saved["splits"]["test"]["unreadable"][0]["key"] == "g.png"
    assert saved["overlaps"] == [{"splits": ["train", "test"], "keys": [], "contents": [["a.png", "f.png"]]}]
    with open(tmp_path / "out" / "check.csv", newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert [rows[name]["train_present"] for name in ("cat", "dog", "owl")] == ["3", "1", "0"]
    assert [rows[name]["train_unknown"] for name in ("cat", "dog", "owl")] == ["0", "1", "1"]
    assert [rows[name]["test_present"] for name in ("cat", "dog", "owl")] == ["2", "2", "0"]


def test_contact_sheet_shows_boxes_where_they_are(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.new("RGB", (200, 100), (97, 97, 97)).save(tmp_path / "images" / "0.png")
    document = {
        "images": [{"id": 1, "file_name": "0.png", "width": 100, "height": 50}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [50, 10, 40, 30]}],
        "categories": [{"id": 5, "name": "cat"}],
    }
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(document))
    check = check_data(CocoConfig(root=str(tmp_path), images="images", test=""))

    sheet = np.asarray(contact_sheet(check, samples=1, seed=0)).astype(int)

    # The picture is the grey of the sheet, its box the only saturated colour in it: x 0.5..0.9, y 0.2..0.8.
    grey = (sheet == 97).all(axis=2)
    rows, columns = np.flatnonzero(grey.sum(axis=1) > 50), np.flatnonzero(grey.sum(axis=0) > 50)
    inside = sheet[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    rows, columns = np.nonzero(inside.max(axis=2) - inside.min(axis=2) > 60)
    height, width = inside.shape[:2]
    assert width == 2 * height
    np.testing.assert_allclose(np.array([columns.min(), columns.max() + 1]) / width, [0.5, 0.9], atol=0.01)
    np.testing.assert_allclose(np.array([rows.min(), rows.max() + 1]) / height, [0.2, 0.8], atol=0.02)


def test_contact_sheet_tints_masks_where_they_are(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.new("RGB", (200, 100), (97, 97, 97)).save(tmp_path / "images" / "0.png")
    # A lower left triangle as a polygon, and columns 60 to 69 of rows 0 to 24 as runs.
    runs = [60 * 50, *([25, 25] * 10)]
    runs[-1] += 30 * 50
    objects = [
        (5, [0, 0, 50, 50], [[0, 0, 50, 50, 0, 50]]),
        (6, [60, 0, 10, 25], {"size": [50, 100], "counts": runs}),
        (6, [80, 10, 10, 30], [[0, 0, 9000, 9000, 0, 9000]]),
    ]
    document = {
        "images": [{"id": 1, "file_name": "0.png", "width": 100, "height": 50}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": label, "bbox": box, "segmentation": shape}
            for i, (label, box, shape) in enumerate(objects)
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}],
    }
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(document))
    check = check_data(CocoConfig(root=str(tmp_path), images="images", test=""))

    sheet = np.asarray(contact_sheet(check, samples=1, seed=0)).astype(int)

    tile = sheet[16 + 30 + 16 :, 16 : 16 + 240][:120]  # the first tile, under the title: 240 x 120 pixels
    tinted = (tile != 97).any(axis=2)
    inside = tile[80, 25]  # in the triangle, far from its box's border
    cat = np.array(ImageColor.getrgb(check_module._colour(0)))
    np.testing.assert_allclose(inside, (cat + 97) / 2, atol=1)
    rows, columns = np.mgrid[20:114, 20:114]  # below the name in the box's corner
    off_the_edge = abs(rows - columns) > 2
    np.testing.assert_array_equal(tinted[20:114, 20:114][off_the_edge], (rows > columns)[off_the_edge])
    dog = np.array(ImageColor.getrgb(check_module._colour(1)))
    np.testing.assert_allclose(tile[20:54, 150:162].mean(axis=(0, 1)), (dog + 97) / 2, atol=1)
    # The third has a box and no mask that could be drawn: only its border is coloured.
    assert tinted[40:90, 199:209].sum() == 0


def test_contact_sheet_depends_on_the_seed_alone(root):
    check = check_data(config(root))
    first, again, other = (np.asarray(contact_sheet(check, 2, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or (first != other).any()


def test_names_of_any_text_are_drawn_and_written(tmp_path):
    """Names that Pillow, a font or a table could stumble over; the manifest itself refuses longer ones and line breaks."""
    key = os.fsdecode(b"caf\xe9.png")
    picture(0).save(tmp_path / key)
    names = ("w" * 500, "\u732b", "\U0001f98a", "a  b", "=1+1", "$x^2$", "\u202eturned")
    boxes = Boxes(
        np.tile(np.array([[0, 0, 1, 1]], np.float32), (len(names), 1)),
        np.arange(len(names)),
        np.ones(len(names), bool),
        np.zeros(len(names), bool),
        (None,) * len(names),
    )
    record = Record(key, str(tmp_path / key), (0, 1, 2), unknown=(3, 4, 5, 6), boxes=boxes)
    split = SplitCheck(Manifest(names, (record,), "two\nlines"), ("0",), ())
    write_check(DataCheck({"two\nlines": split}, []), tmp_path / "out", samples=1, seed=0)
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size[0] > 1000
    with open(tmp_path / "out" / "check.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row["class"] for row in csv.DictReader(file)] == [spreadsheet_text(name) for name in names]
    assert json.loads((tmp_path / "out" / "check.json").read_text())["classes"] == list(names)


def test_command_exits_with_0_1_or_2(root, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(arguments(root, out)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["check.csv", "check.json", "contact_sheet.png"]
    assert "problems found: 0" in capsys.readouterr().out

    (root / "e.png").write_text("no image")
    assert main(arguments(root, out)) == 1
    assert "e.png: cannot be decoded: not an image file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.root=nowhere"], "data.root=nowhere is not a folder"),
        (["data.separater=,"], "data.separater: no such option; did you mean data.separator"),
        (["data.test=dev"], "split 'dev' does not exist; splits: test, train"),
        (["samples=0"], "samples: expected 1 to 1000, got 0"),
    ],
)
def test_bad_input_writes_nothing(root, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        main([*arguments(root, tmp_path / "report"), *change])
    assert not (tmp_path / "report").exists()


def test_a_command_must_be_named(capsys):
    for argv in ([], ["chek"]):
        with pytest.raises(InputError, match="expected a command .check, scenes."):
            main(argv)
    for argv, word in ((["--help"], "check"), (["check", "--help"], "data.split_rule")):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 0
        assert word in capsys.readouterr().out


def test_scenes_command_writes_what_the_coco_reader_reads(tmp_path):
    out = tmp_path / "scenes"
    options = ["train_images=6", "test_images=3", "image_size=32", "num_workers=0"]
    assert main(["scenes", f"out={out}", *options]) == 0

    check = check_data(CocoConfig(root=str(out), images="images", protocol="all"))

    assert [len(split.manifest) for split in check.splits.values()] == [6, 3]
    assert check.problems() == []
    with pytest.raises(InputError, match="out is not set"):
        main(["scenes", *options])


@pytest.mark.parametrize(("there", "given"), [(";", ","), (",", ";"), ("|", ";"), (" ", ";"), ("_", ";")])
def test_labels_that_were_not_taken_apart_are_a_problem(tmp_path, there, given):
    """1 to 3 of 8 labels per image, and a separator that never stands between them: 84 of 92 classes are combinations."""
    tags = [f"tag{i}" for i in range(8)]
    rows = [there.join(names) for n in (1, 2, 3) for names in combinations(tags, n)]
    text = "image,tags,part\n" + "".join(
        f'{i}.jpg,"{row}",{"test" if i % 4 else "train"}\n' for i, row in enumerate(rows)
    )
    (tmp_path / "labels.csv").write_text(text)
    options = {"root": str(tmp_path), "label_column": "tags", "split_column": "part", "val": "", "test": "test"}

    wrong = check_data(CsvConfig(separator=given, **options), labels_only=True)
    (problem,) = wrong.problems()
    assert f"84 of 92 class names hold {there!r} and are made of 8 parts, such as 'tag0{there}tag1'" in problem
    assert "an unsplit list of labels? data.separator" in problem
    assert check_data(CsvConfig(separator=there, **options), labels_only=True).problems() == []


def test_names_with_commas_are_no_problem(tmp_path):
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus", "tiger shark, Galeocerdo cuvieri", "hen"]
    rows = "".join(f'{i}.jpg,"{name}",{part}\n' for part in ("train", "test") for i, name in enumerate(names))
    rows = "".join(f"{part}/{row}" for row, part in zip(rows.splitlines(True), ["a"] * 4 + ["b"] * 4, strict=True))
    (tmp_path / "labels.csv").write_text("image,tags,part\n" + rows)
    config = CsvConfig(root=str(tmp_path), label_column="tags", split_column="part", val="")
    assert check_data(config, labels_only=True).problems() == []
