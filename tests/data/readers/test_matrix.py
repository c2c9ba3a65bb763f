"""matrix.py on small files in the layouts of the hashing lists (HashNet) and of SPML's formatted_{split}_*.npy."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from mlvision.data import build_manifest
from mlvision.errors import InputError

# From the published lists of NUS-WIDE and COCO: a path, then one number a class.
ROWS = """images/36051_ab.jpg 0 1 0
images/228373_cd.jpg 1 1 0

"""
LABELS = np.array([[0, 1, 0], [1, 1, 0]])
NAMES = ["images/36051_ab.jpg", "images/228373_cd.jpg"]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    for name in NAMES:
        (tmp_path / name).touch()
    (tmp_path / "test.txt").write_text(ROWS)
    (tmp_path / "classes.txt").write_text("airport\nanimal\nbeach\n")
    return tmp_path


def read(root, split="test", **options):
    return build_manifest("matrix", root=str(root), split=split, **options)


def test_text_rows_by_hand(root):
    manifest = read(root, classes="classes.txt")

    assert manifest.classes == ("airport", "animal", "beach")
    assert [r.key for r in manifest.records] == NAMES
    assert manifest.records[1].path == str(root / "images" / "228373_cd.jpg")
    assert [r.labels for r in manifest.records] == [(1,), (0, 1)]
    np.testing.assert_array_equal(manifest.targets, LABELS)
    digest = hashlib.sha256(ROWS.encode()).hexdigest()[:16]
    assert manifest.protocol == f"test.txt, 2 images x 3 classes, 3 labels (1 present, 0 absent), sha256 {digest}"


def test_columns_without_names_are_numbered(root):
    assert read(root).classes == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize("kind", ["npy", "npz", "txt"])
def test_all_kinds_of_file_say_the_same(root, kind):
    options = {"labels": f"formatted_{{split}}_labels.{kind}", "names": f"formatted_{{split}}_images.{kind}"}
    if kind == "npy":
        np.save(root / "formatted_val_labels.npy", LABELS.astype(np.float32))
        np.save(root / "formatted_val_images.npy", np.array([name.split("/")[1] for name in NAMES]))
    elif kind == "npz":
        arrays = {"targets": LABELS.astype(bool), "files": np.array([n.split("/")[1].encode() for n in NAMES])}
        np.savez(root / "both.npz", **arrays)
        options = {"labels": "both.npz", "names": "both.npz", "labels_array": "targets", "names_array": "files"}
    else:
        (root / "formatted_val_labels.txt").write_text("0,1,0\n1, 1, 0\n")
        (root / "formatted_val_images.txt").write_text("36051_ab.jpg\n228373_cd.jpg\n")

    manifest = read(root, "val", images="images", **options)

    assert manifest.hash == read(root).hash
    np.testing.assert_array_equal(manifest.targets, LABELS)


@pytest.mark.parametrize(
    ("values", "row", "expected"),
    [
        ("binary", "0 1 0", [0, 1, 0]),
        ("partial", "-1 1 0", [np.nan, 1, 0]),
        ("partial", "nan 1 0", [np.nan, 1, 0]),
        ("ternary", "-1 1 0", [0, 1, np.nan]),
        ("positive", "-1 0.2 0", [0, 1, 0]),
    ],
)
def test_numbers_mean_what_their_convention_says(root, values, row, expected):
    (root / "test.txt").write_text(f"{NAMES[0]} {row}\n")
    np.testing.assert_array_equal(read(root, values=values).targets, [expected])


@pytest.mark.parametrize(
    ("values", "row", "message"),
    [
        (
            "binary",
            "0 -1 0",
            "test.txt, row 1, column 2 of the numbers: -1, expected 1 present, 0 absent .data.values=bin",
        ),
        ("binary", "0 nan 0", "column 2 of the numbers: nan"),
        ("ternary", "0 0 2", "column 3 of the numbers: 2, expected 1 present, -1 absent, 0 unknown"),
        ("positive", "0 0 nan", "column 3 of the numbers: nan"),
        ("binary", "0 x 0", "test.txt, line 1: 'x' is not a number"),
        ("signed", "0 1 0", "data.values=signed: expected one of binary, partial, ternary, positive"),
    ],
)
def test_other_numbers_are_refused(root, values, row, message):
    (root / "test.txt").write_text(f"{NAMES[0]} {row}\n")
    with pytest.raises(InputError, match=message):
        read(root, values=values)


def test_backslashes_of_windows_lists_separate_folders(root):
    (root / "test.txt").write_text(ROWS.replace("/", "\\"))
    assert [r.key for r in read(root).records] == NAMES


def test_rows_that_do_not_fit_are_refused(root):
    (root / "names.txt").write_text("images/36051_ab.jpg\n")
    np.save(root / "labels.npy", LABELS)
    with pytest.raises(InputError, match="labels.npy: has 2 rows, .*names.txt names 1 images"):
        read(root, labels="labels.npy", names="names.txt")
    (root / "classes.txt").write_text("airport\nanimal\n")
    with pytest.raises(InputError, match="test.txt: has 3 columns, .*classes.txt names 2 classes"):
        read(root, classes="classes.txt")
    (root / "test.txt").write_text(f"{NAMES[0]} 0 1 0\n{NAMES[1]} 1 1\n")
    with pytest.raises(InputError, match="test.txt, line 2: 3 fields, expected an image name and 3 numbers"):
        read(root)
    (root / "test.txt").write_text(f"{NAMES[0]} 0 1 0\n{NAMES[1]} 1 1 0\n./{NAMES[0]} 1 0 0\n")
    with pytest.raises(InputError, match="test.txt, row 3: repeats the image 'images/36051_ab.jpg' of row 1"):
        read(root)
    (root / "test.txt").write_text(f"{NAMES[0]}\n")
    with pytest.raises(InputError, match="test.txt, line 1: 1 fields, expected an image name and 1 numbers"):
        read(root)


def test_arrays_that_are_no_matrix_are_refused(root):
    (root / "names.txt").write_text("\n".join(NAMES))

    def read_array(array, **options):
        np.save(root / "labels.npy", array, allow_pickle=True)
        return read(root, labels="labels.npy", **{"names": "names.txt", **options})

    with pytest.raises(InputError, match="labels.npy: expected numbers .images, classes., got int64 .2,"):
        read_array(np.array([1, 0]))
    with pytest.raises(
        InputError,
        match="labels.npy: the file is damaged, or was cut short .Array can't be memory-mapped: Python objects",
    ):
        read_array(np.array([[1, None]], dtype=object))
    with pytest.raises(InputError, match="data.names is not set: .*labels.npy holds no image names"):
        read_array(LABELS, names="")
    (root / "labels.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(InputError, match="labels.npy: the file is damaged, or was cut short"):
        read(root, labels="labels.npy", names="names.txt")
    np.save(root / "names.npy", np.array([1, 2]))
    np.save(root / "labels.npy", LABELS)
    with pytest.raises(InputError, match="names.npy: expected a list of texts, got int64"):
        read(root, labels="labels.npy", names="names.npy")
    np.savez(root / "labels.npz", a=LABELS, b=LABELS)
    with pytest.raises(InputError, match="data.labels_array is not set: .*labels.npz holds a, b"):
        read(root, labels="labels.npz", names="names.txt")
    with pytest.raises(InputError, match="data.labels_array=c: .*labels.npz holds a, b"):
        read(root, labels="labels.npz", names="names.txt", labels_array="c")
    (root / "labels.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(InputError, match="labels.npz: the file is damaged, or was cut short"):
        read(root, labels="labels.npz", names="names.txt", labels_array="c")


def test_small_files_of_huge_arrays_are_not_unpacked(root):
    """Zeros that fill 320 MB in a file of 0.3 MB, of other rows and columns than expected; names of a million letters."""
    (root / "names.txt").write_text("\n".join(NAMES))
    (root / "two.txt").write_text("cat\ndog")
    np.savez_compressed(root / "rows.npz", np.broadcast_to(np.zeros(40, dtype=np.float32), (2_000_000, 40)))
    np.savez_compressed(root / "columns.npz", np.broadcast_to(np.float32(0), (len(NAMES), 40_000_000)))
    np.savez_compressed(root / "names.npz", np.zeros(40, dtype="<U1000000"))
    np.save(root / "labels.npy", LABELS)
    tracemalloc.start()
    try:
        for options, message in (
            ({"labels": "rows.npz", "names": "names.txt"}, "rows.npz: has 2,000,000 rows, .*names.txt names"),
            (
                {"labels": "columns.npz", "names": "names.txt", "classes": "two.txt"},
                "has 40000000 columns, .*two.txt names 2",
            ),
            ({"labels": "labels.npy", "names": "names.npz"}, "names.npz: a name of an image has up to 4,000,000 bytes"),
        ):
            with pytest.raises(InputError, match=message):
                read(root, **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


def test_missing_files_are_named(root):
    with pytest.raises(InputError, match="train.txt: no such file; splits there: classes, test"):
        read(root, "train")
    with pytest.raises(InputError, match="nus.txt: cannot be read"):
        read(root, classes="nus.txt")
    (root / NAMES[0]).unlink()
    with pytest.raises(InputError, match="test.txt: 1 of its 2 image files are missing"):
        read(root)
