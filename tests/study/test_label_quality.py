"""Judgements of stores made by hand over the images of `scenes_root`, whose boxes say what the right maps are."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import calibration_reference, label_maps_reference, localisation_reference
from sklearn.metrics import average_precision_score

from mlvision import load_run
from mlvision.commands import train as train_script
from mlvision.data import Record, build_manifest
from mlvision.data.images import read_record
from mlvision.data.loader import ImageDataset
from mlvision.data.manifest import carve_validation
from mlvision.data.views import EvalView, TrainView, ViewConfig
from mlvision.errors import InputError
from mlvision.label_maps.annotate import annotate, top_k_of
from mlvision.label_maps.oracle import batch_oracle_maps, oracle_map, oracle_targets
from mlvision.label_maps.store import LabelMapStore, LabelMapWriter, StoreMeta
from mlvision.models.dense import AveragedTeacher, build_teacher
from mlvision.study import label_quality
from mlvision.study.label_quality import LabelQualityConfig, judge_label_maps
from mlvision.study.quality_tables import entropies, unit
from mlvision.types import CropBox

GRID = (12, 16)


@pytest.fixture(scope="module")
def config():
    return LabelQualityConfig(crops=2, num_workers=0, view=ViewConfig(scale=(0.2, 1.0)))


@pytest.fixture(scope="module")
def manifest(scenes_root):
    return carve_validation(build_manifest("coco", root=str(scenes_root), images="images", split="train"), 0.1, 0)[0]


def judge(path, manifest, config, judged_by=None, teacher=None):
    """What the report's JSON would hold: NaN as None."""
    quality = judge_label_maps(LabelMapStore.open(path), manifest, judged_by or manifest, config, teacher)
    return json.loads(json.dumps(quality), parse_constant=lambda name: None if name == "NaN" else pytest.fail(name))


def make_store(path, manifest, maps, **changes):
    """A store of dense maps `[N, C, h, w]`."""
    default = {"kind": "probability", "groups": (), "top_k": 0, "block_size": 32, "teacher": "by hand"}
    names = {"record_hash": manifest.hash, "num_records": len(manifest), "class_hash": manifest.class_hash}
    shape = {"num_classes": maps.shape[1], "grid": tuple(maps.shape[2:]), "teacher_hash": "00"}
    meta = StoreMeta(**default | names | shape | changes)
    writer = LabelMapWriter.create_or_resume(path, meta)
    maps = torch.from_numpy(maps).float()
    for block in writer.outstanding():
        part = maps[block.start : block.stop]
        writer.write(block, *(top_k_of(part, meta.top_k, meta.kind, meta.groups) if meta.top_k else (part,)))
    return path


def box_maps(manifest, grid=GRID):
    """1 in the cells whose centre is in a box of the label, else 0; every box must hold a centre."""
    maps = np.zeros((len(manifest), len(manifest.classes), *grid))
    y, x = ((np.arange(n) + 0.5) / n for n in grid)
    for i, record in enumerate(manifest.records):
        for (x1, y1, x2, y2), label in zip(record.boxes.xyxy, record.boxes.labels, strict=True):
            inside = np.outer((y1 <= y) & (y <= y2), (x1 <= x) & (x <= x2))
            assert inside.any()
            maps[i, label][inside] = 1
    return maps


def test_maps_of_the_boxes_are_perfect(manifest, config, tmp_path):
    store = make_store(tmp_path / "maps", manifest, box_maps(manifest))
    quality = judge(store, manifest, config)
    assert quality["num_images"] == len(manifest) == 86
    assert sum(part["labels"] for part in quality["object_sizes"]) == sum(
        len(set(r.boxes.labels)) for r in manifest.records
    )
    assert [part["mAP"] for part in quality["object_sizes"]] == 3 * [{"mean_probability": 1.0, "max": 1.0}]
    for operator in ("mean_probability", "max"):
        assert quality["agreement"][operator] == {
            "top1": 1.0,
            "top1_images": 86,
            "mAP": 1.0,
            "mAP_classes": 20,
            "mAP_classes_without_positives": 0,
        }
    assert set(quality["agreement"]) == {"mean_probability", "max"}  # probabilities have no mean logit
    assert quality["calibration"]["ece"] == 0
    found = quality["localisation"]
    assert found["pointing_game"] == 1
    assert found["pairs"] == sum(len(set(r.boxes.labels.tolist())) for r in manifest.records)
    assert found["pairs_between_the_cells_centres"] == found["pairs_without_area_or_mass"] == 0
    assert found["mass_in_box"] > 0.85  # cells at the rim stick out of their boxes
    assert found["lift"] > 3
    assert found["lift"] == pytest.approx(found["mass_in_box"] / found["mass_in_box_chance"])
    assert all(
        row["pointing_game"] == row["highest_with"] == 1 > row["highest_without"] == 0 for row in quality["classes"]
    )


