"""Readers on damaged label files: seeded mutations give a manifest that every writer can write, or one line of error."""

import copy
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import VocObject, write_bigearthnet_v1, write_nuswide, write_sen12ms, write_voc

from mlvision.data import Manifest, build_manifest
from mlvision.data.check import DataCheck, SplitCheck, format_check, write_check
from mlvision.errors import UNWRITABLE, InputError

CASES = 60  # of each reader
ODD_TEXTS = (
    b"", b"\0", b"\n", b"\r\n", b"\xff", b"\xef\xbb\xbf", b'"', b"'", b",", b";", b"\t", b"{", b"[" * 5000, b"nan", b"-1",
    b"1e999", b"9" * 5000, b"true", b"null", b"../", b"\\u0000", b"\xe2\x80\xa8", b"<a>", b"</object>", b"&x;",
    b"x" * 20_000, b"=1+1", b"0.0",
)  # fmt: skip
ODD_VALUES = (
    None, True, False, 0, -1, 1.5, 2**70, 10**400, 1e30, float("nan"), float("inf"), "", "0", "1", "\0", "a\nb", "\ud800",
    "x" * 20_000, [], {}, [[]], [None], {"a": 1}, [1, 2, 3, 4], "../../a.jpg", "/dev/null",
)  # fmt: skip


def write_coco(root: Path) -> Path:
    document = {
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 20, "height": 10},
            {"id": 2, "file_name": "b.jpg", "width": 4, "height": 3, "unknown_category_ids": [2]},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0,
             "segmentation": [[1, 2, 4, 2, 4, 6], [2, 2, 3, 2, 3, 3]]},
            {"id": 2, "image_id": 2, "category_id": 3, "bbox": [0, 0, 2, 2], "iscrowd": 1,
             "segmentation": {"size": [3, 4], "counts": [3, 3, 4, 2]}},
            {"id": 3, "image_id": 2, "category_id": 1, "bbox": [0, 0, 2, 2],
             "segmentation": {"size": [3, 4], "counts": "334O"}},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "owl"}],
    }  # fmt: skip
    path = root / "annotations" / "instances_train.json"
    path.parent.mkdir()
    path.write_text(json.dumps(document))
    return path


def write_csv(root: Path) -> Path:
    path = root / "labels.csv"
    path.write_text("image,cat,dog,owl\na.jpg,1,0,-1\nb.jpg,,True,0.0\nc.jpg,0,1,nan\n")
    return path


def write_label_column(root: Path) -> Path:
    path = root / "labels.csv"
    path.write_text('image;tags;part\na.jpg;"cat|dog";train\nb.jpg;owl;train\nc;;test\n')
    return path


def write_xml(root: Path) -> Path:
    objects = [
        VocObject("cat", (1, 2, 10, 8)),
        VocObject("dog", (3, 3, 20, 10), 1),
        VocObject("person", (1, 1, 5, 5), None),
    ]
    write_voc(root, {"train": {"000001": ((20, 10), objects), "000002": ((20, 10), objects[:1])}})
    return root / "Annotations" / "000001.xml"


def write_image_set(root: Path) -> Path:
    write_xml(root)
    return root / "ImageSets" / "Main" / "train.txt"


def write_text_matrix(root: Path) -> Path:
    path = root / "train.txt"
    path.write_text("a.jpg 1 0 1\nb.jpg 0 0 1\nc.jpg 1 1 0\n")
    return path


def write_array(root: Path) -> Path:
    np.save(root / "train.npy", np.eye(3, 4))
    (root / "names.txt").write_text("a.jpg\nb.jpg\nc.jpg\n")
    return root / "train.npy"


def write_arrays(root: Path) -> Path:
    np.savez_compressed(root / "train.npz", labels=np.eye(3, 4), names=np.array(["a.jpg", "b.jpg", "c.jpg"]))
    return root / "train.npz"


def write_lists(root: Path) -> Path:
    images = {"x\\a.jpg": ("Train", (1, 0)), "x\\b.jpg": ("Train", (0, 1)), "y\\c.jpg": ("Test", (1, 1))}
    write_nuswide(root, ("cat", "dog"), images, {"Train": (0, 1), "Test": (2,)})
    return root / "Groundtruth" / "AllLabels" / "Labels_dog.txt"


def write_image_list(root: Path) -> Path:
    write_lists(root)
    return root / "ImageList" / "TrainImagelist.txt"


def write_genome(root: Path) -> Path:
    (root / "train_list_500.txt").write_text("1.jpg\n2.jpg\n")
    path = root / "vg_category_500_labels_index.json"
    path.write_text(json.dumps({"1.jpg": [0, 3, 3], "2.jpg": [499], "3.jpg": []}))
    return path


def write_patches(root: Path) -> Path:
    write_bigearthnet_v1(root, "train", {"S2A_1_1": ["Pastures", "Airports"], "S2A_1_2": ["Mixed forest"]}, ())
    return root / "BigEarthNet-v1.0" / "S2A_1_1" / "S2A_1_1_labels_metadata.json"


def write_patch_list(root: Path) -> Path:
    write_patches(root)
    return root / "train.csv"


def write_shares(root: Path) -> Path:
    write_sen12ms(
        root, "train", {"ROIs1158_spring_s2_1_p30.tif": [0.5, 0.5, *[0] * 15], "ROIs1158_spring_s2_1_p31.tif": [0] * 17}
    )
    return root / "IGBP_probability_labels.pkl"


