"""csv_table.py on small tables; the column layout is that of UC Merced multi-label and of ML-Decoder's data.csv."""

import csv
import hashlib
import io
import json

import numpy as np
import pytest

from mlvision.data import build_manifest
from mlvision.data.check import CheckOptions
from mlvision.data.edits import KnownLabelsConfig
from mlvision.data.readers.csv_table import file_number, hash_percent
from mlvision.errors import InputError
from mlvision.options import parse_options
from mlvision.space import LabelSpace

MULTI_HOT = """image,scene,cat,dog,owl
beach01.jpg,beach,1,0,0
beach07.jpg,beach,0,-1,1
forest02.jpg,forest,,1,0
forest11.jpg,forest,0,0,0
"""
LISTED = """image,tags,part
a.jpg,dog;cat,train
b.jpg,,train
c.jpg, owl ; dog;,test
"""


def table(root, text, encoding="utf-8"):
    """Writes labels.csv and an empty file for the first field of each row: the reader looks only at names."""
    (root / "labels.csv").write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    if isinstance(text, str):
        for line in text.splitlines()[1:]:
            name = line.split(",")[0].strip('"')
            if name:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).touch()
    return root


def read(root, split="all", **options):
    return build_manifest("csv", root=str(root), split=split, **options)


def test_multi_hot_columns_by_hand(tmp_path):
    manifest = read(table(tmp_path, MULTI_HOT), ignore_columns=["scene"])

    assert manifest.classes == ("cat", "dog", "owl")
    assert [r.key for r in manifest.records] == ["beach01.jpg", "beach07.jpg", "forest02.jpg", "forest11.jpg"]
    assert manifest.records[1].path == str(tmp_path / "beach07.jpg")
    nan = np.nan
    np.testing.assert_array_equal(manifest.targets, [[1, 0, 0], [0, nan, 1], [nan, 1, 0], [0, 0, 0]])
    assert manifest.protocol == "labels.csv, 4 of 4 rows"
    assert manifest.records[0].boxes is None
    assert manifest.records[0].size is None


def test_label_column_by_hand(tmp_path):
    table(tmp_path, LISTED)

    train, test = (read(tmp_path, s, label_column="tags", split_column="part") for s in ("train", "test"))

    # The class list is that of all rows: no train row shows an owl.
    assert train.classes == test.classes == ("cat", "dog", "owl")
    assert train.targets.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert test.targets.tolist() == [[0, 1, 1]]
    assert train.protocol == "labels.csv, column part, 2 of 3 rows"


def test_given_classes_choose_the_order(tmp_path):
    table(tmp_path, MULTI_HOT)
    manifest = read(tmp_path, ignore_columns=["scene"], classes=["owl", "dog", "cat"])
    assert manifest.classes == ("owl", "dog", "cat")
    assert manifest.records[0].labels == (2,)

    table(tmp_path, LISTED.replace(";", "|"))
    options = {"label_column": "tags", "split_column": "part", "separator": "|"}
    manifest = read(tmp_path, "test", classes=["owl", "emu", "dog", "cat"], **options)
    assert manifest.targets.tolist() == [[1, 0, 1, 0]]
    with pytest.raises(InputError, match="labels.csv, line 2: label 'cat' is not in the class list: owl, dog"):
        read(tmp_path, "test", classes=["owl", "dog"], **options)


def test_file_number_splits_and_leaves_the_rest_out(tmp_path):
    table(tmp_path, MULTI_HOT)
    splits = {"train": "0-2", "test": "05-09"}

    def keys(split):
        manifest = read(tmp_path, split, ignore_columns=["scene"], split_rule="file_number", splits=splits)
        return [r.key for r in manifest.records], manifest.protocol

    rule = "labels.csv, split by file_number (train 0-2, test 05-09)"
    assert keys("train") == (["beach01.jpg", "forest02.jpg"], f"{rule}, 2 of 4 rows (1 rows belong to no split)")
    assert keys("test") == (["beach07.jpg"], f"{rule}, 1 of 4 rows (1 rows belong to no split)")