def half_present_everywhere(manifest):
    """What a teacher with a bias of 0 says: objects are seen as nothing, every class is half-present around them."""
    maps = np.full((len(manifest), len(manifest.classes), *GRID), -4.0)
    for i, record in enumerate(manifest.records):
        covered = np.zeros(GRID, dtype=bool)
        y, x = ((np.arange(n) + 0.5) / n for n in GRID)
        for x1, y1, x2, y2 in record.boxes.xyxy:
            covered |= np.outer((y1 <= y) & (y <= y2), (x1 <= x) & (x <= x2))
        maps[i, :, ~covered] = 0
        maps[i, record.boxes.labels[0], covered] = 3
    return maps


@pytest.mark.parametrize("top_k", [0, 3])
def test_maps_whose_background_is_half_of_everything_are_not_to_be_trained_on(manifest, config, tmp_path, top_k):
    maps = half_present_everywhere(manifest)
    options = {"kind": "logit", "top_k": top_k}
    quality = judge(make_store(tmp_path / "bad", manifest, maps, **options), manifest, config)
    assert quality["background"]["expected_labels"] == pytest.approx(0.5 * len(manifest.classes), rel=1e-3)
    assert quality["background"]["labels"] == pytest.approx(np.nansum(manifest.targets) / len(manifest), rel=1e-6)
    assert [fault.split(":")[0] for fault in quality["verdict"]] == [
        f"the emptiest cell of an image expects {0.5 * len(manifest.classes):.2f} labels, an image has "
        f"{quality['background']['labels']:.2f}",
        "maps are worse than chance at place",
    ]
    share = np.nanmean(manifest.targets, axis=0).clip(0.01, 0.99)
    maps = np.where(maps == 0, np.log(share / (1 - share))[:, None, None], maps)
    quality = judge(make_store(tmp_path / "good", manifest, maps, **options), manifest, config)
    assert not any("emptiest" in fault for fault in quality["verdict"])
    assert quality["background"]["expected_labels"] == pytest.approx(quality["background"]["labels"], rel=0.1)


def test_maps_of_other_labels_score_chance(manifest, config, tmp_path):
    perfect = box_maps(manifest)
    of_labels = perfect[perfect.any(axis=(2, 3))]
    noise = np.random.default_rng(0)
    maps = of_labels[noise.integers(0, len(of_labels), perfect.shape[:2])]
    for one in maps.reshape(-1, *GRID):  # to any place: objects prefer the middle, which would beat chance
        one[:] = np.roll(one, noise.integers(0, GRID), axis=(0, 1))
    store = make_store(tmp_path / "maps", manifest, maps)
    quality = judge(store, manifest, config)
    # Each map reaches 1, so all images tie, and precision at the only rank is the share of images with the label.
    assert quality["agreement"]["max"]["mAP"] == pytest.approx(np.mean(manifest.targets), rel=1e-6)
    assert quality["agreement"]["mean_probability"]["mAP"] < 0.35
    found = quality["localisation"]
    assert found["pointing_game"] == pytest.approx(found["pointing_game_chance"], abs=0.06)
    assert found["lift"] == pytest.approx(1, abs=0.15)
    assert quality["calibration"]["ece"] == pytest.approx(1 - np.mean(manifest.targets), rel=1e-6)


def noisy_maps(manifest, grid=(5, 7)):
    rng = np.random.default_rng(1)
    return rng.normal(-3, 1.5, (len(manifest), len(manifest.classes), *grid)) + 4 * box_maps(
        manifest, (20, 28)
    ).reshape(len(manifest), -1, grid[0], 4, grid[1], 4).mean(axis=(3, 5))


def activated(logits, activation):
    logits = logits.astype(np.float64)
    if activation == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(axis=0))
    return powers / powers.sum(axis=0)


