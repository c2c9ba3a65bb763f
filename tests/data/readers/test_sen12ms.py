"""sen12ms.py on the archive's folders and the lists and pickle of the authors' repository."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from layouts import write_sen12ms

from mlvision.data import build_manifest
from mlvision.data.images import read_record
from mlvision.data.readers.sen12ms import IGBP, SIMPLIFIED
from mlvision.errors import InputError


def shares(**of_column: float) -> list[float]:
    return [of_column.get(f"c{c}", 0.0) for c in range(17)]


TEST = {
    "ROIs1868_summer_s2_146_p9.tif": shares(c0=0.05, c4=0.06, c12=0.09, c16=0.8),
    "ROIs1158_spring_s2_1_p30.tif": shares(c11=0.06, c13=0.06, c9=0.88),
}


@pytest.fixture
def root(tmp_path):
    write_sen12ms(tmp_path, "test", TEST)
    return tmp_path


def read(root, split="test", **options):
    return build_manifest("sen12ms", root=str(root), split=split, **options)


def names(manifest):
    return [[manifest.classes[c] for c in record.labels] for record in manifest.records]


def test_simplified_classes_add_up_shares(root):
    manifest = read(root)

    assert manifest.classes == tuple(SIMPLIFIED)
    assert [r.key for r in manifest.records] == [
        "ROIs1158_spring/s2_1/ROIs1158_spring_s2_1_p30.tif",
        "ROIs1868_summer/s2_146/ROIs1868_summer_s2_146_p9.tif",
    ]
    # 0.06 + 0.06 of croplands and mosaics; 0.05 + 0.06 of forests; 0.09 of cities is too little.
    assert names(manifest) == [["Grassland", "Croplands"], ["Forest", "Water"]]
    assert "10" not in manifest.classes
    assert "simplified classes present from a share of 0.1, bands B4 B3 B2, reflectance_10000" in manifest.protocol


def test_full_scheme_and_threshold(root):
    assert read(root, scheme="full").classes == IGBP
    assert names(read(root, scheme="full")) == [["Grasslands"], ["Water bodies"]]
    assert names(read(root, scheme="full", threshold=0.06))[1] == [
        "Mixed forests",
        "Urban and built-up lands",
        "Water bodies",
    ]
    assert sorted(c for columns in SIMPLIFIED.values() for c in columns) == list(range(17))


def test_bands_are_channels_of_one_file(root):
    # The second patch written is the first by name: channel i holds 100 * i + 2.
    image = read_record(read(root, scaling="reflectance_3000").records[0])
    assert image.dtype == np.uint8
    assert image[0, 0].tolist() == [0, 0, 0]
    assert image[7, 0].tolist() == [round(v / 3000 * 255) for v in (302, 202, 102)]  # B4, B3, B2

    manifest = read(root, bands=["B12", "B8A"])
    assert manifest.num_channels == 2
    image = read_record(manifest.records[0])
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[7, 0], [0.1202, 0.0802], rtol=1e-5)


def label_file(root):
    return root / "IGBP_probability_labels.pkl"


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_a_pickle_that_calls_something_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    label_file(root).write_bytes(pickle.dumps({"a": Harmful()}))
    with pytest.raises(
        InputError, match="labels.pkl: cannot be read as a pickle: it asks for .*; expected nothing but numbers"
    ):
        read(root)
    assert not Path("harm").exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_of_numpy_arrays_scalars_and_lists_are_read(root, protocol):
    first, second = TEST
    mixed = {first: [np.float64(v) for v in TEST[first]], second: np.array(TEST[second], dtype=np.float32)}
    label_file(root).write_bytes(pickle.dumps(mixed, protocol=protocol))
    assert names(read(root)) == [["Grassland", "Croplands"], ["Forest", "Water"]]


def test_faulty_label_files_are_refused(root):
    content = pickle.loads(label_file(root).read_bytes())
    name = "ROIs1868_summer_s2_146_p9.tif"
    for bad in (np.ones(10), "many", np.full(17, np.nan)):
        label_file(root).write_bytes(pickle.dumps({**content, name: bad}))
        with pytest.raises(InputError, match=f"labels.pkl: {name}: expected 17 shares of the IGBP classes"):
            read(root)
    del content[name]
    label_file(root).write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=f"test_list.txt, line 1: {name} has no entry in .*labels.pkl"):
        read(root)
    label_file(root).write_bytes(pickle.dumps([1]))
    with pytest.raises(InputError, match="labels.pkl: holds a list, expected file names and their shares"):
        read(root)
    label_file(root).write_bytes(b"no pickle")
    with pytest.raises(InputError, match="labels.pkl: cannot be read as a pickle"):
        read(root)
    label_file(root).unlink()
    with pytest.raises(InputError, match="labels.pkl: cannot be read: No such file"):
        read(root)


def test_faulty_lists_and_files_are_refused(root):
    with pytest.raises(InputError, match="val_list.txt: no such list; splits there: test"):
        read(root, "val")
    (root / "val_list.txt").write_text("ROIs1158_spring_s1_1_p30.tif\n")
    with pytest.raises(
        InputError, match="val_list.txt, line 1: 'ROIs1158_spring_s1_1_p30.tif', expected a file such as"
    ):
        read(root, "val")
    (root / "ROIs1158_spring" / "s2_1" / "ROIs1158_spring_s2_1_p30.tif").unlink()
    with pytest.raises(InputError, match="test_list.txt: 1 of its 2 image files are missing"):
        read(root)
    for options in ({"scheme": "igbp"}, {"threshold": 0.0}, {"bands": []}, {"scaling": "none"}):
        with pytest.raises(InputError, match=f"data.{next(iter(options))}="):
            read(root, **options)