@pytest.mark.parametrize(
    ("key", "number"), [("images/beach14.jpg", 14), ("3/a_007_x2.v1.png", 1), ("12/no.jpg", None), ("0009.jpg", 9)]
)
def test_file_number_is_the_last_of_the_stem(key, number):
    assert file_number(key) == number


def test_hash_splits_by_the_key_alone(tmp_path):
    keys = [f"images/{i}.jpg" for i in range(200)]
    table(tmp_path, "image,cat\n" + "".join(f"{key.removeprefix('images/')},1\n" for key in keys))
    (tmp_path / "images").mkdir()
    for key in keys:
        (tmp_path / key).touch()
    splits = {"train": "0-79", "test": "80-99"}

    test = read(tmp_path, "test", images="images", split_rule="hash", splits=splits)

    expected = [key for key in keys if int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100 >= 80]
    assert [r.key for r in test.records] == expected
    assert 20 < len(expected) < 60
    assert hash_percent(keys[0]) == int(hashlib.sha256(keys[0].encode()).hexdigest(), 16) % 100


def test_byte_order_mark_quotes_windows_lines_and_blank_lines(tmp_path):
    (tmp_path / "a, b.jpg").touch()
    (tmp_path / "c.jpg").touch()
    text = 'image,"cat, big","dog ""x"""\r\n\r\n"a, b.jpg","1",0\r\nc.jpg, 0 ,1\r\n'
    table(tmp_path, text.encode("utf-8-sig"))

    manifest = read(tmp_path)

    assert manifest.classes == ("cat, big", 'dog "x"')
    assert manifest.targets.tolist() == [[1, 0], [0, 1]]
    table(tmp_path, (text + "c.jpg,0,0\r\n").encode())
    with pytest.raises(InputError, match="line 5: column 'image' repeats 'c.jpg' of line 4"):
        read(tmp_path)