def groups_of(activation, num_classes):
    return (num_classes,) if activation == "softmax" else ()


def nan_or(value):
    return None if math.isnan(value) else pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_numbers_are_those_of_independent_computation(activation, manifest, config, tmp_path):
    num_classes = len(manifest.classes)
    store = make_store(
        tmp_path / "maps",
        manifest,
        noisy_maps(manifest),
        kind="logit",
        groups=groups_of(activation, num_classes),
        top_k=3,
    )
    quality = judge(store, manifest, config)
    values, ids, fill = (np.load(store / f"{name}.npy") for name in ("values", "ids", "fill"))
    logits = [label_maps_reference.dense_map(*row, num_classes) for row in zip(values, ids, fill, strict=True)]
    cells = [activated(one, activation) for one in logits]

    def pooled(row, box):
        whole = {
            "mean_logit": activated(label_maps_reference.pool(logits[row], box, "mean_logit")[:, 0, 0], activation)
        }
        for operator in ("mean_probability", "max"):
            whole[operator] = label_maps_reference.pool(cells[row], box, operator)[:, 0, 0]
        return whole

    # Whole images
    targets = manifest.targets
    whole = [pooled(row, (0, 0, 1, 1)) for row in range(len(manifest))]
    for operator, found in quality["agreement"].items():
        scores = np.stack([one[operator] for one in whole])
        assert found["mAP"] == pytest.approx(
            np.mean([average_precision_score(t, s) for t, s in zip(targets.T, scores.T, strict=True)])
        )
        assert found["top1"] == pytest.approx(targets[np.arange(len(scores)), scores.argmax(1)].mean())
    highest = np.stack([one["max"] for one in whole])
    expected = calibration_reference.expected_calibration_error(highest, targets, 15)
    assert quality["calibration"]["ece"] == pytest.approx(expected, rel=1e-4)
    assert quality["calibration"]["entries"] == targets.size
    assert [b["count"] for b in quality["calibration"]["bins"]] == [
        row[2] for row in calibration_reference.reliability(highest, targets, 15)
    ]

    # Crops
    entropies, areas, shown, scores = [], [], [], []
    for row, record in enumerate(manifest.records):
        annotated = batch_oracle_maps([oracle_map(*vars_of(record), num_classes, (32, 32))])
        for box in label_quality.crop_boxes(record, row, config):
            p = pooled(row, tuple(box.tolist()))
            areas.append((box[2] - box[0]) * (box[3] - box[1]))
            q = p["mean_logit"]
            spread = -q * np.log(q) if activation == "softmax" else -q * np.log(q) - (1 - q) * np.log1p(-q)
            entropies.append(spread.sum() if activation == "softmax" else spread.mean())
            scores.append(p["max"])
            shown.append(
                oracle_targets(*annotated, CropBox(torch.from_numpy(box[None])), num_classes, tau=0.25)[0].numpy()
            )
    areas, scores, shown = np.array(areas), np.stack(scores), np.stack(shown)
    assert quality["crops"]["shown_unknown"] == np.isnan(shown).sum() > 0
    for part in quality["crops"]["bins"]:
        low, high = part["area"]
        chosen = (areas >= low) & (areas < high)
        assert part["crops"] == chosen.sum() > 0
        assert part["entropy"] == pytest.approx(np.array(entropies)[chosen].mean(), rel=1e-4)
        ap = []
        for s, t in zip(scores[chosen].T, shown[chosen].T, strict=True):
            known = ~np.isnan(t)
            if (t == 1).any():
                ap.append(average_precision_score(t[known], s[known]))
        assert part["max"]["mAP_shown"] == pytest.approx(np.mean(ap), rel=1e-5)
        assert part["max"]["mAP_classes_shown"] == len(ap)
    assert sum(part["crops"] for part in quality["crops"]["bins"]) == len(areas) == 2 * 86

    # Classes
    for c, found in enumerate(quality["classes"]):
        has = targets[:, c] == 1
        assert found["class"] == manifest.classes[c]
        assert (found["images_with"], found["images_without"]) == (has.sum(), (~has).sum())
        assert found["stored"] == nan_or((ids[has] == c).any(axis=(1, 2, 3)).mean())
        assert found["highest_with"] == nan_or(highest[has, c].mean())
        assert found["highest_without"] == nan_or(highest[~has, c].mean())
        boxes = [r.boxes.xyxy[r.boxes.labels == c] for r in manifest.records]
        rows = [row for row in range(len(boxes)) if len(boxes[row])]
        hits = [localisation_reference.pointing_game(cells[r][c].astype(np.float32).tolist(), boxes[r]) for r in rows]
        masses = np.array([localisation_reference.mass_in_box(cells[r][c].tolist(), boxes[r]) for r in rows])
        assert found["pointing_game"] == nan_or(np.mean(hits))
        assert (found["mass_in_box"], found["mass_in_box_chance"]) == tuple(map(nan_or, masses.mean(axis=0)))
        assert found["lift"] == nan_or(masses[:, 0].mean() / masses[:, 1].mean())
    means = [found["pointing_game"] for found in quality["classes"]]
    assert quality["localisation"]["pointing_game"] == pytest.approx(np.mean(means))


