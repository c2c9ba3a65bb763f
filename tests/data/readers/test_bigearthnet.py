"""bigearthnet.py on patches laid out as the two versions' archives unpack."""

import json
import sys

import numpy as np
import pytest
from layouts import write_bigearthnet_v1, write_bigearthnet_v2

from mlvision.data import build_manifest
from mlvision.data.check import check_data, write_check
from mlvision.data.images import read_record
from mlvision.data.readers.bigearthnet import BANDS, CLASSES_19, CLASSES_43, JOINED, BigEarthNetConfig
from mlvision.errors import InputError

A, B, C = (f"S2A_MSIL2A_20170617T113321_{number}" for number in ("4_55", "36_85", "9_1"))
V1 = {
    A: ["Pastures", "Rice fields", "Non-irrigated arable land"],
    B: ["Airports", "Bare rock"],  # none of the 19 has these
    C: ["Sea and ocean", "Airports"],
}
TILE = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP"
V2 = [
    (f"{TILE}_26_57", ["Arable land", "Marine waters"], "train"),
    (f"{TILE}_07_03", ["Pastures"], "validation"),
    ("S2B_MSIL2A_20180204T094161_N9999_R036_T35VNL_1_9", ["Urban fabric"], "train"),
]


def read(root, split="train", **options):
    return build_manifest("bigearthnet", root=str(root), split=split, **options)


def names(manifest, row):
    return [manifest.classes[c] for c in manifest.records[row].labels]


def test_class_lists():
    assert (len(CLASSES_43), len(set(CLASSES_43)), len(CLASSES_19)) == (43, 43, 19)
    joined = [old for many in JOINED.values() for old in many]
    assert len(joined) == len(set(joined)) == 32
    assert set(joined) < set(CLASSES_43)
    # Both lists are in the order of CORINE's codes, except that a joined class stands where its first one does.
    first = [CLASSES_43.index(many[0]) for many in JOINED.values()]
    assert first == sorted(first)


def test_v1_with_43_classes(tmp_path):
    write_bigearthnet_v1(tmp_path, "train", V1, ("B04", "B03", "B02"))
    manifest = read(tmp_path, version="v1", num_classes=43)

    assert manifest.classes == CLASSES_43
    assert [r.key for r in manifest.records] == [f"BigEarthNet-v1.0/{name}" for name in (A, B, C)]
    assert names(manifest, 0) == ["Non-irrigated arable land", "Rice fields", "Pastures"]
    assert names(manifest, 1) == ["Airports", "Bare rock"]
    assert "BigEarthNet v1, train.csv, split train, 3 of 3 patches" in manifest.protocol


def test_v1_with_19_classes(tmp_path):
    write_bigearthnet_v1(tmp_path, "train", V1, ("B04", "B03", "B02"))
    manifest = read(tmp_path, version="v1")

    assert manifest.classes == CLASSES_19
    assert [r.key[-4:] for r in manifest.records] == ["4_55", "_9_1"]  # B has none of the 19: left out
    assert [names(manifest, row) for row in (0, 1)] == [["Arable land", "Pastures"], ["Marine waters"]]
    assert "2 of 3 patches" in manifest.protocol


def test_v2_reads_the_parquet_file(tmp_path):
    write_bigearthnet_v2(tmp_path, V2, ("B04", "B03", "B02"))
    train = read(tmp_path)

    assert train.classes == CLASSES_19
    assert [r.key for r in train.records] == [
        f"BigEarthNet-S2/{TILE}/{TILE}_26_57",
        "BigEarthNet-S2/S2B_MSIL2A_20180204T094161_N9999_R036_T35VNL/S2B_MSIL2A_20180204T094161_N9999_R036_T35VNL_1_9",
    ]
    assert names(train, 0) == ["Arable land", "Marine waters"]
    assert [r.labels for r in read(tmp_path, "validation").records] == [(CLASSES_19.index("Pastures"),)]
    assert "bands B04 B03 B02, reflectance_3000, 10 m grid, bilinear" in train.protocol


def test_true_colour_is_red_green_blue(tmp_path):
    write_bigearthnet_v2(tmp_path, V2, ("B02", "B03", "B04"))  # 500, 600, 700 in the first patch
    image = read_record(read(tmp_path).records[0])

    assert image.shape == (120, 120, 3)
    assert image.dtype == np.uint8
    assert image[0, 0].tolist() == [0, 0, 0]
    assert image[119, 1].tolist() == [round(v / 3000 * 255) for v in (700, 600, 500)]