RULE = {"split_rule": "file_number", "ignore_columns": ["scene"]}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (MULTI_HOT, {}, "line 2: column 'scene' holds 'beach', expected 1, 0, or -1 or empty .unknown."),
        (MULTI_HOT.replace("0,0,0", "0,2,0"), {"ignore_columns": ["scene"]}, "line 5: column 'dog' holds '2'"),
        (MULTI_HOT.replace("0,0,0", "0,0.5,0"), {"ignore_columns": ["scene"]}, "line 5: column 'dog' holds '0.5'"),
        (MULTI_HOT.replace("0,0,0", "0,0"), {}, "line 5: 4 fields, the header has 5"),
        (MULTI_HOT.replace("forest11.jpg", ""), {"ignore_columns": ["scene"]}, "line 5: column 'image' is empty"),
        (MULTI_HOT.replace("forest11", "beach07"), {}, "line 5: column 'image' repeats 'beach07.jpg' of line 3"),
        (
            MULTI_HOT.replace("owl", "cat"),
            {},
            "line 1: column names must differ from each other: image, scene, cat, dog, cat",
        ),
        (MULTI_HOT + '"x.jpg,0\n', {}, "line 6: unexpected end of data"),
        ('image,cat\n"a"b.jpg,1\n', {}, "line 2: ',' expected after '\"'"),
        ("", {}, "expected a header and at least one row"),
        ("image,cat\n", {}, "expected a header and at least one row"),
        (MULTI_HOT, {"image_column": "file"}, "no column 'file'; columns: image, scene, cat, dog, owl"),
        (MULTI_HOT, {"ignore_columns": ["scenes"]}, "no column 'scenes'"),
        (MULTI_HOT, {"label_column": "tags"}, "no column 'tags'"),
        (MULTI_HOT, {"ignore_columns": ["scene", "cat", "dog", "owl"]}, "no column is left for a class"),
        (MULTI_HOT, {"classes": ["cat", "dog", "owl"]}, "line 1: column 'scene' is neither in data.classes nor in"),
        (MULTI_HOT, {"ignore_columns": ["scene"], "classes": ["cat", "dog", "owl", "emu"]}, "no column 'emu'"),
        (LISTED, {"label_column": "tags", "separator": ""}, "data.separator is empty"),
        ("image,tags\na.jpg,;\n", {"label_column": "tags"}, "column 'tags' holds no label"),
        (
            LISTED.replace("c.jpg, owl ; dog;,test", "c.jpg,,"),
            {"split_column": "part"},
            "line 4: column 'part' is empty",
        ),
        (LISTED, {"split_column": "part", "split_rule": "hash"}, "exclude each other"),
        (MULTI_HOT, {**RULE, "split_rule": "number"}, "data.split_rule=number: expected one of file_number, hash"),
        (MULTI_HOT, RULE, "data.splits is empty"),
        (MULTI_HOT, {**RULE, "splits": {"all": "0:9"}}, "data.splits.all=0:9: expected a range such as 0-49"),
        (MULTI_HOT, {**RULE, "splits": {"all": "9-0"}}, "data.splits.all=9-0: expected a range"),
        (MULTI_HOT, {**RULE, "splits": {"b": "5-9", "a": "0-5"}}, "data.splits: a .0-5. and b .5-9. overlap"),
        (MULTI_HOT.replace("beach,", "train,"), {}, "line 2: column 'scene' holds 'train', .*data.split_column=scene"),
        (
            MULTI_HOT,
            {"ignore_columns": ["scene"], "cells": {"1": "here"}},
            "data.cells.1='here': expected one of present",
        ),
        (MULTI_HOT, {"delimiter": ",,"}, "data.delimiter=',,': expected one character, or tab"),
        (MULTI_HOT, {"rows": "pair"}, "data.rows=pair: expected one of image, label"),
        (MULTI_HOT, {"rows": "label"}, "data.label_column is not set: data.rows=label needs"),
        (
            LISTED.replace("c.jpg", "./a.jpg"),
            {"label_column": "tags"},
            r"repeats 'a.jpg' of line 2 \('./a.jpg' and 'a.jpg' are one image\); data.rows=label reads",
        ),
        (LISTED.replace("owl", "x" * 10_000), {"label_column": "tags"}, "class 2 has a name of 10,000 characters"),
        ('image,"a\nb"\nx.jpg,1\n', {}, "class 0 is called 'a.nb': expected a name in one line"),
        (MULTI_HOT.replace("beach,", "b" * 100_000 + ","), {}, "line 2: column 'scene' holds 'b*[.]{3}b*', expected 1"),
        (MULTI_HOT.replace("11", ""), {**RULE, "splits": {"all": "0-9"}}, "line 5: 'forest.jpg' holds no number"),
    ],
)
def test_what_cannot_be_read_is_placed(tmp_path, text, options, message):
    table(tmp_path, text)

    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_placed(tmp_path):
    table(tmp_path, b"image,cat\na.jpg,1\nb\xe9.jpg,0\n")

    with pytest.raises(InputError, match=f"{tmp_path}/labels.csv, line 3: not UTF-8 text"):
        read(tmp_path)


def test_splits_that_are_not_there_are_listed(tmp_path):
    table(tmp_path, LISTED)
    with pytest.raises(
        InputError,
        match="split 'train' does not exist; splits: all; column 'part' holds it: set data.split_column=part",
    ):
        read(tmp_path, "train", label_column="tags", ignore_columns=["part"])
    with pytest.raises(InputError, match="split 'val' does not exist; splits: test, train"):
        read(tmp_path, "val", label_column="tags", split_column="part")
    table(tmp_path, MULTI_HOT)
    with pytest.raises(InputError, match="split 'test' is empty; splits: test, train"):
        read(tmp_path, "test", **RULE, splits={"train": "0-49", "test": "60-79"})