def vars_of(record):
    boxes = record.boxes
    return boxes.xyxy, boxes.labels, boxes.crowd, boxes.segmentation


def test_unknown_labels_judge_nothing(manifest, config, scenes_root, tmp_path):
    store = make_store(tmp_path / "maps", manifest, box_maps(manifest))
    partial = build_manifest("coco", root=str(scenes_root), images="images", split="train_partial", protocol="all")
    place = {record.key: row for row, record in enumerate(partial.records)}
    judged_by = partial.select(place[record.key] for record in manifest.records)
    quality = judge(store, manifest, config, judged_by)
    assert np.isnan(judged_by.targets).any()
    assert (quality["split"], quality["labels_split"]) == ("train", "train_partial")
    assert quality["calibration"]["entries"] == (~np.isnan(judged_by.targets)).sum()
    assert quality["agreement"]["max"]["mAP"] == 1
    known = (judged_by.targets == 1).any(axis=1)
    assert quality["agreement"]["max"]["top1_images"] <= known.sum() < 86
    assert quality["agreement"]["max"]["top1"] == 1
    # As many images as one of them has no class of most: what is undefined is NaN, and counted.
    quality = judge(store, manifest, replace(config, images=1))
    absent = [row for row in quality["classes"] if not row["images_with"]]
    assert absent
    assert all(row["stored"] is row["highest_with"] is row["pointing_game"] is row["lift"] is None for row in absent)
    assert quality["agreement"]["max"]["mAP_classes_without_positives"] == len(absent)


def test_of_oracle_maps_the_crowd_half_is_not_judged(manifest, config, tmp_path):
    maps = box_maps(manifest)
    store = make_store(tmp_path / "maps", manifest, np.concatenate([maps, 1 - maps], axis=1))
    quality = judge(store, manifest, config)
    assert quality["agreement"]["max"]["mAP"] == quality["localisation"]["pointing_game"] == 1
    assert len(quality["classes"]) == len(manifest.classes)


def test_without_boxes_the_labels_alone_judge(manifest, config, tmp_path):
    store = make_store(tmp_path / "maps", manifest, box_maps(manifest))
    bare = replace(manifest, records=tuple(replace(record, boxes=None) for record in manifest.records))
    quality = judge(store, bare, config)
    assert quality["agreement"]["max"]["mAP"] == 1
    assert quality["localisation"] is None
    assert quality["crops"]["all"]["max"]["top1_image"] > 0.5
    assert quality["crops"]["all"]["max"]["mAP_shown"] is None
    assert quality["crops"]["shown_unknown"] == 2 * manifest.targets.size


def test_stores_that_cannot_be_judged_are_refused(manifest, config, tmp_path):
    maps = box_maps(manifest, (12, 12))
    other = make_store(tmp_path / "other", manifest.select(range(10)), maps[:10])
    with pytest.raises(InputError, match=r"made for the record list .* of 10 images, but the data has .* of 86"):
        judge(other, manifest, config)
    classes = make_store(tmp_path / "classes", manifest, maps, class_hash="ff")
    with pytest.raises(InputError, match="made for the class list ff, but the data has"):
        judge(classes, manifest, config)
    plan = make_store(tmp_path / "plan", manifest, maps, kind="mass")
    with pytest.raises(InputError, match="maps of mass, the report judges logits and probabilities"):
        judge(plan, manifest, config)
    fewer = make_store(tmp_path / "fewer", manifest, maps[:, :7])
    with pytest.raises(InputError, match="maps of 7 classes, the data has 20"):
        judge(fewer, manifest, config)
    with pytest.raises(InputError, match="crops: expected 1 to 1000, got 0"):
        replace(config, crops=0)


