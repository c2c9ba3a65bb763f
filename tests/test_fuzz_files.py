"""Files changed at random, from a seed: each reads as a value or an InputError of one line, soon, and leaves no file."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from faults import soon
from layouts import VocObject, write_bigearthnet_v1, write_bigearthnet_v2, write_nuswide, write_sen12ms, write_voc
from PIL import Image
from safetensors.torch import save_file

from mlvision.config import Config, load_config
from mlvision.data import build_manifest
from mlvision.data.bands import read_tiff
from mlvision.data.images import decode_image
from mlvision.errors import InputError
from mlvision.label_maps.store import LabelMapStore, LabelMapWriter, StoreMeta
from mlvision.models.text import TextConfig, embed_labels
from mlvision.models.weights import read_checkpoint
from mlvision.options import save_options
from mlvision.runs.load import LoadedRun, check_never_trained_on

pytestmark = pytest.mark.slow

CASES = 60


def is_value(read: Callable[[], Any], case: str) -> bool:
    """Whether `read` gives a value; what it raises else is an InputError of one line."""
    try:
        with soon(case):
            read()
    except InputError as error:
        message = str(error)
        assert "\n" not in message, f"{case}: {message!r}"
        assert 0 < len(message) < 3000, f"{case}: a message of {len(message)} characters"
        message.encode()
        return False
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    return True


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one to three changes, of the kinds that broken disks, downloads and editors make."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(data) + 1))
        size = int(rng.integers(1, 1 + min(64, max(1, len(data) // 2))))
        kind = rng.integers(8)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.integers(8)
        elif kind == 1:
            data[place : place + size] = bytes(min(size, len(data) - place))
        elif kind == 2:
            data[place : place + size] = rng.bytes(size)
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            del data[place : place + size]
        elif kind == 5:
            data[place:place] = data[place : place + size]
        elif kind == 6:
            data[place:place] = rng.choice(
                [b"\xff", b"\0", b"\xe9", b"\n", b'"', b",", b"-1", b"9" * 30, b"1e999", b"../"]
            )
        else:
            data[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\1"])
    return bytes(data)


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((40, 28), Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_exif() -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = 6
    return block


IMAGES = {
    "jpeg": lambda: encoded("JPEG"),
    "progressive jpeg": lambda: encoded("JPEG", progressive=True),
    "exif jpeg": lambda: encoded("JPEG", exif=with_exif()),
    "cmyk jpeg": lambda: encoded("JPEG", "CMYK"),
    "png": lambda: encoded("PNG"),
    "palette png": lambda: encoded("PNG", "P", transparency=1),
    "webp": lambda: encoded("WEBP"),
    "lossless webp": lambda: encoded("WEBP", lossless=True, exif=with_exif()),
    "tiff": lambda: encoded("TIFF"),
    "lzw tiff": lambda: encoded("TIFF", compression="tiff_lzw", exif=with_exif()),
    "gif": lambda: encoded("GIF", "P"),
    "bmp": lambda: encoded("BMP"),
    "avif": lambda: encoded("AVIF"),
    "jpeg 2000": lambda: encoded("JPEG2000"),
    "tga": lambda: encoded("TGA", compression="tga_rle"),
    "ppm": lambda: encoded("PPM"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind, capfd):
    content = IMAGES[kind]()
    values = 0
    for case in range(CASES):
        data = damaged(content, np.random.default_rng([1, case]))
        values += is_value(lambda data=data: decode_image(data, "a.img", max_pixels=2**22), f"{kind}, case {case}")
    assert is_value(lambda: decode_image(content, "a.img"), kind)
    assert values < CASES
    assert "Corrupt JPEG data" not in capfd.readouterr().err


def test_bands():
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.arange(8 * 9 * 5, dtype=np.uint16).reshape(8, 9, 5), photometric="minisblack")
    for case in range(2 * CASES):
        data = damaged(buffer.getvalue(), np.random.default_rng([2, case]))
        is_value(lambda data=data: read_tiff(data, "a.tif", 2**22), f"case {case}")


def write_csv(root: Path) -> dict[str, Any]:
    (root / "labels.csv").write_text("image,cat,dog,part\na.jpg,1,0,train\nb.jpg,-1,1,train\nc.jpg,,0,test\n")
    return {"name": "csv", "split": "train", "split_column": "part"}


def write_label_column(root: Path) -> dict[str, Any]:
    (root / "labels.csv").write_text('image,tags\na1.jpg,cat;dog\nb2.jpg,"dog"\nc3.jpg,\n')
    rule = {"split_rule": "file_number", "splits": {"train": "0-2"}}
    return {"name": "csv", "split": "train", "label_column": "tags", **rule}


def write_coco(root: Path) -> dict[str, Any]:
    (root / "annotations").mkdir()
    runs = {"size": [4, 6], "counts": [4, 8, 12]}
    polygon = [[0, 0, 3, 0, 3, 3]]
    objects = [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 3,
            "bbox": [0, 0, 2, 2],
            "iscrowd": 0,
            "area": 4,
            "segmentation": polygon,
        },
        {
            "id": 2,
            "image_id": 2,
            "category_id": 7,
            "bbox": [1, 1, 2.5, 2],
            "iscrowd": 1,
            "area": 5,
            "segmentation": runs,
        },
    ]
    names = ("a.jpg", "sub/b.jpg")
    images = [{"id": i, "file_name": name, "width": 6, "height": 4} for i, name in enumerate(names, start=1)]
    images[0]["unknown_category_ids"] = [7]
    categories = [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 7, "name": "dog"}]
    document = {"info": {}, "images": images, "annotations": objects, "categories": categories}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(document))
    return {"name": "coco", "split": "train", "images": "."}


def write_voc_set(root: Path) -> dict[str, Any]:
    objects = [VocObject("cat", (1, 1, 3, 3)), VocObject("person", (2, 1, 6, 4), 1)]
    write_voc(root, {"trainval": {"000001": ((6, 4), objects), "000002": ((6, 4), objects[:1])}})
    return {"name": "voc", "split": "trainval"}


def write_matrix(root: Path) -> dict[str, Any]:
    np.save(root / "train.npy", np.array([[1, 0, 1], [0, 1, 0]]))
    (root / "names.txt").write_text("a.jpg\nb.jpg\n")
    (root / "classes.txt").write_text("cat\ndog\nowl\n")
    options = {"labels": "{split}.npy", "names": "names.txt", "classes": "classes.txt"}
    return {"name": "matrix", "split": "train", **options}


def write_archives(root: Path) -> dict[str, Any]:
    np.savez_compressed(root / "train.npz", labels=np.array([[1, 0, 1], [0, 1, 0]]))
    np.savez(root / "names.npz", names=np.array(["a.jpg", "b.jpg"]))
    return {"name": "matrix", "split": "train", "labels": "{split}.npz", "names": "names.npz"}


def write_text_matrix(root: Path) -> dict[str, Any]:
    (root / "train.txt").write_text("a.jpg 1 0 1\nb.jpg 0 1 0\n")
    return {"name": "matrix", "split": "train"}


def write_nus(root: Path) -> dict[str, Any]:
    images = {"sky\\1.jpg": ("Train", [1, 0]), "sea\\2.jpg": ("Train", [0, 1]), "sea\\3.jpg": ("Test", [1, 1])}
    write_nuswide(root, ["sky", "sea"], images, {"Train": [1, 0], "Test": [2]})
    return {"name": "nuswide", "split": "Train"}


def write_vg500(root: Path) -> dict[str, Any]:
    (root / "train_list_500.txt").write_text("1.jpg\n2.jpg\n")
    (root / "vg_category_500_labels_index.json").write_text(json.dumps({"1.jpg": [499, 3], "2.jpg": []}))
    return {"name": "vg500", "split": "train"}


def write_imagenet(root: Path) -> dict[str, Any]:
    for folder in ("train/n1", "train/n2", "val"):
        (root / folder).mkdir(parents=True)
    for number in (1, 2):
        (root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").touch()
    (root / "real.json").write_text("[[0, 1], [1]]")
    (root / "names.json").write_text('["tench", "goldfish"]')
    return {"name": "imagenet", "split": "val", "real": "real.json", "classes": "names.json"}


def write_bigearthnet(root: Path) -> dict[str, Any]:
    write_bigearthnet_v1(root, "train", {"S2A_1_2": ["Airports", "Pastures"], "S2A_1_3": ["Salines"]}, ("B04",))
    return {"name": "bigearthnet", "split": "train", "version": "v1", "bands": ["B04"]}


def write_parquet(root: Path) -> dict[str, Any]:
    write_bigearthnet_v2(
        root, [("S2A_T1_2_3", ["Pastures"], "train"), ("S2A_T1_2_4", ["Arable land"], "test")], ("B04",)
    )
    return {"name": "bigearthnet", "split": "train", "bands": ["B04"]}


def write_pickle(root: Path) -> dict[str, Any]:
    write_sen12ms(root, "train", {f"ROIs1158_spring_s2_1_p{p}.tif": np.full(17, 1 / 17) for p in (30, 31)})
    return {"name": "sen12ms", "split": "train"}


READERS = [
    write_csv,
    write_label_column,
    write_coco,
    write_voc_set,
    write_matrix,
    write_archives,
    write_text_matrix,
    write_nus,
    write_vg500,
    write_imagenet,
    write_bigearthnet,
    write_parquet,
    write_pickle,
]


def files_below(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("write", READERS)
def test_label_files(tmp_path, write):
    options = {"root": str(tmp_path), "check_files": False, **write(tmp_path)}

    def read() -> None:
        manifest = build_manifest(**options)
        assert manifest.targets.shape == (len(manifest), len(manifest.classes))
        manifest.hash.encode()

    read()
    files = {path: content for path, content in files_below(tmp_path).items() if path.suffix not in (".jpg", ".tif")}
    for case in range(2 * CASES):
        rng = np.random.default_rng([3, case])
        path = list(files)[rng.integers(len(files))]
        path.write_bytes(damaged(files[path], rng))
        is_value(read, f"{write.__name__}, case {case}, {path.relative_to(tmp_path)}")
        path.write_bytes(files[path])
        assert files_below(tmp_path).keys() >= files.keys()


VALUES = [
    None,
    True,
    False,
    -1,
    0,
    2**63,
    10**30,
    1e30,
    1e308,
    0.5,
    "",
    "0",
    "1",
    "x" * 5000,
    "\ud800",
    "../a",
    [],
    [[]],
    {},
]
VALUES += [{"id": 1}, [1, [2]], "a\nb", "NaN"]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to everything within a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("write", [write_coco, write_vg500, write_imagenet, write_bigearthnet])
def test_values_within_json(tmp_path, write):
    options = {"root": str(tmp_path), "check_files": False, **write(tmp_path)}
    (path, *_) = [path for path in sorted(tmp_path.rglob("*.json")) if path.name != "names.json"]
    text = path.read_text()
    spots = list(places(json.loads(text)))
    rng = np.random.default_rng(4)
    chosen = [(spot, value) for spot in spots for value in VALUES]
    if len(chosen) > 8 * CASES:
        chosen = [chosen[i] for i in rng.permutation(len(chosen))[: 8 * CASES]]
    for spot, value in chosen:
        document = json.loads(text)
        parent = document
        for key in spot[:-1]:
            parent = parent[key]
        parent[spot[-1]] = value
        path.write_text(json.dumps(document))
        is_value(lambda: build_manifest(**options).targets, f"{write.__name__}: {spot} = {str(value)[:40]!r}")


def test_label_map_stores(tmp_path):
    meta = StoreMeta("aa", 4, "cc", 3, "net", "ee", (3, 5), "probability", (), top_k=2, block_size=2, dtype="uint8")
    writer = LabelMapWriter.create_or_resume(tmp_path / "maps", meta)
    best = torch.tensor([[0.75], [0.5]]).expand(2, 2, 15).reshape(2, 2, 3, 5)
    for block in writer.outstanding():
        writer.write(block, best, torch.tensor([2, 0]).view(1, 2, 1, 1).expand(2, 2, 3, 5), torch.zeros(2, 3, 5))
    files = files_below(tmp_path)

    def read() -> None:
        store = LabelMapStore.open(tmp_path / "maps")
        store.check(record_hash="aa", class_hash="cc", num_records=4)
        assert store.read(np.arange(4)).values.shape == (4, 2, 3, 5)

    read()
    for case in range(5 * CASES):
        rng = np.random.default_rng([5, case])
        path = list(files)[rng.integers(len(files))]
        path.write_bytes(damaged(files[path], rng))
        is_value(read, f"case {case}, {path.name}")
        path.write_bytes(files[path])
        assert files_below(tmp_path) == files


def test_configs(tmp_path):
    path = tmp_path / "config.yaml"
    save_options(Config(), path)
    content = path.read_bytes()
    values = 0
    for case in range(2 * CASES):
        path.write_bytes(damaged(content, np.random.default_rng([6, case])))
        values += is_value(lambda: load_config(path), f"case {case}")
    assert 0 < values < 2 * CASES


def write_glove(path: Path) -> None:
    path.write_text("cat 0.5 -1 2\ndog 1e-3 0 1\nowl 1 1 1\n")


def write_word2vec(path: Path) -> None:
    path.write_text("3 3\ncat 0.5 -1 2\ndog 1e-3 0 1\nowl 1 1 1\n")


def write_vectors(path: Path) -> None:
    np.savez(path, words=np.array(["cat", "dog", "owl"]), vectors=np.eye(3, dtype=np.float16))


@pytest.mark.parametrize(
    ("write", "name"), [(write_glove, "v.txt"), (write_word2vec, "v.vec"), (write_vectors, "v.npz")]
)
def test_word_vectors(tmp_path, write, name):
    path = tmp_path / name
    write(path)
    content = path.read_bytes()
    options = TextConfig(encoder="vectors", model=str(path))
    for case in range(2 * CASES):
        path.write_bytes(damaged(content, np.random.default_rng([7, case])))
        is_value(lambda: embed_labels(["cat", "dog"], options), f"case {case}")
    path.write_bytes(content)
    assert is_value(lambda: embed_labels(["cat", "dog"], options), name)


def test_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2)}, path, metadata={"format": "pt"})
    content = path.read_bytes()
    for case in range(2 * CASES):
        path.write_bytes(damaged(content, np.random.default_rng([8, case])))
        is_value(lambda: read_checkpoint(path, ["conv.weight", "conv.bias"]), f"case {case}")


def test_images_of_a_run(tmp_path):
    path = tmp_path / "images.csv"
    content = b"split,key,bytes\r\ntrain,a.jpg,120\r\ntrain,sub/b.jpg,\r\nval,c.jpg,7\r\n"
    run = object.__new__(LoadedRun)
    run.folder = tmp_path
    (tmp_path / "set").mkdir()
    manifest = build_manifest(
        root=str(tmp_path / "set"), check_files=False, **write_csv(tmp_path / "set") | {"split": "test"}
    )
    for case in range(2 * CASES):
        path.write_bytes(damaged(content, np.random.default_rng([9, case])))
        is_value(lambda: check_never_trained_on(run, manifest, "test"), f"case {case}")
    path.write_bytes(content)
    assert is_value(lambda: check_never_trained_on(run, manifest, "test"), path.name)
