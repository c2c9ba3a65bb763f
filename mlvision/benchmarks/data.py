"""Data: augmented views of photographs, and whole loaders."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mlvision.benchmarks.base import BenchmarkOptions, Row, compare
from mlvision.benchmarks.label_maps import random_maps, write_store
from mlvision.data.images import read_image
from mlvision.data.loader import LoaderConfig, train_loader
from mlvision.data.manifest import Manifest, Record
from mlvision.data.views import BACKENDS, TrainView, ViewConfig


def write_photographs(folder: Path, num_images: int) -> list[str]:
    """JPEG files of 500x375: smooth with some grain, about as many bytes as photographs."""
    noise = np.random.default_rng(0)
    paths = [str(folder / f"{i}.jpg") for i in range(num_images)]
    for path in paths:
        blobs = Image.fromarray(noise.integers(256, size=(24, 32, 3), dtype=np.uint8))
        coarse = blobs.resize((500, 375), Image.Resampling.BICUBIC)
        grain = noise.normal(0, 6, (375, 500, 3))
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=93)
    return paths


def views(options: BenchmarkOptions) -> Iterator[Row]:
    """Training views of JPEG files of 500x375, decoding included, against Pillow and torchvision v2; the cost of the box."""
    side = 224
    config = ViewConfig(side)
    with tempfile.TemporaryDirectory() as name:
        paths = write_photographs(Path(name), 16)
        crop = v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()])

        def pillow() -> list[Tensor]:
            return [F.pil_to_tensor(crop(Image.open(path).convert("RGB"))) for path in paths]

        def without_box() -> list[Tensor]:
            return [crop(torch.from_numpy(read_image(path)).permute(2, 0, 1)) for path in paths]

        peers: dict[str, tuple[str, Callable[[], Any]]] = {
            "Pillow + torchvision v2": ("1.5x", pillow),
            "our decoder and resizer without seed and box": ("at most 3 % more: ratio 0.97", without_box),
        }

        for backend in BACKENDS:
            view = TrainView(replace(config, backend=backend), (side, side))

            def ours(view: TrainView = view) -> list[Tensor]:
                return [view(read_image(path), seed).image for seed, path in enumerate(paths)]

            for peer, (target, call) in peers.items():
                yield Row(
                    what=f"training views, {backend}, 500x375 to {side} px",
                    peer=peer,
                    target=target,
                    note=f"{np.mean([os.path.getsize(path) for path in paths]) / 1024:.0f} KiB a file",
                    **compare(ours, call, options),
                )


def image_loaders(folder: Path, num_images: int, workers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours and the peers', by name: loaders of shuffled batches of 32 random views, uint8, of the same JPEG files."""
    side, size, num_classes = 224, 32, 80
    photographs = folder / "images" / "one class"  # the peers take the folder for the label
    photographs.mkdir(parents=True)
    paths = write_photographs(photographs, num_images)
    records = tuple(Record(path, path, (row % num_classes,)) for row, path in enumerate(paths))
    manifest = Manifest(tuple(map(str, range(num_classes))), records, "train")
    maps = write_store(folder / "store", random_maps(num_images, num_classes, 15, "cpu"), num_classes)
    config, view = LoaderConfig(batch_size=size, num_workers=workers), TrainView(ViewConfig(side))
    ours = {
        f"loader {what} label maps": train_loader(manifest, view, config, 0, label_maps=label_maps)
        for what, label_maps in (("without", None), ("with", maps))
    }
    common: dict[str, Any] = {
        "batch_size": size,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
    no_colours: dict[str, Any] = {"color_jitter": None}
    of_timm: Any = create_loader(
        ImageDataset(photographs.parent),
        (3, side, side),
        is_training=True,
        device=torch.device("cpu"),
        **no_colours,
        **common,
    )
    crop = v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    of_torch = DataLoader(ImageFolder(photographs.parent, crop), shuffle=True, drop_last=True, **common)
    return ours, {
        "timm's create_loader": of_timm.loader,  # what is around it normalises, which ours leaves to the device as well
        "DataLoader, Pillow + torchvision v2": of_torch,
    }


LOADER_IMAGES = 128


def loader(options: BenchmarkOptions) -> Iterator[Row]:
    """Batches of views of JPEG files by worker processes, against timm's create_loader and torch's DataLoader."""

    def epoch(batches: Any) -> Callable[[], None]:
        def run() -> None:
            for _ in batches:
                pass

        return run

    with tempfile.TemporaryDirectory() as folder:
        ours, peers = image_loaders(Path(folder), LOADER_IMAGES, options.workers)
        for what, batches in ours.items():
            for peer, peer_batches in peers.items():
                measured = compare(epoch(batches), epoch(peer_batches), options)
                speeds = [1e3 * LOADER_IMAGES / measured[key] for key in ("ours_ms", "peer_ms")]
                yield Row(
                    what=f"{what}, num_workers={options.workers}, 500x375 to 224 px, B=32",
                    peer=peer,
                    target="1.5x, as the views",
                    note=f"{speeds[0]:.0f} against {speeds[1]:.0f} images/s",
                    **measured,
                )