# Crops


def crops_of(config, size, row=0, num=400):
    record = Record("a", "a", (), size=size)
    return label_quality.crop_boxes(record, row, replace(config, crops=num))


@pytest.mark.parametrize("size", [(100, 100), (200, 100), (90, 160)])
def test_crops_have_the_area_and_ratio_that_were_asked_for(size, config):
    view = replace(config.view, scale=(0.1, 0.6), ratio=(0.5, 1.25))
    boxes = crops_of(replace(config, view=view), size)
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    assert (width * height > 0.0999).all()
    assert (width * height < 0.6001).all()
    ratio = width * size[0] / (height * size[1])
    assert (ratio > 0.4999).all()
    assert (ratio < 1.2501).all()
    assert ratio.min() < 0.6 < 1.1 < ratio.max()


def test_a_crop_that_fits_nowhere_is_the_largest_in_the_middle(config):
    view = replace(config.view, scale=(1.0, 1.0), ratio=(2.0, 2.0))
    np.testing.assert_allclose(crops_of(replace(config, view=view), (100, 100), num=3), [[0, 0.25, 1, 0.75]] * 3)
    np.testing.assert_allclose(crops_of(replace(config, view=view), (400, 100), num=1), [[0.25, 0, 0.75, 1]])


def test_an_images_crops_are_its_own_and_the_same_each_time(config):
    first = crops_of(config, (80, 60), row=3)
    np.testing.assert_array_equal(first, crops_of(config, (80, 60), row=3))
    assert not np.isclose(first, crops_of(config, (80, 60), row=4)).all(axis=1).any()
    assert not np.isclose(first, crops_of(replace(config, seed=1), (80, 60), row=3)).all(axis=1).any()


# The teacher's own answers


@pytest.fixture(scope="module")
def teacher_store(scenes_root, manifest, tmp_path_factory):
    """The store of a trained run's dense maps, and the teacher that made them."""
    folder = tmp_path_factory.mktemp("quality")
    train_script.main(
        ["configs/smoke/scenes_test_resnet_baseline.yaml", f"data.root={scenes_root}", "device=cpu", "threads=1",
         "optim.epochs=1", "log.tensorboard=false", f"out={folder / 'run'}"]
    )  # fmt: skip
    run = load_run(folder / "run", device="cpu")
    teacher = build_teacher(run.method)
    store = LabelMapWriter.create_or_resume(
        folder / "maps",
        StoreMeta(manifest.hash, len(manifest), manifest.class_hash, 20, "run", "00", teacher.grid, "logit", (), 0, 43),
    )

    def images(rows):
        view = EvalView(teacher.image_size, teacher.preprocessing.interpolation, "squash")
        return torch.stack([view(read_record(manifest.records[row])).image for row in rows])

    annotate(teacher.maps, ((list(block), images(block)) for block in store.outstanding()), store)
    return folder / "maps", teacher


