"""Every YAML of configs/ builds and takes one step at tiny size, and every trainable parameter learns from it."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import VocObject, write_bigearthnet_v2, write_nuswide, write_sen12ms, write_voc

from mlvision.config import Config
from mlvision.data import (
    DATASETS,
    BigEarthNetConfig,
    CocoConfig,
    CsvConfig,
    ImagenetConfig,
    MatrixConfig,
    NuswideConfig,
    Sen12msConfig,
    Vg500Config,
    VocConfig,
)
from mlvision.data.check import check_data, format_check, write_check
from mlvision.engine.optim import build_optimizer
from mlvision.label_maps.store import LabelMapWriter, StoreMeta
from mlvision.options import parse_options, to_plain
from mlvision.runs.build import build_run
from mlvision.runs.splits import read_training_manifests

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "grids" not in p.parts)
TINY = {"resnet": "test_resnet", "efficientnet": "test_efficientnet", "vit": "test_vit"}
# Parameters that the first step does not train, by head: the adapter's last layer starts at zero.
UNTRAINED: dict[str, set[str]] = {"text": {"classifier.head.adapter.0.weight", "classifier.head.adapter.0.bias"}}


def tiny_backbone(name: str) -> str:
    """timm's own test model of the same family."""
    return next((tiny for family, tiny in TINY.items() if family in name), name)


def make_data(config: Config, scenes_root: Path, root: Path) -> None:
    """A data set of a few images in the layout that the config expects, with its splits and label columns."""
    data = config.data
    splits = [s for s in (data.train, data.val, data.test) if s]
    photos = sorted((scenes_root / "images" / "train").iterdir())
    LAYOUTS[data.name](data, splits, photos, root)


