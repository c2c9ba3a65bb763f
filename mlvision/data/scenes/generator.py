"""`scenes`: a generator that writes a COCO-format folder of multi-object images, from a seed alone."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image

from mlvision.data.loader import MOST_WORKERS
from mlvision.data.scenes.drawing import GLYPHS, background, distractor, glyph_coverage, mask_polygons, paint
from mlvision.errors import InputError
from mlvision.files import whole_file, whole_folder
from mlvision.progress import track

SPLITS = ("train", "test")

# Part of a set's identity: raise it whenever the same options would give other files.
_GENERATOR = 1
_IDENTITY_FILE = "scenes.json"
_MAX_ANGLE = np.deg2rad(20)
_MIN_VISIBLE = 0.2
_DESCRIPTIONS = {
    "train": "scenes, training split: every object",
    "train_single": "scenes, training split: the largest object of each image alone",
    "train_partial": "scenes, training split: each present class is kept with probability partial_keep; the others "
    "have no annotations and are listed in the image's unknown_category_ids: to be read as unknown, not as absent",
    "test": "scenes, test split: every object",
}


@dataclass(frozen=True)
class ScenesConfig:
    """The options of the generator.

    `difficulty` d sets the ranges that images are drawn from: objects of 0.5 - 0.3 d to 0.85 - 0.3 d of the image's
    side, 1 to 2 + 4 d of them, and with d more noise, more distractors and less contrast.

    Calibrated at the defaults, test mAP (plain): 0.16 for a linear model on 8 x 8 x 8 colour histograms (chance is
    0.12); 0.949 for EfficientNet-Lite0 from its ImageNet weights after 5 epochs with all labels (AdamW, peak rate 1e-3,
    one cycle, batches of 64, random crops of 0.25 to 1 and flips), 0.706 with the `single` labels.

    `long_tail` shapes the training split only; the test split stays balanced, so that rare classes can be measured.
    `co_occurrence` shapes both. Its pairs are neighbours in the class list: classes 0 and 1, 2 and 3, ...
    (airplane + envelope, telephone + cup, umbrella + snowman, anchor + ship wheel, scissors + pencil, gear + hammers,
    scales + alembic, skull + swords, chess knight + chess rook, sun + cloud, heart + music note, cat + mouse,
    star + snowflake); the last of an odd number of classes has no partner.
    """

    train_images: Annotated[int, "images of the training split"] = 3000
    test_images: Annotated[int, "images of the test split"] = 1000
    image_size: Annotated[int, "side of the square images in pixels, 32 or more"] = 96
    seed: Annotated[int, "seed of everything random"] = 0
    num_classes: Annotated[int, f"classes: the first so many of the glyph list, 16 to {len(GLYPHS)}"] = 20
    difficulty: Annotated[float, "0 to 1: smaller, noisier, more objects that stand off less"] = 0.5
    long_tail: Annotated[float, "how many times rarer the last class is than the first in training; 1: balanced"] = 1.0
    co_occurrence: Annotated[float, "0 to 1: how often the partner of an object's class comes with it"] = 0.0
    partial_keep: Annotated[float, "0 to 1: how many of the present classes the partial labels keep"] = 0.5
    num_workers: Annotated[int, "processes that draw; 0: this one. The files do not depend on it"] = 2

    def __post_init__(self) -> None:
        limits = {
            "train_images": (1, 1_000_000),
            "test_images": (1, 1_000_000),
            "image_size": (32, 4096),
            "seed": (0, 2**63 - 1),
            "num_classes": (16, len(GLYPHS)),
            "difficulty": (0, 1),
            "long_tail": (1, 1e6),
            "co_occurrence": (0, 1),
            "partial_keep": (0, 1),
            "num_workers": (0, MOST_WORKERS),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name}={value}: expected a number from {low} to {high}")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the category ids 1, 2, ..."""
        return tuple(GLYPHS)[: self.num_classes]

    @property
    def identity(self) -> dict[str, Any]:
        """What the files depend on."""
        options = asdict(self)
        del options["num_workers"]
        return {"generator": _GENERATOR, **options}