def test_missing_file_and_images(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/labels.csv: cannot be read: No such file"):
        read(tmp_path)
    table(tmp_path, MULTI_HOT)
    (tmp_path / "forest02.jpg").unlink()
    with pytest.raises(InputError, match="labels.csv: 1 of its 4 image files are missing, the first is .*forest02.jpg"):
        read(tmp_path, ignore_columns=["scene"])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_recognised_or_given(tmp_path, delimiter):
    # The cells hold further candidates: the header decides.
    text = 'image,tags,part\na.jpg,"dog;cat",train\nb.jpg,"owl;dog",train\n'
    rows = list(csv.reader(io.StringIO(text)))
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    (tmp_path / "labels.csv").write_text(out.getvalue(), encoding="utf-8-sig")
    for name in "ab":
        (tmp_path / f"{name}.jpg").touch()

    given = {",": ",", ";": ";", "\t": "tab", "|": "|"}[delimiter]
    for options in ({}, {"delimiter": given}):
        manifest = read(tmp_path, "train", label_column="tags", split_column="part", **options)
        assert manifest.classes == ("cat", "dog", "owl")
        assert manifest.targets.tolist() == [[1, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize(
    ("cell", "value"),
    [(c, 1) for c in ("1", "1.0", "1.", " 1 ", "True", "TRUE", "yes", "Yes", "1e0", "+1")]
    + [(c, 0) for c in ("0", "0.0", "-0.0", "False", "no", "NO", "0e5")]
    + [(c, np.nan) for c in ("-1", "-1.0", "", " ", "nan", "NaN", "-nan")],
)
def test_cells_as_tables_have_them(tmp_path, cell, value):
    manifest = read(table(tmp_path, f"image,cat,dog\na.jpg,{cell},1\n"))
    np.testing.assert_array_equal(manifest.targets, [[value, 1]])


def test_the_meaning_of_cells_is_an_option(tmp_path):
    # CheXpert: an empty cell is not mentioned, -1 uncertain; others write x, or -1 for absent.
    table(tmp_path, "image,cat,dog,owl\na.jpg,1.0,,-1.0\nb.jpg,x,0.0,\n")

    manifest = read(tmp_path, cells={"empty": "absent", "x": "present"})
    np.testing.assert_array_equal(manifest.targets, [[1, 0, np.nan], [1, 0, 0]])
    manifest = read(tmp_path, cells={"-1": "absent", "X": "unknown"})
    np.testing.assert_array_equal(manifest.targets, [[1, np.nan, 0], [np.nan, 0, np.nan]])


@pytest.mark.parametrize("cell", ["2", "2.0", "02", "+2.", " 2e0 "])
@pytest.mark.parametrize("given", ["2", "2.0", "2e0"])
def test_a_whole_number_is_one_cell_however_it_is_written(tmp_path, cell, given):
    table(tmp_path, f"image,cat,dog\na.jpg,{cell},1\nb.jpg,0,-3.0\n")

    manifest = read(tmp_path, cells={given: "unknown", "-3": "present"})

    np.testing.assert_array_equal(manifest.targets, [[np.nan, 1], [0, 1]])
    for other in ("2.5", "inf", "1e999", "two"):
        table(tmp_path, f"image,cat,dog\na.jpg,{other},1\n")
        with pytest.raises(
            InputError,
            match=r"holds '.*', expected 1, 0, .*; map other values with data.cells, or exclude the column with data.ignore_"
            r"columns=\[cat\]$",
        ):
            read(tmp_path, cells={given: "unknown"})


def test_numbers_are_keys_of_cells_in_yaml_and_on_the_command_line(tmp_path):
    (tmp_path / "check.yaml").write_text("data:\n  name: csv\n  cells: {2: unknown, -1: absent, 3.0: present}\n")
    for arguments in (
        [str(tmp_path / "check.yaml")],
        ["data.name=csv", "data.cells={2: unknown, -1: absent, 3.0: present}"],
        ["data.name=csv", "data.cells.2=unknown", "data.cells.-1=absent", "data.cells={3.0: present}"],
    ):
        data = parse_options(CheckOptions, arguments, prog="check", description="").data
        assert data.cells == {"2": "unknown", "-1": "absent", "3.0": "present"}


def test_a_row_per_image_and_label(tmp_path):
    table(
        tmp_path,
        "image,tag,part\na.jpg,dog,train\nc.jpg,owl,test\na.jpg,cat; big,train\na.jpg,dog,train\nb.jpg,,train\n",
    )
    options = {"label_column": "tag", "rows": "label", "split_column": "part"}

    train, test = (read(tmp_path, split, **options) for split in ("train", "test"))

    assert train.classes == test.classes == ("cat; big", "dog", "owl")
    assert [(r.key, r.labels) for r in train.records] == [("a.jpg", (0, 1)), ("b.jpg", ())]
    assert [(r.key, r.labels) for r in test.records] == [("c.jpg", (2,))]
    assert train.protocol == (
        "labels.csv, column part, 2 of 3 images, 1 labels that stand twice for an image count once"
    )
    table(tmp_path, LISTED.replace("c.jpg", "a.jpg"))
    with pytest.raises(InputError, match="line 4: .* 'a.jpg' of line 2 with another split: test instead of train"):
        read(tmp_path, "train", **(options | {"label_column": "tags"}))


def test_a_label_twice_in_a_cell_is_said(tmp_path):
    table(tmp_path, "image,tags\na.jpg,dog;cat;dog\nb.jpg,cat\n")
    manifest = read(tmp_path, label_column="tags")
    assert manifest.records[0].labels == (0, 1)
    assert manifest.protocol == "labels.csv, 2 of 2 rows, 1 labels that stand twice for an image count once"


def test_names_without_suffix_are_found_by_their_stem(tmp_path):
    table(tmp_path, "image,cat\na.1,1\nsub/b,0\nc.jpg,1\nd,0\n")
    for name in ("a.1", "sub/b", "d"):
        (tmp_path / name).unlink()
    for name in ("a.1.jpg", "sub/b.PNG", "sub/b.txt", "d"):  # d itself is there
        (tmp_path / name).touch()

    manifest = read(tmp_path)

    assert [r.key for r in manifest.records] == ["a.1.jpg", "sub/b.PNG", "c.jpg", "d"]
    assert manifest.records[1].path == str(tmp_path / "sub" / "b.PNG")
    assert [r.key for r in read(tmp_path, check_files=False).records] == ["a.1", "sub/b", "c.jpg", "d"]
    (tmp_path / "sub" / "b.jpeg").touch()
    with pytest.raises(InputError, match="image 'sub/b' has no suffix, and several files fit: sub/b.PNG, sub/b.jpeg"):
        read(tmp_path)
    split = {"split_column": "cat"}
    assert [r.key for r in read(tmp_path, "1", **split, ignore_columns=["cat"], label_column="image").records] == [
        "a.1.jpg",
        "c.jpg",
    ]
    (tmp_path / "a.1.jpg").unlink()
    (tmp_path / "sub" / "b.jpeg").unlink()
    with pytest.raises(InputError, match="1 of its 4 image files are missing, the first is .*/a.1$"):
        read(tmp_path)


def test_an_image_with_and_without_its_suffix_is_one(tmp_path):
    table(tmp_path, "image,tag,part\nim/a,dog,1\nim/b.jpg,owl,1\n./im/a.jpg,cat,1\nim\\a,cat,1\n")
    for name in ("im/a", "./im/a.jpg", "im/b.jpg", "im\\a"):
        (tmp_path / name).unlink(missing_ok=True)
    for name in ("im/a.jpg", "im/b.jpg"):
        (tmp_path / name).touch()
    options = {"label_column": "tag", "rows": "label"}

    manifest = read(tmp_path, **options, ignore_columns=["part"])

    assert [(r.key, r.labels) for r in manifest.records] == [("im/a.jpg", (0, 1)), ("im/b.jpg", (2,))]
    with pytest.raises(
        InputError,
        match=r"line 4: column 'image' repeats 'im/a.jpg' of line 2 \('./im/a.jpg' and 'im/a' are one image\); data.rows",
    ):
        read(tmp_path, label_column="tag")
    (tmp_path / "labels.csv").write_text("image,cat,part\nim/a,1,train\nim/a.jpg,0,test\n")
    with pytest.raises(
        InputError, match=r"line 3: column 'image' repeats 'im/a.jpg' of line 2 \('im/a.jpg' and 'im/a'"
    ):
        read(tmp_path, "train", split_column="part")
    with pytest.raises(InputError, match="line 3: .* with another split: test instead of train"):
        read(tmp_path, "train", split_column="part", label_column="cat", rows="label")


def test_a_split_rule_sees_the_name_as_the_file_has_it(tmp_path):
    keys = [f"{i}" for i in range(40)]
    (tmp_path / "labels.csv").write_text("image,cat\n" + "".join(f"{key},1\n" for key in keys))
    for key in keys:
        (tmp_path / f"{key}.jpg").touch()

    test = read(tmp_path, "test", split_rule="hash", splits={"test": "0-49"})

    assert [r.key for r in test.records] == [f"{key}.jpg" for key in keys if hash_percent(key) < 50]


def test_columns_without_a_name_are_left_out(tmp_path):
    (tmp_path / "labels.csv").write_text(",image,cat\n0,a.jpg,1\n1,b.jpg,0\n")  # an index that pandas wrote
    for name in "ab":
        (tmp_path / f"{name}.jpg").touch()

    manifest = read(tmp_path)

    assert manifest.classes == ("cat",)
    assert manifest.targets.tolist() == [[1], [0]]
    assert manifest.protocol == "labels.csv, 2 of 2 rows, 1 columns without a name left out"


def test_a_file_name_of_two_lines_is_escaped_in_the_key(tmp_path):
    (tmp_path / "labels.csv").write_text('image,cat\n"a\nb.jpg",1\nc\\d.jpg,0\n')
    (tmp_path / "a\nb.jpg").touch()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.jpg").touch()  # written on Windows

    records = read(tmp_path).records

    assert [r.key for r in records] == ["a\\nb.jpg", "c/d.jpg"]
    assert [r.path for r in records] == [f"{tmp_path}/a\nb.jpg", f"{tmp_path}/c/d.jpg"]


BOARD = "image,a white,a black,b white,b black,c\n"


def board(folder, *rows):
    for name in "xyz":
        (folder / f"{name}.jpg").touch()
    (folder / "labels.csv").write_text(BOARD + "".join(f"{row}\n" for row in rows))
    return read(folder, groups=[2, 2, 1])


def test_groups_of_classes_of_which_each_image_shows_one(tmp_path):
    manifest = board(tmp_path, "x.jpg,1,0,0,1,0", "y.jpg,0,1,,0,1", "z.jpg,-1,-1,1,-1,1")
    assert manifest.space == LabelSpace(manifest.classes, exclusive=(2, 2, 1))
    assert manifest.protocol == "labels.csv, 3 of 3 rows, one class of each of 3 groups"
    plain = read(tmp_path)
    assert (plain.groups, plain.hash) == ((), manifest.hash)
    assert plain.class_hash == hashlib.sha256(json.dumps(plain.classes).encode()).hexdigest()  # as before groups
    assert plain.class_hash == read(tmp_path, groups=[1, 1, 1, 1, 1]).class_hash != manifest.class_hash
    assert KnownLabelsConfig(share=0.5).apply(manifest).groups == manifest.select([1]).groups == (2, 2, 1)


@pytest.mark.parametrize(("row", "number"), [("y.jpg,0,1,1,1,0", 2), ("y.jpg,0,1,0,0,1", 0), ("y.jpg,0,1,1,1,", 2)])
def test_an_image_of_none_or_two_of_a_group_is_named(tmp_path, row, number):
    message = rf"labels\.csv: image y\.jpg shows {number} classes of a group of .* exactly one: b white, b black"
    with pytest.raises(InputError, match=message):
        board(tmp_path, "x.jpg,1,0,0,1,0", row)


def test_groups_of_other_classes_are_refused(tmp_path):
    board(tmp_path, "x.jpg,1,0,0,1,0")
    with pytest.raises(InputError, match=r"groups of classes: .* add up to the 5 classes, got \[2, 2\]"):
        read(tmp_path, groups=[2, 2])