def make_bigearthnet(data: BigEarthNetConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    several = (["Pastures", "Mixed forest"], ["Mixed forest"], ["Marine waters"])
    patches = [
        (f"S2A_MSIL2A_20170613T101031_T33UUP_{i}_57", several[i % 3], splits[i % len(splits)]) for i in range(24)
    ]
    assert data.version == "v2"
    write_bigearthnet_v2(root, patches, data.bands, texture=2000)


def make_sen12ms(data: Sen12msConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    for number, split in enumerate(splits):
        shares = [[float(c == 5 * (i % 3)) for c in range(17)] for i in range(24)]
        write_sen12ms(
            root, split, {f"ROIs1158_spring_s2_{number}_p{i}.tif": shares[i] for i in range(24)}, texture=9000
        )


def make_coco(data: CocoConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    scenes_root = photos[0].parents[2]
    for number, split in enumerate(splits):
        name = "instances_test.json" if number else "instances_train.json"
        annotations = root / data.annotations.format(split=split)
        annotations.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes_root / "annotations" / name, annotations)
        shutil.copytree(scenes_root / "images", root / data.images.format(split=split), dirs_exist_ok=True)


def make_csv(data: CsvConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    images = root / data.images
    images.mkdir(parents=True, exist_ok=True)
    names = [f"place{number:02d}.jpg" for number in range(80)]
    for name, path in zip(names, photos, strict=False):
        shutil.copy(path, images / name)
    with open(root / data.file, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([data.image_column, *data.ignore_columns, "sea", "sand", "trees"])
        writer.writerows(
            [n, *["-" for _ in data.ignore_columns], i % 2, int(i % 3 == 0), int(i % 5 > 1)]
            for i, n in enumerate(names)
        )


def make_nuswide(data: NuswideConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    images, order = {}, {}
    for split, chosen in shares(splits, photos):
        order[split] = list(range(len(images), len(images) + len(chosen)))
        images |= {f"sea\\{p.name}": (split, (i % 2, int(i % 3 == 0), 1)) for i, p in enumerate(chosen)}
    write_nuswide(root, ("airport", "animal", "beach"), images, order)
    for path in photos:
        shutil.copy(path, root / data.images / "sea")


def make_vg500(data: Vg500Config, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    labels = {path.name: [i % 3, 499] for i, path in enumerate(photos)}
    (root / data.labels).write_text(json.dumps(labels))
    (root / data.images[1]).mkdir()
    for split, chosen in shares(splits, photos):
        (root / data.lists.format(split=split)).write_text("".join(f"{path.name}\n" for path in chosen))
        for path in chosen:
            shutil.copy(path, root / data.images[1])


def make_voc(data: VocConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    for number, (split, chosen) in enumerate(shares(splits, photos)):
        objects = [
            VocObject("cat", (1, 1, 9, 20)),
            VocObject("dog", (5, 6, 30, 17)),
            VocObject("sofa", (2, 2, 9, 9), 1),
        ]
        images = {f"{number}{i:05d}": ((48, 48), objects[i % 3 :]) for i in range(len(chosen))}
        write_voc(root, {split: images})
        for image, path in zip(images, chosen, strict=True):
            shutil.copy(path, root / "JPEGImages" / f"{image}.jpg")


def make_imagenet(data: ImagenetConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    for split, chosen in shares(splits, photos):
        for i, path in enumerate(chosen):
            folder = root / data.images.format(split=split) / ("n01440764", "n01443537", "n02979186")[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"ILSVRC2012_{split}_{i + 1:08d}.JPEG")
    if data.real:
        (root / data.real).write_text(json.dumps([[0, i % 3][: i % 4] for i in range(len(photos))]))


def make_matrix(data: MatrixConfig, splits: Sequence[str], photos: Sequence[Path], root: Path) -> None:
    for split, chosen in shares(splits, photos):
        folder = root / f"{split}2014"
        folder.mkdir()
        rows = []
        for i, path in enumerate(chosen):
            shutil.copy(path, folder)
            rows.append(f"{split}2014/{path.name} {i % 2} {int(i % 3 == 0)} {int(i % 5 > 1)}\n")
        (root / data.labels.format(split=split)).write_text("".join(rows))


LAYOUTS: dict[str, Callable[[Any, Sequence[str], Sequence[Path], Path], None]] = {
    "bigearthnet": make_bigearthnet,
    "coco": make_coco,
    "csv": make_csv,
    "imagenet": make_imagenet,
    "matrix": make_matrix,
    "nuswide": make_nuswide,
    "sen12ms": make_sen12ms,
    "vg500": make_vg500,
    "voc": make_voc,
}


def shares(splits: Sequence[str], photos: Sequence[Path]) -> list[tuple[str, Sequence[Path]]]:
    """Equally many photos for each split."""
    num = len(photos) // len(splits)
    return [(split, photos[i * num : (i + 1) * num]) for i, split in enumerate(splits)]


def test_every_reader_has_a_config():
    read = {parse_options(Config, [str(path)], prog="train.py", description="").data.name for path in CONFIGS}
    assert read == set(DATASETS) == set(LAYOUTS)


@pytest.mark.parametrize("name", DATASETS)
def test_every_reader_can_be_checked_with_and_without_images(name, scenes_root, tmp_path):
    configs = (parse_options(Config, [str(path)], prog="train.py", description="") for path in CONFIGS)
    config = next(config for config in configs if config.data.name == name)
    make_data(config, scenes_root, tmp_path)
    data = dataclasses.replace(config.data, root=str(tmp_path))

    check, labels = check_data(data), check_data(data, labels_only=True)

    for split, checked in check.splits.items():
        assert checked.unreadable == ()
        assert all(checked.digests)
        assert labels.splits[split].class_counts["present"].sum() > 0
        assert f"{split}: {checked.manifest.protocol}" in format_check(labels)
    write_check(check, tmp_path / "out", samples=2, seed=0)
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def make_label_maps(arguments: list[str], folder: Path) -> None:
    """Random logits for the training images of a config."""
    config = parse_options(Config, arguments, prog="train.py", description="")
    manifest = read_training_manifests(config)[0]
    num_images, num_classes = len(manifest), len(manifest.classes)
    meta = StoreMeta(
        manifest.hash,
        num_images,
        manifest.class_hash,
        num_classes,
        "random",
        "",
        (3, 4),
        "logit",
        (num_classes,),
        0,
        num_images,
    )
    LabelMapWriter.create_or_resume(folder, meta).write(range(num_images), torch.randn(num_images, num_classes, 3, 4))


def cases():
    """Each config in the precision that it asks for; those for a GPU in both low precisions."""
    for path in CONFIGS:
        precision = parse_options(Config, [str(path)], prog="train.py", description="").precision
        for name in ("auto",) if precision == "auto" else ("bf16", "fp16"):
            yield pytest.param(path, name, id=f"{path.relative_to(ROOT / 'configs')}-{name}")


@pytest.mark.parametrize(("path", "precision"), cases())
def test_config_takes_a_step(path, precision, scenes_root, tmp_path, monkeypatch):
    monkeypatch.setattr("mlvision.engine.precision.cpu_has_bf16", lambda: True)
    config = parse_options(Config, [str(path)], prog="train.py", description="")
    make_data(config, scenes_root, tmp_path)
    arguments = [
        f"data.root={tmp_path}",
        "view.size=64",
        f"model.name={tiny_backbone(config.model.name)}",
        "model.pretrained=none",
        "device=cpu",
        f"precision={precision}",
        "loader.num_workers=0",
        "loader.batch_size=4",
    ]
    if config.head.name == "text" and config.head.text.encoder == "open_clip":  # weights of a hub
        arguments += [
            "head.text.encoder=learned",
            "head.text.model=",
            "head.text.weights=",
            "head.text.templates=['{}']",
        ]
    torch.manual_seed(0)
    if config.label_maps:
        make_label_maps([str(path), *arguments], tmp_path / "maps")
        arguments.append(f"label_maps={tmp_path}/maps")
    run = build_run(parse_options(Config, [str(path), *arguments], prog="train.py", description=""))
    optimizer = build_optimizer(run.method.parameter_groups(), run.config.optim)
    batch = next(iter(run.train_loader))
    for norm in run.method.modules():
        # timm starts the last norm of each residual branch at zero, and so the first gradients behind it.
        if isinstance(norm, torch.nn.BatchNorm2d) and not norm.weight.any():
            torch.nn.init.constant_(norm.weight, 0.5)
    before = {name: p.detach().clone() for name, p in run.method.named_parameters()}
    run.method.train()
    scaler = run.precision.scaler()
    for _ in range(6):  # an fp16 scaler starts high, and skips steps until its scale is low enough
        optimizer.zero_grad()
        with run.precision.autocast():
            loss = run.method(batch).loss
        assert loss.isfinite()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if all(p.grad is None or p.grad.isfinite().all() for p in run.method.parameters()):
            break
        scaler.step(optimizer)  # which the scaler skips
        scaler.update()
    for name, parameter in run.method.named_parameters():
        if parameter.requires_grad and name not in UNTRAINED.get(config.head.name, set()):
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"
            assert parameter.grad.abs().sum() > 0, f"{name} has a gradient of zero"
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    scaler.step(optimizer)
    assert any(not torch.equal(before[name], p) for name, p in run.method.named_parameters())


def test_a_config_changes_only_what_it_says(tmp_path):
    """Options that a YAML does not name keep the dataclass defaults: no second home for defaults."""
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    config = parse_options(Config, [str(empty)], prog="train.py", description="")
    assert to_plain(dataclasses.replace(config, name="")) == to_plain(Config())