@dataclass(frozen=True)
class Scene:
    """One drawn image.

    Attributes:
        image: `[H, W, 3]` RGB.
        labels: `[n]` class indices of the objects that are at least 20 % visible, back to front.
        masks: `[n, H, W]`, True on the visible pixels of each.
    """

    image: UInt8[np.ndarray, "H W 3"]
    labels: Int64[np.ndarray, " n"]
    masks: Bool[np.ndarray, "n H W"]


def draw_scene(config: ScenesConfig, split: str, index: int) -> Scene:
    """Image `index` of a split, from nothing but the arguments: the same in any process and any order."""
    rng = np.random.default_rng(np.random.SeedSequence([config.seed, SPLITS.index(split), index]))
    size, difficulty = config.image_size, config.difficulty
    canvas = background(rng, size, split)
    for _ in range(rng.integers(1, 3 + round(4 * difficulty))):
        paint(rng, canvas, distractor(rng, size), split, difficulty)

    labels = draw_labels(rng, config, split)
    boxes, solid, visible = [], [], []
    for label in labels:
        length = rng.uniform(0.5, 0.85) - 0.3 * difficulty
        corner = _free_corner(rng, length, boxes)
        angle = rng.uniform(-_MAX_ANGLE, _MAX_ANGLE)
        alpha = glyph_coverage(config.classes[label], size, length * size, angle, corner)
        paint(rng, canvas, alpha, split, difficulty)
        mask = alpha >= 0.5
        visible = [earlier & ~mask for earlier in visible] + [mask]
        solid.append(mask)
    canvas += rng.normal(0, 0.06 * difficulty, canvas.shape).astype(np.float32)
    image = (canvas.clip(0, 1) * 255).round().astype(np.uint8)

    kept = [i for i in range(len(labels)) if visible[i].sum() >= _MIN_VISIBLE * solid[i].sum()]
    return Scene(image, np.array(labels)[kept], np.stack([visible[i] for i in kept]))


def draw_labels(rng: np.random.Generator, config: ScenesConfig, split: str) -> list[int]:
    """Classes of one image's objects, back to front."""
    ratio = config.long_tail if split == "train" else 1.0
    weights = ratio ** -np.linspace(0, 1, config.num_classes)
    count = rng.integers(1, 3 + round(4 * config.difficulty))
    labels: list[int] = []
    while len(labels) < count:
        label = int(rng.choice(config.num_classes, p=weights / weights.sum()))
        labels.append(label)
        partner = label ^ 1
        if rng.random() < config.co_occurrence and len(labels) < count and partner < config.num_classes:
            labels.append(partner)
    rng.shuffle(labels)
    return labels


def _free_corner(rng: np.random.Generator, length: float, boxes: list[np.ndarray]) -> Float[np.ndarray, "2"]:
    """Of a few random places, the one that overlaps the earlier objects least, so that hiding stays partial."""
    corners = rng.uniform(size=(12, 2))
    places = np.concatenate([corners * (1 - length), corners * (1 - length) + length], axis=1)
    overlap = np.zeros(len(places))
    for box in boxes:
        sides = np.minimum(places[:, 2:], box[2:]) - np.maximum(places[:, :2], box[:2])
        overlap += sides.clip(min=0).prod(axis=1)
    best = int(overlap.argmin())
    boxes.append(places[best])
    return corners[best]


def write_scenes(config: ScenesConfig, out: Path) -> None:
    """Write the train and test images and their COCO instances JSON into the folder `out`, whole or not at all.

        out/images/train/000000.jpg ...          out/images/test/000000.jpg ...
        out/annotations/instances_train.json     every object
        out/annotations/instances_train_single.json    the largest object of each image, by visible pixels
        out/annotations/instances_train_partial.json   each present class kept with probability `partial_keep`; the
            others lose their objects and are listed in the image's `unknown_category_ids` (an extension of the format)
        out/annotations/instances_test.json      every object
        out/scenes.json                          the options that made the set

    A folder that holds the set of the very same options is left as it is.

    Raises:
        InputError: `out` holds anything else.
    """
    out = Path(out)
    if _already_written(config, out):
        print(f"{out}: holds this very set of scenes already; left as it is")
        return
    with whole_folder(out) as folder:
        _write_all(config, folder)