def test_kl_vanishes_where_the_crop_is_the_whole_image(teacher_store, manifest, config):
    whole = replace(config.view, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    store, teacher = teacher_store
    found = judge(store, manifest, replace(config, exact_images=9, view=whole), teacher=teacher)["exact"]
    assert found["images"] == 9
    assert found["unit"] == "nats a class"
    assert found["all"]["crops"] == 18
    assert 0 <= found["all"]["kl_pooled"] == found["all"]["kl_whole_image"] < 1e-5  # the store's float16


def test_kl_of_real_crops_matches_the_definition(teacher_store, manifest, config):
    store, teacher = teacher_store
    quality = judge(store, manifest, replace(config, exact_images=9), teacher=teacher)
    stored = np.load(store / "values.npy").astype(np.float64)
    view = replace(config.view, flip=0.0, interpolation=teacher.preprocessing.interpolation)
    view = TrainView(view, teacher.image_size)
    dataset = ImageDataset(manifest, view, seed=0, num_views=2)
    expected = []
    for row in sorted(np.random.default_rng(0).permutation(86)[:9].tolist()):
        for crop in dataset[0, row].views:
            with torch.no_grad():
                p = activated(teacher.logits(crop.image[None])[0].numpy(), "sigmoid")
            for box in (crop.box, (0, 0, 1, 1)):
                q = activated(label_maps_reference.pool(stored[row], box, "mean_logit")[:, 0, 0], "sigmoid")
                expected.append((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean())
    found = quality["exact"]
    assert found["all"]["crops"] == sum(part["crops"] for part in found["bins"]) == 18
    expected = np.reshape(expected, (18, 2)).mean(axis=0)
    assert (expected > 1e-8).all()
    assert [found["all"]["kl_pooled"], found["all"]["kl_whole_image"]] == pytest.approx(expected.tolist(), rel=1e-2)


def test_crops_are_answered_at_the_teachers_own_size(teacher_store, manifest, config, tmp_path):
    """Whatever scales made the maps: an enlarged crop would be asked about objects of twice the size."""
    _, teacher = teacher_store
    wide = AveragedTeacher([teacher], scales=[2.0])
    view = EvalView(wide.image_size, teacher.preprocessing.interpolation, "squash")
    images = torch.stack([view(read_record(record)).image for record in manifest.records])
    with torch.inference_mode():
        maps = torch.cat([wide.maps(part) for part in images.split(16)]).numpy()
    store = make_store(tmp_path / "maps", manifest, maps, kind="logit")
    given = []
    hook = teacher.register_forward_pre_hook(lambda _, inputs: given.append(tuple(inputs[0].shape[2:])))

    found = judge(store, manifest, replace(config, exact_images=9), teacher=wide)["exact"]

    hook.remove()
    assert found["image_size"] == list(teacher.image_size)
    assert given == [wide.image_size, teacher.image_size]  # some maps again, then the crops


def test_another_teacher_is_refused(teacher_store, manifest, config, tmp_path):
    store, teacher = teacher_store
    maps = LabelMapStore.open(store).read(range(len(manifest))).values.float().numpy()
    other = make_store(tmp_path / "maps", manifest, -maps, kind="logit")
    with pytest.raises(InputError, match=r"teacher: not the one that made these maps, 'by hand': .* differs by"):
        judge(other, manifest, config, teacher=teacher)
    probabilities = make_store(tmp_path / "probabilities", manifest, box_maps(manifest))
    with pytest.raises(InputError, match="teacher: .* holds probability, expected a teacher's logits"):
        judge(probabilities, manifest, config, teacher=teacher)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_divergence_matches_the_definition(activation):
    exact, pooled = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double() * 3
    p, q = (activated(x.numpy().T, activation).T for x in (exact, pooled))
    terms = p * np.log(p / q)
    if activation == "sigmoid":
        terms = (terms + (1 - p) * np.log((1 - p) / (1 - q))) / 7
    found = label_quality.divergence(exact, pooled, groups_of(activation, 7))
    np.testing.assert_allclose(found.numpy(), terms.sum(axis=1), rtol=1e-12)
    assert label_quality.divergence(exact, exact, groups_of(activation, 7)).abs().max() < 1e-15


def test_groups_of_classes_count_by_the_mean_of_their_distributions():
    """A group of three, one of two and a class for itself, each apart from the others."""
    exact, pooled = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).double() * 3
    parts = [
        label_quality.divergence(exact[:, columns], pooled[:, columns], groups)
        for columns, groups in ((slice(0, 3), (3,)), (slice(3, 5), (2,)), (slice(5, 6), ()))
    ]
    torch.testing.assert_close(label_quality.divergence(exact, pooled, (3, 2, 1)), torch.stack(parts).mean(0))
    p = torch.cat([exact[:, :3].softmax(1), exact[:, 3:5].softmax(1), exact[:, 5:].sigmoid()], 1)
    each = [-(p[:, a:b] * p[:, a:b].log()).sum(1) for a, b in ((0, 3), (3, 5))]
    each.append(-(p[:, 5] * p[:, 5].log() + (1 - p[:, 5]) * (1 - p[:, 5]).log()))
    np.testing.assert_allclose(entropies(p.numpy(), (3, 2, 1)), torch.stack(each).mean(0))
    assert [unit(groups) for groups in ((), (6,), (3, 2, 1))] == ["nats a class", "nats", "nats a group"]
