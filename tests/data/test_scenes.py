import errno
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score, roc_auc_score

from mlvision import files
from mlvision.data.scenes import generator
from mlvision.data.scenes.drawing import GLYPHS, background, glyph_coverage, mask_polygons, paint
from mlvision.data.scenes.generator import ScenesConfig, draw_labels, draw_scene, write_scenes
from mlvision.errors import InputError

CONFIG = ScenesConfig(train_images=400, test_images=200, image_size=64, seed=3, partial_keep=0.3)
LITTLE = ScenesConfig(train_images=20, test_images=6, image_size=48, num_workers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(CONFIG, out)
    return out


def read(folder: Path, name: str) -> COCO:
    return COCO(folder / "annotations" / f"instances_{name}.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def decode(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


# The shapes


def test_every_class_is_a_symbol_of_the_font():
    font = FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")))
    missing = [name for name, symbol in GLYPHS.items() if ord(symbol) not in font.get_charmap()]
    assert len(GLYPHS) >= 20
    assert not missing


def test_no_two_classes_look_alike():
    """At one size and place, as they are and mirrored as augmentation does."""
    shapes = {name: glyph_coverage(name, 96, 90.0, 0.0, np.array([0.5, 0.5])) >= 0.5 for name in GLYPHS}
    for (one, a), (other, b) in combinations(shapes.items(), 2):
        for turned in (b, b[:, ::-1]):
            assert (a & turned).sum() / (a | turned).sum() < 0.65, (one, other)


def test_glyph_fills_its_box_and_keeps_its_holes():
    ink = glyph_coverage("gear", 100, 60.0, 0.0, np.array([0.0, 1.0])) >= 0.5
    rows, columns = np.nonzero(ink)
    assert (columns.min(), rows.max()) == (0, 99)  # the lower left corner
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(60, abs=1)
    polygons = mask_polygons(ink)
    assert len(polygons) == 2  # the cogs, and the hub in the hole within them
    np.testing.assert_array_equal(decode(polygons, 100, 100), ink)


def test_a_hole_is_cut_open_from_the_contour_around_it():
    mask = np.zeros((6, 9), dtype=bool)
    mask[1:5, 2:7] = True
    mask[2:4, 3:6] = False
    (polygon,) = mask_polygons(mask)
    x, y = np.array(polygon).reshape(-1, 2).T
    # Half way between the pixels' centres: each ring is its rectangle less its four corner triangles of 1/8, and of
    # the cut there and back nothing remains.
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    assert area == (4 * 5 - 4 / 8) - (2 * 3 - 4 / 8)
    np.testing.assert_array_equal(decode([polygon], 6, 9), mask)


def test_any_mask_comes_back_from_its_polygons():
    """Noise has everything: holes, islands in holes, single pixels, corners that touch, the image's edge."""
    rng = np.random.default_rng(0)
    for density in (0.2, 0.5, 0.8):
        for _ in range(30):
            mask = rng.random((13, 22)) < density
            np.testing.assert_array_equal(decode(mask_polygons(mask), 13, 22), mask)


# The annotations


def test_folder_is_what_coco_readers_expect(folder):
    for split, count in (("train", CONFIG.train_images), ("test", CONFIG.test_images)):
        coco = read(folder, split)
        assert set(coco.dataset) == {"info", "licenses", "images", "annotations", "categories"}
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(GLYPHS)[:20]
        assert len(coco.imgs) == count
        assert len(coco.anns) == len(coco.dataset["annotations"])  # ids differ
        assert all(coco.imgToAnns[i] for i in coco.imgs)
        assert sorted(p.name for p in (folder / "images" / split).iterdir()) == [f"{i:06d}.jpg" for i in range(count)]
        for image in coco.dataset["images"][:20]:
            with Image.open(folder / "images" / image["file_name"]) as file:
                assert (file.format, file.mode, file.size) == ("JPEG", "RGB", (image["width"], image["height"]))


def test_polygons_boxes_and_area_describe_the_visible_pixels(folder):
    coco = read(folder, "train")
    for index in range(120):
        scene = draw_scene(CONFIG, "train", index)
        annotations = coco.imgToAnns[coco.dataset["images"][index]["id"]]
        assert [each["category_id"] - 1 for each in annotations] == scene.labels.tolist()
        for each, mask in zip(annotations, scene.masks, strict=True):
            outlined = coco.annToMask(each).astype(bool)
            assert (outlined & mask).sum() / (outlined | mask).sum() >= 0.99
            rows, columns = np.nonzero(mask)
            tight = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert each["bbox"] == tight
            assert each["area"] == mask.sum()
        assert scene.masks.sum(axis=0).max() <= 1  # a pixel shows one object


@pytest.fixture
def drawn(monkeypatch) -> list[np.ndarray]:
    """Fills with the coverage `[H, W]` of each object that `draw_scene` draws, back to front."""
    drawn, draw = [], generator.glyph_coverage
    monkeypatch.setattr(generator, "glyph_coverage", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    return drawn


@pytest.mark.parametrize("stacked", [False, True])
def test_objects_mostly_hidden_are_drawn_but_not_annotated(drawn, monkeypatch, stacked):
    if stacked:  # all of them in the middle of the image
        monkeypatch.setattr(generator, "_free_corner", lambda *_: np.array([0.5, 0.5]))
    all_shares = []
    for index in range(150):
        drawn.clear()
        scene = draw_scene(ScenesConfig(image_size=64), "train", index)
        shares = []
        for i, alpha in enumerate(drawn):
            hidden = np.any([later >= 0.5 for later in drawn[i + 1 :]], axis=0)
            shares.append(((alpha >= 0.5) & ~hidden).sum() / (alpha >= 0.5).sum())
        assert len(scene.labels) == sum(share >= 0.2 for share in shares)
        all_shares += shares
    partly = np.mean([0.2 <= share < 0.9 for share in all_shares])
    assert partly > 0.2
    assert not stacked or np.mean(np.array(all_shares) < 0.2) > 0.05


def test_objects_have_the_stated_size_and_stand_off_what_surrounds_them(drawn):
    sides, contrasts, counts = [], [], []
    for index in range(150):
        drawn.clear()
        image = draw_scene(ScenesConfig(), "test", index).image @ np.array([0.299, 0.587, 0.114])
        counts.append(len(drawn))
        for alpha in drawn:
            rows, columns = np.nonzero(alpha >= 0.5)
            sides.append(max(np.ptp(rows), np.ptp(columns)) + 1)
        top = drawn[-1]  # nothing covers it
        rows, columns = np.nonzero(top)
        box = np.zeros_like(top, dtype=bool)
        box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        contrasts.append(abs(image[top == 1].mean() - image[box & (top == 0)].mean()))
    assert set(counts) == {1, 2, 3, 4}
    assert 0.35 * 96 - 2 <= min(sides) < 0.4 * 96
    assert 0.65 * 96 < max(sides) <= 0.7 * 96 + 1
    assert np.quantile(contrasts, 0.05) > 50  # grey levels of 255


def test_single_keeps_the_largest_object(folder):
    full, single = read(folder, "train"), read(folder, "train_single")
    assert single.imgs == full.imgs
    for image in full.imgs:
        (kept,) = single.imgToAnns[image]
        assert kept in full.imgToAnns[image]
        assert kept["area"] == max(each["area"] for each in full.imgToAnns[image])


def test_partial_keeps_or_drops_whole_classes(folder):
    full, some = read(folder, "train"), read(folder, "train_partial")
    kept, total = 0, 0
    for image, record in some.imgs.items():
        unknown = record["unknown_category_ids"]
        present = {each["category_id"] for each in full.imgToAnns[image]}
        assert unknown == sorted(set(unknown))
        assert set(unknown) <= present
        expected = [each for each in full.imgToAnns[image] if each["category_id"] not in unknown]
        assert some.imgToAnns[image] == expected
        kept, total = kept + len(present) - len(unknown), total + len(present)
    assert kept / total == pytest.approx(CONFIG.partial_keep, abs=0.05)  # 3 standard deviations
    assert not any("unknown_category_ids" in record for record in full.imgs.values())


# What the options do


def test_files_do_not_depend_on_the_number_of_workers(tmp_path):
    for workers in (0, 1, 3):
        write_scenes(
            ScenesConfig(train_images=20, test_images=10, image_size=48, num_workers=workers), tmp_path / f"{workers}"
        )
    expected = contents(tmp_path / "0")
    assert len(expected) == 20 + 10 + 4 + 1
    assert contents(tmp_path / "1") == expected
    assert contents(tmp_path / "3") == expected


def test_seed_split_and_index_each_change_the_image():
    seen = {
        draw_scene(ScenesConfig(image_size=32, seed=seed), split, index).image.tobytes()
        for seed in range(3)
        for split in ("train", "test")
        for index in range(5)
    }
    assert len(seen) == 3 * 2 * 5


@pytest.mark.parametrize(("what", "at_least"), [("background", 0.7), ("texture", 0.85)])
def test_backgrounds_and_textures_of_the_splits_are_of_other_families(what, at_least):
    """A forest tells the splits apart by how the power spectrum is shared out, which knows no colours and no places."""
    features, is_test = [], np.tile([False, True], 300)
    for i, test in enumerate(is_test):
        rng, split = np.random.default_rng(i), "test" if test else "train"
        canvas = background(rng, 64, split) if what == "background" else np.full((64, 64, 3), 0.5, dtype=np.float32)
        if what == "texture":
            paint(rng, canvas, np.ones((64, 64), dtype=np.float32), split, 0.5)
        power = np.abs(np.fft.rfft2(canvas.mean(axis=2) - canvas.mean()))
        power /= power.sum() + 1e-9
        features.append(np.concatenate([np.sort(power.ravel())[-60:], power[:6, :6].ravel()]))
    forest = RandomForestClassifier(100, random_state=0).fit(features[:300], is_test[:300])
    assert roc_auc_score(is_test[300:], forest.predict_proba(features[300:])[:, 1]) > at_least


def label_counts(config: ScenesConfig, split: str, images: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """How often each class is drawn, and in how many images each two classes meet."""
    rng = np.random.default_rng(0)
    counts, present = np.zeros(config.num_classes), np.zeros((images, config.num_classes))
    for row in present:
        labels = draw_labels(rng, config, split)
        np.add.at(counts, labels, 1)
        row[labels] = 1
    return counts, present.T @ present


def test_long_tail_is_of_the_stated_ratio_and_in_training_only():
    config = ScenesConfig(num_classes=16, long_tail=10.0)
    counts, _ = label_counts(config, "train")
    slope = np.polyfit(np.arange(16), np.log(counts), 1)[0]
    assert np.exp(-15 * slope) == pytest.approx(10, rel=0.15)
    balanced, _ = label_counts(config, "test")
    assert balanced.max() / balanced.min() < 1.35


@pytest.mark.parametrize("split", ["train", "test"])
def test_co_occurrence_plants_the_documented_pairs(split):
    """Probability that a class's partner is in its image, against that of any other class."""
    met = {}
    for strength in (0.0, 0.4, 0.8):
        _, together = label_counts(ScenesConfig(num_classes=17, co_occurrence=strength), split)
        given = together / np.diag(together)[:, None]
        met[strength] = np.mean([given[c, c ^ 1] for c in range(16)])
        others = np.mean([given[a, b] for a in range(17) for b in range(17) if b not in (a, a ^ 1)])
        if strength == 0:
            assert met[strength] == pytest.approx(others, rel=0.1)
    assert met[0.0] + 0.15 < met[0.4] < met[0.8] - 0.15


def test_difficulty_means_smaller_more_and_noisier():
    smaller, more, noisier = [], [], []
    for difficulty in (0.0, 0.5, 1.0):
        config = ScenesConfig(difficulty=difficulty, image_size=64)
        drawn = [draw_scene(config, "train", index) for index in range(60)]
        smaller.append(-np.mean([scene.masks[-1].sum() for scene in drawn]))  # the last drawn is in full view
        more.append(np.mean([len(scene.labels) for scene in drawn]))
        steps = [np.median(np.abs(np.diff(scene.image.astype(int), axis=1))) for scene in drawn]
        noisier.append(np.mean(steps))
    for low, middle, high in (smaller, more, noisier):
        assert low < middle < high


def test_colours_do_not_give_the_classes_away(folder):
    """A linear model on joint colour histograms, 8 x 8 x 8."""

    def load(name: str) -> tuple[np.ndarray, np.ndarray]:
        coco = read(folder, name)
        histograms, targets = np.zeros((len(coco.imgs), 512)), np.zeros((len(coco.imgs), 20), dtype=bool)
        for row, (i, image) in enumerate(coco.imgs.items()):
            pixels = np.asarray(Image.open(folder / "images" / image["file_name"])).reshape(-1, 3).astype(int) // 32
            histograms[row] = np.bincount(pixels @ [64, 8, 1], minlength=512) / len(pixels)
            targets[row, [each["category_id"] - 1 for each in coco.imgToAnns[i]]] = True
        return np.sqrt(histograms), targets

    features, targets = load("train")
    test_features, test_targets = load("test")
    scores = Ridge(alpha=1.0).fit(features, targets).predict(test_features)
    assert average_precision_score(test_targets, scores, average="macro") < 0.35


# Bad input, and interruptions


@pytest.mark.parametrize(
    "options",
    [
        {"train_images": 0},
        {"image_size": 16},
        {"seed": -1},
        {"num_classes": 15},
        {"num_classes": len(GLYPHS) + 1},
        {"difficulty": 1.5},
        {"long_tail": 0.5},
        {"co_occurrence": float("nan")},
        {"partial_keep": -0.1},
        {"num_workers": -1},
    ],
)
def test_options_out_of_range_are_refused_by_name(options):
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=f"^{name}={value}: expected a number from"):
        ScenesConfig(**options)


def test_the_same_set_is_left_alone_and_anything_else_refused(tmp_path, capsys):
    out = tmp_path / "deep" / "set"
    write_scenes(LITTLE, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    capsys.readouterr()

    write_scenes(ScenesConfig(**{**vars(LITTLE), "num_workers": 2}), out)
    assert "left as it is" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"other options \(seed, difficulty\)"):
        write_scenes(ScenesConfig(**{**vars(LITTLE), "seed": 1, "difficulty": 0.6}), out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before

    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"mine")
    for target in (other, other / "holiday.jpg"):
        with pytest.raises(InputError, match="expected a new or empty folder"):
            write_scenes(LITTLE, target)
    assert contents(other) == {"holiday.jpg": b"mine"}

    empty = tmp_path / "empty"
    empty.mkdir()
    write_scenes(LITTLE, empty)
    assert contents(empty) == contents(out)


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(generator, "_write_instances", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_scenes(LITTLE, tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(raw, _):
        raw.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise raw.failure

    monkeypatch.setattr(files._Raw, "write", full_disk)
    with pytest.raises(InputError, match=r"annotations/instances_train.json: could not be written \(No space left"):
        write_scenes(LITTLE, tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_no_folder_that_looks_finished(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        process = multiprocessing.get_context("fork").Process(target=write_scenes, args=(LITTLE, tmp_path / "set"))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "set").exists()
    write_scenes(LITTLE, tmp_path / "set")
    assert len(read(tmp_path / "set", "train").imgs) == LITTLE.train_images
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # what the killed one had begun is gone


def test_workers_leave_with_a_killed_process(tmp_path, monkeypatch):
    reader, writer = os.pipe()

    def draw_slowly(*_):
        os.write(writer, b"x")
        time.sleep(250)

    monkeypatch.setattr(generator, "draw_scene", draw_slowly)
    child = os.fork()
    if child == 0:
        try:
            write_scenes(replace(LITTLE, num_workers=2), tmp_path / "set")
        finally:
            os._exit(1)
    os.close(writer)
    os.read(reader, 1)  # a worker is at work
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while os.read(reader, 1):  # the pipe ends with the last process that holds it
        pass
    os.close(reader)