def _already_written(config: ScenesConfig, out: Path) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / _IDENTITY_FILE).read_text(encoding="utf-8"))
        differing = [key for key, value in config.identity.items() if found.get(key) != value]
    except (OSError, ValueError, AttributeError):
        raise InputError(f"{out} holds something else than a set of scenes: expected a new or empty folder") from None
    if differing:
        raise InputError(
            f"{out} holds scenes of other options ({', '.join(differing)}): expected a new or empty folder"
        )
    return True


def _write_all(config: ScenesConfig, folder: Path) -> None:
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", config.train_images), ("test", config.test_images)):
        (folder / "images" / split).mkdir(parents=True)
        objects = _write_images(config, split, count, folder / "images")
        _write_instances(config, folder, split, split, objects)
        if split == "train":
            largest = [[max(some, key=lambda each: each["area"])] for some in objects]
            _write_instances(config, folder, "train_single", split, largest)
            kept, unknown = zip(*(_keep_some(config, i, some) for i, some in enumerate(objects)), strict=True)
            _write_instances(config, folder, "train_partial", split, kept, unknown)
    with whole_file(folder / _IDENTITY_FILE) as file:
        file.write(json.dumps(config.identity, indent=1) + "\n")


def _write_images(config: ScenesConfig, split: str, count: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Write the JPEGs of a split; returns the annotations of each image."""
    work = partial(_write_image, config, split, folder)
    with ExitStack() as stack:
        drawn: Iterator[list[dict[str, Any]]] = map(work, range(count))
        if config.num_workers:
            pool = ProcessPoolExecutor(config.num_workers, initializer=_start_worker)
            stack.callback(pool.shutdown, cancel_futures=True)
            drawn = pool.map(work, range(count), chunksize=16)
        objects = list(track(drawn, count, f"scenes {split}"))
    for i, each in enumerate(chain.from_iterable(objects)):
        each["id"] = i + 1  # 0 reads as "no match" in pycocotools
    return objects


def _start_worker() -> None:
    """Ctrl-C is for the main process. A killed one ends nobody: its workers would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _write_image(config: ScenesConfig, split: str, folder: Path, index: int) -> list[dict[str, Any]]:
    scene = draw_scene(config, split, index)
    Image.fromarray(scene.image).save(folder / _file_name(split, index), quality=90)
    return [_annotation(index, label, mask) for label, mask in zip(scene.labels.tolist(), scene.masks, strict=True)]


def _file_name(split: str, index: int) -> str:
    return f"{split}/{index:06d}.jpg"


def _annotation(index: int, label: int, mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
    """One object in COCO's form, its id left for later; everything describes the visible pixels."""
    rows, columns = np.nonzero(mask.any(axis=1))[0].tolist(), np.nonzero(mask.any(axis=0))[0].tolist()
    return {
        "id": None,
        "image_id": index + 1,
        "category_id": label + 1,
        "bbox": [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": mask_polygons(mask),
    }


def _keep_some(
    config: ScenesConfig, index: int, objects: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects whose class is kept in the partial labels of a training image, and the ids of the other classes."""
    # One number per class: what a low probability keeps, a higher one keeps too.
    rng = np.random.default_rng(np.random.SeedSequence([config.seed, len(SPLITS), index]))
    known = rng.random(config.num_classes) < config.partial_keep
    kept = [each for each in objects if known[each["category_id"] - 1]]
    return kept, sorted({each["category_id"] for each in objects if not known[each["category_id"] - 1]})


def _write_instances(
    config: ScenesConfig,
    folder: Path,
    name: str,
    split: str,
    objects: Sequence[list[dict[str, Any]]],
    unknown: Sequence[list[int]] | None = None,
) -> None:
    images = []
    for i in range(len(objects)):
        side = config.image_size
        images.append({"id": i + 1, "file_name": _file_name(split, i), "width": side, "height": side})
        if unknown is not None:
            images[-1]["unknown_category_ids"] = unknown[i]
    content = {
        "info": {"description": _DESCRIPTIONS[name], "version": str(_GENERATOR), "options": config.identity},
        "licenses": [],
        "images": images,
        "annotations": list(chain.from_iterable(objects)),
        "categories": [{"id": i + 1, "name": c, "supercategory": "glyph"} for i, c in enumerate(config.classes)],
    }
    with whole_file(folder / "annotations" / f"instances_{name}.json") as file:
        file.write(json.dumps(content, separators=(",", ":")))