def write_real(root: Path) -> Path:
    for name in ("train/n1", "train/n2", "val"):
        (root / name).mkdir(parents=True)
    (root / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    (root / "val" / "ILSVRC2012_val_00000002.JPEG").touch()
    (root / "real.json").write_text(json.dumps([[0, 1], [1]]))
    return root / "real.json"


# The function that writes a data set and names the file to damage, the reader, and its options.
READERS: dict[str, tuple[Callable[[Path], Path], str, dict]] = {
    "coco": (write_coco, "coco", {}),
    "coco, all images": (write_coco, "coco", {"protocol": "all", "merge_classes": {"cat": "pet", "dog": "pet"}}),
    "csv, a column for each class": (write_csv, "csv", {"split": "all"}),
    "csv, label column": (write_label_column, "csv", {"label_column": "tags", "separator": "|", "split_column": "part"}),
    "csv, row per label": (write_label_column, "csv", {"label_column": "tags", "rows": "label", "split": "all"}),
    "voc annotation": (write_xml, "voc", {"classes": ["cat", "dog", "person"]}),
    "voc image set": (write_image_set, "voc", {"classes": ["cat", "dog", "person"]}),
    "matrix, text": (write_text_matrix, "matrix", {}),
    "matrix, npy": (write_array, "matrix", {"labels": "{split}.npy", "names": "names.txt"}),
    "matrix, npz": (
        write_arrays, "matrix",
        {"labels": "{split}.npz", "labels_array": "labels", "names": "{split}.npz", "names_array": "names"},
    ),
    "nuswide labels": (write_lists, "nuswide", {"split": "Train"}),
    "nuswide list": (write_image_list, "nuswide", {"split": "Train"}),
    "vg500": (write_genome, "vg500", {}),
    "bigearthnet labels": (write_patches, "bigearthnet", {"version": "v1", "num_classes": 43}),
    "bigearthnet list": (write_patch_list, "bigearthnet", {"version": "v1", "num_classes": 43}),
    "sen12ms": (write_shares, "sen12ms", {}),
    "imagenet, real": (write_real, "imagenet", {"split": "val", "real": "real.json"}),
}  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three faults: cut, flipped, doubled, taken out, or something odd put in."""
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(content) + 1)
        stop = min(len(content), place + rng.randint(1, 12))
        kind = rng.randrange(5)
        if kind == 0:
            content = content[:place]
        elif kind == 1 and place < len(content):
            content = content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
        elif kind == 2:
            content = content[:stop] + content[place:stop] + content[stop:]
        elif kind == 3:
            content = content[:place] + content[stop:]
        else:
            content = content[:place] + rng.choice(ODD_TEXTS) + content[rng.choice([place, stop]) :]
    return content


def mutated(document, rng: random.Random):
    """The document with one value, at any depth, replaced by an odd one, taken out, or doubled."""
    document = copy.deepcopy(document)
    places = []

    def collect(node):
        for key in range(len(node)) if isinstance(node, list) else list(node) if isinstance(node, dict) else ():
            places.append((node, key))
            collect(node[key])

    collect(document)
    for node, key in rng.sample(places, min(len(places), rng.randint(1, 2))):
        kind = rng.randrange(4)
        if kind == 0:
            (node.remove if isinstance(node, list) else node.pop)(node[key] if isinstance(node, list) else key)
            break  # the other place may be gone
        if kind == 1 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return document


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, reader):
    write, name, options = READERS[reader]
    root = tmp_path / "set"
    root.mkdir()
    path = write(root)
    options = {"split": "train", "check_files": False} | options
    whole = path.read_bytes()
    read = build_manifest(name, root=str(root), **options)
    assert len(read)
    messages = []
    for case in range(CASES):
        rng = random.Random(f"{reader} {case}")
        if path.suffix == ".json" and case % 2:
            path.write_text(json.dumps(mutated(json.loads(whole), rng)))
        elif path.suffix == ".pkl" and case % 2:
            plain = {key: np.asarray(value).tolist() for key, value in pickle.loads(whole).items()}
            path.write_bytes(pickle.dumps(mutated(plain, rng)))
        else:
            path.write_bytes(damaged(whole, rng))
        try:
            manifest = build_manifest(name, root=str(root), **options)
        except InputError as error:
            messages.append(str(error))
        except Exception as error:
            raise AssertionError(f"case {case}: {path.read_bytes()[:3000]!r}") from error
        else:
            check_writable(manifest, tmp_path / "out")
    assert CASES // 4 <= len(messages) < CASES
    assert all(str(root) in message or message.startswith(("split ", "class names")) for message in messages)
    assert max(map(len, messages)) < 2100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "set"]


def check_writable(manifest: Manifest, folder: Path) -> None:
    """What every reader promises, and what the check writes of it."""
    num_classes = len(manifest.classes)
    assert len(set(manifest.keys)) == len(manifest) > 0
    assert not any(UNWRITABLE.search(text) for text in (*manifest.classes, *manifest.keys))
    assert manifest.targets.shape == (len(manifest), num_classes)
    assert len(manifest.hash) == 64
    for record in manifest.records:
        assert set(record.labels) | set(record.unknown) <= set(range(num_classes))
        assert not set(record.labels) & set(record.unknown)
        if record.boxes is not None:
            assert ((record.boxes.xyxy >= 0) & (record.boxes.xyxy <= 1)).all()
            assert (record.boxes.xyxy[:, :2] <= record.boxes.xyxy[:, 2:]).all()
            assert set(record.boxes.labels.tolist()) <= set(range(num_classes))
    check = DataCheck({"train": SplitCheck(manifest, (None,) * len(manifest), ())}, [], labels_only=True)
    assert "problems found" in format_check(check)
    write_check(check, folder, samples=1, seed=0)
