"""Label maps: pooling of what a view shows, the store on disk, and the best classes of each cell."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from mlvision.benchmarks.base import BenchmarkOptions, Row, compare, peak_bytes
from mlvision.label_maps import pool_label_map
from mlvision.label_maps.annotate import top_k_of
from mlvision.label_maps.store import LabelMapStore, LabelMapWriter, StoreMeta
from mlvision.models import (
    BackboneConfig,
    LinearHeadConfig,
    build_classifier,
)
from mlvision.models.dense import DenseTeacher
from mlvision.types import CropBox, LabelMap


def random_maps(num_images: int, num_classes: int, side: int, device: str, k: int = 5) -> LabelMap:
    """Smooth logits, as a network makes them, and the k best of each cell."""
    noise = torch.Generator().manual_seed(0)
    coarse = 4 * torch.randn(num_images, num_classes, 4, 4, generator=noise)
    values, ids, fill, groups = [], [], [], (num_classes,)
    for part in coarse.split(64):
        maps = torch.nn.functional.interpolate(part, (side, side), mode="bicubic")
        best = top_k_of(maps, k, "logit", groups)
        for column, found in zip((values, ids, fill), best, strict=True):
            column.append(found)
    return LabelMap(torch.cat(values), torch.cat(ids), "logit", torch.cat(fill), groups=groups).to(device)


def random_crops(num_images: int, device: str) -> CropBox:
    """Boxes as random resized crops of 8 % to 100 % have them."""
    noise = torch.Generator().manual_seed(1)
    sides = torch.empty(num_images, 2).uniform_(0.3, 1.0, generator=noise)
    corner = (1 - sides) * torch.rand(num_images, 2, generator=noise)
    return CropBox(torch.cat([corner, corner + sides], 1).to(device))


def pooling(options: BenchmarkOptions) -> Iterator[Row]:
    """Sparse LabelPooling of maps as a store gives them, against a dense scatter and torchvision's roi_align."""
    side, num_classes = 15, 1000
    for num_images, target in ((64, "15x"), (256, "30x")):
        maps, view = (
            random_maps(num_images, num_classes, side, options.device),
            random_crops(num_images, options.device),
        )
        assert maps.ids is not None
        ids, values, fill = maps.ids.long(), maps.values.half().float(), torch.as_tensor(maps.fill)
        rois = torch.cat([torch.arange(num_images, device=options.device)[:, None], view.boxes * side], 1)
        stored = replace(maps, values=maps.values.half(), ids=maps.ids.short())

        def dense(ids: Tensor = ids, fill: Tensor = fill, values: Tensor = values, rois: Tensor = rois) -> Tensor:
            maps = fill[:, None].repeat(1, num_classes, 1, 1).scatter_(1, ids, values)
            return roi_align(maps, rois, (1, 1), 1.0, -1, aligned=True).flatten(1)

        def sparse(stored: LabelMap = stored, view: CropBox = view) -> Tensor:
            return pool_label_map(stored, view, num_classes)

        ours, peer = (peak_bytes(call, options.device) for call in (sparse, dense))
        yield Row(
            what=f"sparse LabelPooling, B={num_images}, C={num_classes}, {side}x{side}",
            peer="dense scatter + torchvision roi_align",
            target=f"{target}, difference 1e-5, 2 % of its memory",
            difference=float((sparse() - dense()).abs().max()),
            note=f"peak memory {ours / 2**20:.2f} against {peer / 2**20:.0f} MiB: {ours / peer:.2%}",
            **compare(sparse, dense, options),
        )


def write_store(folder: Path, label_map: LabelMap, num_classes: int) -> LabelMapStore:
    """A store of the best classes of each cell, opened."""
    num_images, k, *grid = label_map.values.shape
    meta = StoreMeta(
        "", num_images, "", num_classes, "", "", (grid[0], grid[1]), "logit", (num_classes,), k, num_images
    )
    writer = LabelMapWriter.create_or_resume(folder, meta)
    writer.write(range(num_images), label_map.values, label_map.ids, torch.as_tensor(label_map.fill))
    return LabelMapStore.open(folder)


def store(options: BenchmarkOptions) -> Iterator[Row]:
    """A batch of 256 rows of the store against 256 files of torch.save."""
    num_images, batch, side, k = 8000, 256, 15, 5
    label_map = random_maps(num_images, 1000, side, "cpu", k)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened = write_store(folder / "store", label_map, 1000)
        assert label_map.ids is not None
        for row, (values, ids) in enumerate(zip(label_map.values, label_map.ids, strict=True)):
            torch.save(torch.stack([values, ids.float()]), folder / f"{row}.pt")
        rows = np.random.default_rng(0)

        def read() -> LabelMap:
            return opened.read(rows.integers(num_images, size=batch))

        def load() -> Tensor:
            chosen = rows.integers(num_images, size=batch).tolist()
            return torch.stack([torch.load(folder / f"{row}.pt", weights_only=True) for row in chosen])

        size = sum(path.stat().st_size for path in (folder / "store").iterdir()) / num_images
        measured = compare(read, load, options)
    yield Row(
        what=f"label-map store, {batch} random rows, K={k}, {side}x{side}",
        peer="torch.load of one file each",
        target="500x, at most 5,000 bytes an image",
        note=f"{size:,.0f} bytes an image",
        **measured,
    )


def annotate(options: BenchmarkOptions) -> Iterator[Row]:
    """Making maps, best classes included, against the teacher's plain forward."""
    for name, side in (("tf_efficientnet_lite0", 224), ("resnet50", 224)):
        torch.manual_seed(0)
        classifier = build_classifier(BackboneConfig(name), LinearHeadConfig(), 1000, image_size=side).eval()
        teacher = DenseTeacher(classifier).to(options.device)
        images = torch.randint(256, (16, 3, side, side), dtype=torch.uint8, device=options.device)

        def make(teacher: DenseTeacher = teacher, images: Tensor = images) -> Any:
            with torch.inference_mode():
                return top_k_of(teacher.maps(images), 5, "logit", (1000,))

        def plain(teacher: DenseTeacher = teacher, images: Tensor = images) -> Tensor:
            with torch.inference_mode():
                return teacher.logits(images)

        yield Row(
            what=f"label maps of {name}, {side} px, B=16",
            peer="the teacher's forward",
            target="at most 1.15x its time: ratio 0.87",
            **compare(make, plain, options),
        )