def test_all_bands_are_on_the_grid_of_10_m(tmp_path):
    write_bigearthnet_v2(tmp_path, V2, BANDS)
    manifest = read(tmp_path, bands=list(BANDS), scaling="reflectance_10000")
    image = read_record(manifest.records[1])  # its patch was written third: 502

    assert manifest.num_channels == 12
    assert image.shape == (120, 120, 12)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[60, 60], (502 + 100 * np.arange(12)) / 10_000, rtol=1e-5)
    assert image[0, 0].tolist() == [0] * 12
    # The dark first pixel of 60 m covers 6 x 6 on the grid, that of 20 m 2 x 2: where each has faded by half.
    assert [int((image[0, :, c] < image[60, 60, c] / 2).sum()) for c in (0, 4, 1)] == [6, 2, 1]


def test_check_counts_patches_and_draws_them(tmp_path):
    write_bigearthnet_v2(tmp_path, V2, ("B02", "B03", "B04", "B08"))
    bands = ["B08", "B02", "B03", "B04"]
    (tmp_path / "BigEarthNet-S2" / TILE / f"{TILE}_07_03" / f"{TILE}_07_03_B03.tif").write_bytes(b"no band")
    config = BigEarthNetConfig(root=str(tmp_path), val="validation", test="", bands=bands)

    check = check_data(config)

    assert [len(split.manifest) for split in check.splits.values()] == [2, 1]
    assert check.splits["train"].unreadable == ()
    ((key, reason),) = check.splits["validation"].unreadable
    assert key.endswith("_07_03")
    assert "_B03.tif: cannot be decoded: not a TIFF file" in reason
    write_check(check, tmp_path / "out", samples=2, seed=0)
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def v1_json(root):
    return root / "BigEarthNet-v1.0" / A / f"{A}_labels_metadata.json"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"labels": ["Pasture"]}, "_labels_metadata.json: label 'Pasture' is not one of BigEarthNet's 43 classes"),
        ({"labels": []}, "labels is .., expected a list of class names"),
        ({"label": ["Pastures"]}, "labels is None"),
        ([1], "labels is None"),
    ],
)
def test_faulty_labels_of_v1_are_refused(tmp_path, document, message):
    write_bigearthnet_v1(tmp_path, "train", V1, ("B02",))
    v1_json(tmp_path).write_text(json.dumps(document))
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, version="v1")
    assert str(v1_json(tmp_path)) in str(caught.value)


def test_faulty_lists_and_folders_of_v1_are_refused(tmp_path):
    write_bigearthnet_v1(tmp_path, "train", V1, ("B02",))
    with pytest.raises(InputError, match="val.csv: no such list; splits there: train"):
        read(tmp_path, "val", version="v1")
    (tmp_path / "val.csv").write_text(f"{A}\n{A}\n")
    with pytest.raises(InputError, match="val.csv, line 2: repeats 'S2A"):
        read(tmp_path, "val", version="v1")
    (tmp_path / "val.csv").write_text("S2A_none\n")
    with pytest.raises(InputError, match="S2A_none_labels_metadata.json: cannot be read: No such file"):
        read(tmp_path, "val", version="v1")
    (tmp_path / "val.csv").write_text(f"{B}\n")
    with pytest.raises(InputError, match="val.csv: split 'val' has no patch with a label"):
        read(tmp_path, "val", version="v1")


def test_faulty_metadata_of_v2_is_refused(tmp_path, monkeypatch):
    write_bigearthnet_v2(tmp_path, V2, ("B02",))
    with pytest.raises(InputError, match="metadata.parquet: split 'val' does not exist; splits: train, validation"):
        read(tmp_path, "val")
    (tmp_path / "BigEarthNet-S2" / TILE / f"{TILE}_26_57").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="1 of its 2 image files are missing, .*_26_57"):
        read(tmp_path)
    assert len(read(tmp_path, check_files=False)) == 2
    write_bigearthnet_v2(tmp_path, [(V2[0][0], ["Airports"], "train")], ("B02",))
    with pytest.raises(InputError, match="metadata.parquet, row 0: label 'Airports' is not one of BigEarthNet's 19"):
        read(tmp_path)
    write_bigearthnet_v2(tmp_path, [V2[0], V2[0]], ("B02",))
    with pytest.raises(InputError, match="metadata.parquet, row 1: repeats"):
        read(tmp_path)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match="metadata.parquet: cannot be read: "):
        read(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="reading parquet needs pyarrow: pip install -r requirements-parquet.txt"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v3"}, "data.version=v3: expected one of v1, v2"),
        ({"num_classes": 43}, "data.num_classes=43: expected 19 in version 2"),
        ({"num_classes": 20, "version": "v1"}, "data.num_classes=20: expected 19 or 43"),
        ({"bands": ["B10"]}, "data.bands=.'B10'.: expected different ones of B01"),
        ({"scaling": "bright"}, "data.scaling=bright"),
    ],
)
def test_options_that_cannot_be_met_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, **options)
