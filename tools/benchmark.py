"""Measure ours against a peer, interleaved in one process; as ratios, for times of a shared machine are not stable.

python tools/benchmark.py mean_ap views loader pooling store annotate relabel transport patchct heads explainers
python tools/benchmark.py pooling pairs=60 out=docs/performance/pooling.json
python tools/benchmark.py loader workers=2
python tools/benchmark.py train device=cuda
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.ops import roi_align
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from mlvision.cli import run_command
from mlvision.data.images import read_image
from mlvision.data.loader import MOST_WORKERS, LoaderConfig, train_loader
from mlvision.data.manifest import Manifest, Record
from mlvision.data.transforms import BACKENDS, TrainView, ViewConfig
from mlvision.engine.optim import OptimConfig
from mlvision.engine.precision import MOST_THREADS, Precision, resolve_device, resolve_precision
from mlvision.engine.trainer import Trainer
from mlvision.errors import InputError, check_fields
from mlvision.explain import Subject, explain
from mlvision.explain.perturb import slic_segments
from mlvision.files import check_out
from mlvision.labels import pool_label_map
from mlvision.labels.annotate import top_k_of
from mlvision.labels.store import LabelMapStore, LabelMapWriter, StoreMeta
from mlvision.losses import AslConfig, conditional_transport
from mlvision.methods import BaselineConfig, Method, MethodConfig, PatchCTConfig, RelabelConfig
from mlvision.metrics import average_precision
from mlvision.models import (
    BackboneConfig,
    Classifier,
    CsraHeadConfig,
    HeadConfig,
    LinearHeadConfig,
    MLDecoderHeadConfig,
    Query2LabelHeadConfig,
    TextHeadConfig,
    build_classifier,
)
from mlvision.models.dense import DenseTeacher
from mlvision.options import describe_options, is_override, parse_options
from mlvision.parts import Context
from mlvision.run import compile_backbone, describe_environment, write_json
from mlvision.space import LabelSpace
from mlvision.types import Batch, CropBox, LabelMap


@dataclass(frozen=True)
class BenchmarkOptions:
    pairs: Annotated[int, "interleaved measurements of ours and the peer"] = 30
    threads: Annotated[int, "CPU threads of torch; 0: torch's own choice"] = 0
    device: Annotated[str, "cpu, cuda or cuda:<number>"] = "cpu"
    workers: Annotated[int, "loader: processes that read images; 0: the main process"] = 1
    out: Annotated[str, "JSON to write; empty: none"] = ""

    def __post_init__(self) -> None:
        rules = (
            ("pairs", 1 <= self.pairs <= 100_000, "1 to 100000"),
            ("threads", 0 <= self.threads <= MOST_THREADS, f"0 to {MOST_THREADS}"),
            ("workers", 0 <= self.workers <= MOST_WORKERS, f"0 to {MOST_WORKERS}"),
        )
        check_fields(self, "", rules)

    def precision(self) -> Precision:
        """What train.py takes by itself on the device."""
        return resolve_precision("auto", resolve_device(self.device))


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` is the peer's time over ours: above 1, ours is faster.

    Attributes:
        interval: the 10th and 90th percentile of the pairs' ratios.
        difference: largest difference of the results, where both give the same thing.
    """

    what: str
    peer: str
    ratio: float
    interval: tuple[float, float]
    ours_ms: float
    peer_ms: float
    asked: str
    difference: float | None = None
    note: str = ""


def compare(
    ours: Callable[[], Any], peer: Callable[[], Any], options: BenchmarkOptions, peer_calls: int = 1
) -> dict[str, Any]:
    """Times of interleaved pairs, in alternating order, after a warm-up of each.

    A call shorter than 20 ms is repeated to last about that: alone it would measure the caches that the other left.

    Args:
        peer_calls: the peer does what ours does in so many equal calls, of which one is timed.
    """

    def seconds(call: Callable[[], Any], repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        if options.device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / repeats

    for call in (ours, peer):
        seconds(call, 1)
    repeats = [max(1, round(0.02 / seconds(call, 1))) for call in (ours, peer)]
    times = np.empty((options.pairs, 2))
    for pair in range(options.pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            times[pair, which] = seconds((ours, peer)[which], repeats[which])
    times[:, 1] *= peer_calls
    ratios = times[:, 1] / times[:, 0]
    low, high = np.quantile(ratios, [0.1, 0.9])
    return {
        "ratio": float(np.median(ratios)),
        "interval": (float(low), float(high)),
        "ours_ms": 1e3 * float(np.median(times[:, 0])),
        "peer_ms": 1e3 * float(np.median(times[:, 1])),
    }


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that a call holds at once, of what it allocates itself."""
    call()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events: list[Any] = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())


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
    for num_images, asked in ((64, "15x"), (256, "30x")):
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
            asked=f"{asked}, difference 1e-5, 2 % of its memory",
            difference=float((sparse() - dense()).abs().max()),
            note=f"peak memory {ours / 2**20:.2f} against {peer / 2**20:.0f} MiB: {ours / peer:.2%}",
            **compare(sparse, dense, options),
        )


def mean_ap(options: BenchmarkOptions) -> Iterator[Row]:
    """Exact mAP with ties of 40,504 images and 80 classes (COCO val), against torchmetrics and scikit-learn."""
    from sklearn.metrics import average_precision_score
    from torchmetrics.functional.classification import multilabel_average_precision

    noise = torch.Generator().manual_seed(0)
    prevalence = torch.logspace(-2.5, -1, 80)
    targets = (torch.rand(40_504, 80, generator=noise) < prevalence).float()
    scores = (torch.randn(targets.shape, generator=noise) + 2 * targets).sigmoid()
    labels, (s, t) = targets.long(), (scores.numpy(), targets.numpy())
    peers: dict[str, tuple[str, Callable[[], Any]]] = {
        "torchmetrics": ("2x", lambda: multilabel_average_precision(scores, labels, 80, average="none")),
        "scikit-learn": ("2.5x", lambda: average_precision_score(t, s, average=None)),  # pyright: ignore[reportArgumentType]
    }

    def ours() -> Tensor:
        return average_precision(scores, targets)

    for name, (asked, peer) in peers.items():
        yield Row(
            what="mAP, 40,504 x 80",
            peer=name,
            asked=f"{asked}, error 1e-9 to scikit-learn",
            difference=float(np.abs(np.asarray(peer()) - ours().numpy()).max()),
            **compare(ours, peer, options),
        )


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

            for peer, (asked, call) in peers.items():
                yield Row(
                    what=f"training views, {backend}, 500x375 to {side} px",
                    peer=peer,
                    asked=asked,
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
                    asked="1.5x, as the views",
                    note=f"{speeds[0]:.0f} against {speeds[1]:.0f} images/s",
                    **measured,
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
        asked="500x, at most 5,000 bytes an image",
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
            asked="at most 1.15x its time: ratio 0.87",
            **compare(make, plain, options),
        )


def relabel(options: BenchmarkOptions) -> Iterator[Row]:
    """A training step on label maps against the baseline's, on the same images."""
    side, num_images, num_classes = 128, 32, 1000
    batch = host_batch(num_images, side, num_classes, options)
    torch.manual_seed(0)
    classifier = build_classifier(BackboneConfig("resnet18"), LinearHeadConfig(), num_classes, image_size=side)
    methods = {
        "softmax": build_method(RelabelConfig(target="softmax"), classifier),
        "multilabel": build_method(RelabelConfig(), classifier),
        "baseline": build_method(BaselineConfig(), classifier),
    }

    baseline = training_step(methods["baseline"], replace(batch, label_map=None), options)
    for target in ("softmax", "multilabel"):
        yield Row(
            what=f"ReLabel step, {target}, ResNet-18, {side} px, B={num_images}, C={num_classes}",
            peer="the baseline's step",
            asked="at most 3 % more: ratio 0.97",
            **compare(training_step(methods[target], batch, options), baseline, options),
        )


def build_method(config: MethodConfig, classifier: Classifier) -> Method:
    """The method of classes without names or statistics, which none of these needs."""
    return config.build(Context(LabelSpace.of(None, classifier.num_classes)), classifier)


def host_batch(num_images: int, side: int, num_classes: int, options: BenchmarkOptions) -> Batch:
    """A batch with label maps as the loader gives it: on the host, channels last, pinned where a GPU is to take it."""
    maps = random_maps(num_images, num_classes, 15, "cpu")
    assert maps.ids is not None
    batch = Batch(
        torch.randint(256, (num_images, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
        (torch.rand(num_images, num_classes) < 0.05).float(),
        torch.arange(num_images),
        random_crops(num_images, "cpu"),
        replace(maps, values=maps.values.half(), ids=maps.ids.short()),
    )
    return batch if options.device == "cpu" else batch.pin_memory()


def training_step(method: Method, batch: Batch, options: BenchmarkOptions, backend: str = "") -> Callable[[], None]:
    """A call that trains the method by one step on the batch: what `fit` does for train.py with its defaults.

    That is the engine's step, from a batch in host memory to the update, with gradient norm, guard and schedule, and now and
    then the reading of what is logged. Files are not written.

    Args:
        backend: of torch.compile, for the backbone; empty: none.
    """
    precision = options.precision()
    method.to(precision.device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    if backend:
        compile_backbone(method, backend)
    trainer = Trainer(
        method,
        OptimConfig(epochs=1),
        precision,
        steps_per_epoch=TRAIN_STEPS,
        images_per_step=len(batch.images),
        keys=[str(row) for row in batch.index.tolist()],
    )
    return partial(trainer.step, batch)


TRAIN_STEPS = 100_000  # of the schedule: more than are ever timed


@dataclass(frozen=True)
class TrainSetting:
    """A network to train; `backend`: of torch.compile, empty: none."""

    model: str
    side: int
    num_images: int
    backend: str = ""


TRAIN_SETTINGS = {
    "cpu": (TrainSetting("resnet18", 128, 32), TrainSetting("vit_tiny_patch16_224", 96, 32)),
    "cuda": tuple(
        TrainSetting(model, 224, 256, backend)
        for model in ("resnet50", "vit_base_patch16_224")
        for backend in ("", "inductor")
    ),
}


def timm_step(setting: TrainSetting, num_classes: int, options: BenchmarkOptions) -> Callable[[], None]:
    """A call that trains timm's model by one step, as its benchmark.py does with --bench train --opt adamw --channels-last.

    That script is not in timm's package: its step is repeated here, of timm's own parts. The images are noise that is
    normalised and on the device already, the loss is the cross-entropy of random classes, nothing is logged or guarded.

    DEVIATION: AdamW is fused, as ours is; the script's own would be slower.
    """
    precision, shape = options.precision(), (setting.num_images, 3, setting.side, setting.side)
    cfg = timm.get_pretrained_cfg(setting.model)
    sized: dict[str, Any] = {"img_size": setting.side} if cfg is not None and cfg.fixed_input_size else {}
    model = timm.create_model(setting.model, num_classes=num_classes, **sized).train()
    model.to(precision.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    forward: Any = torch.compile(model, backend=setting.backend) if setting.backend else model
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, fused=True)
    images = torch.randn(shape, device=precision.device).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        optimizer.zero_grad()
        with precision.autocast():
            logits = forward(images)
            target = torch.randint(num_classes, (len(images),), device=precision.device)
            torch.nn.functional.cross_entropy(logits, target).backward()
        optimizer.step()

    return run


def train(options: BenchmarkOptions) -> Iterator[Row]:
    """Steps of train.py with three methods, against the step of timm's benchmark script for the same network.

    Same batch size, precision (fp32 on a CPU, bf16 on a GPU), memory format and optimizer. Ours begins with uint8 images in
    host memory, the script's with normalised ones on the device. Method, head and label maps are ours alone.
    """
    num_classes, precision = 80, options.precision()
    assets = {"label_embeddings": torch.randn(num_classes, 384)}
    methods: dict[str, tuple[HeadConfig, MethodConfig, str]] = {
        "baseline": (LinearHeadConfig(), BaselineConfig(), "0.95"),
        "ReLabel": (LinearHeadConfig(), RelabelConfig(), "0.85"),
        "PatchCT": (TextHeadConfig(), PatchCTConfig(alpha=0.1), "0.80"),
    }
    for setting in TRAIN_SETTINGS[precision.device.type]:
        torch.manual_seed(0)
        backbone, compiled = BackboneConfig(setting.model), setting.backend and ", compiled"
        batch = host_batch(setting.num_images, setting.side, num_classes, options)
        peer = timm_step(setting, num_classes, options)
        peer_memory = peak_bytes(peer, options.device)
        for name, (head, config, asked) in methods.items():
            classifier = build_classifier(backbone, head, num_classes, image_size=setting.side, assets=assets)
            method = build_method(config, classifier)
            given = batch if method.needs_label_map else replace(batch, label_map=None)
            ours = training_step(method, given, options, setting.backend)
            memory = peak_bytes(ours, options.device)
            yield Row(
                what=f"{name} step, {setting.model}, {setting.side} px, B={setting.num_images}, C={num_classes}, "
                f"{precision.name}{compiled}",
                peer="timm's benchmark script",
                asked=asked,
                note=f"peak memory {memory / 2**20:.0f} against {peer_memory / 2**20:.0f} MiB",
                **compare(ours, peer, options),
            )


def transport(options: BenchmarkOptions) -> Iterator[Row]:
    """Conditional transport, forward and backward, against Sinkhorn's steps and against its own matrix product."""
    torch.manual_seed(0)
    patches = torch.randn(64, 197, 512, device=options.device, requires_grad=True)
    labels = torch.randn(80, 512, device=options.device, requires_grad=True)
    weights = (torch.rand(64, 80, device=options.device) < 0.05).float()
    weights[:, 0] = 1  # no image without a label

    def carried(plan: str) -> Callable[[], None]:
        def run() -> None:
            cost = conditional_transport(patches, labels, weights, plan=plan, tau=0.1).cost.sum()
            torch.autograd.grad(cost, (patches, labels))

        return run

    def unrolled() -> None:
        normalize = torch.nn.functional.normalize
        cosine = normalize(patches, dim=-1) @ normalize(labels, dim=-1).T
        near, log_beta = cosine / 0.1, (weights / weights.sum(1, keepdim=True)).log()
        rows, columns = torch.zeros_like(near[..., 0]), torch.zeros_like(near[:, 0])
        for _ in range(50):
            rows = -torch.logsumexp(near + (log_beta + columns)[:, None], 2)
            columns = -torch.logsumexp(near + rows[:, :, None], 1) + math.log(near.shape[1])
        plan = (near + (log_beta + columns)[:, None]).softmax(2) / near.shape[1]
        torch.autograd.grad((plan * (1 - cosine)).sum(), (patches, labels))

    def product() -> None:
        torch.autograd.grad((patches @ labels.T).sum(), (patches, labels))

    what = "conditional transport, B=64, 197 patches, 80 labels of width 512"
    ours = carried("ct")
    yield Row(what, "50 unrolled Sinkhorn steps", asked="8x", **compare(ours, unrolled, options))
    yield Row(what, "`plan=sinkhorn`, marginals within 1e-3", asked="", **compare(ours, carried("sinkhorn"), options))
    yield Row(what, "the matrix product", asked="at most 2.5x its time: ratio 0.4", **compare(ours, product, options))


def patchct(options: BenchmarkOptions) -> Iterator[Row]:
    """A training step with transport against the baseline's with a linear head, on the same images."""
    side, num_images, num_classes = 128, 32, 80
    batch = replace(host_batch(num_images, side, num_classes, options), label_map=None)
    torch.manual_seed(0)
    assets = {"label_embeddings": torch.randn(num_classes, 384)}
    backbone = BackboneConfig("resnet18")
    linear = build_classifier(backbone, LinearHeadConfig(), num_classes, image_size=side)
    named = build_classifier(backbone, TextHeadConfig(), num_classes, image_size=side, assets=assets)
    baseline = training_step(build_method(BaselineConfig(loss=AslConfig()), linear), batch, options)
    ours = training_step(build_method(PatchCTConfig(alpha=0.1), named), batch, options)
    yield Row(
        what=f"PatchCT step, ResNet-18, {side} px, B={num_images}, C={num_classes}",
        peer="the baseline's step",
        asked="at most 5 % more: ratio 0.95",
        **compare(ours, baseline, options),
    )


def heads(options: BenchmarkOptions) -> Iterator[Row]:
    """Inference of EfficientNet-Lite0 with each head against the linear head, at the widths of heads_scenes.yaml."""
    side, num_images, num_classes, precision = 128, 32, 20, options.precision()
    assets = {"label_embeddings": torch.randn(num_classes, 384)}
    images = torch.randn(num_images, 3, side, side, device=precision.device).contiguous(
        memory_format=torch.channels_last
    )

    def forward(config: HeadConfig) -> tuple[Callable[[], None], int]:
        torch.manual_seed(0)
        backbone = BackboneConfig("tf_efficientnet_lite0")
        classifier = build_classifier(backbone, config, num_classes, image_size=side, assets=assets).eval()
        classifier.to(precision.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

        def run() -> None:
            with torch.inference_mode(), precision.autocast():
                classifier(images)

        return run, sum(weight.numel() for weight in classifier.parameters())

    linear, _ = forward(LinearHeadConfig())
    compared: tuple[tuple[str, HeadConfig], ...] = (
        ("csra", CsraHeadConfig()),
        ("ml_decoder", MLDecoderHeadConfig(width=256, feedforward=512)),
        ("query2label", Query2LabelHeadConfig(width=256, feedforward=512)),
        ("text", TextHeadConfig()),
        ("text, region_share=0.5", TextHeadConfig(region_share=0.5)),
    )
    for name, config in compared:
        run, parameters = forward(config)
        measured = compare(run, linear, options)
        images_a_second = [1e3 * num_images / measured[which] for which in ("ours_ms", "peer_ms")]
        yield Row(
            what=f"head {name}, tf_efficientnet_lite0, {side} px, B={num_images}, C={num_classes}",
            peer="the linear head",
            asked="",
            note="{:.0f} against {:.0f} images/s; ".format(*images_a_second) + f"{parameters / 1e6:.1f} M parameters",
            **measured,
        )


def explainers(options: BenchmarkOptions) -> Iterator[Row]:
    """Maps of 20 labels of one image from ResNet-50, 224 px, against the libraries' loops over the labels."""
    from captum.attr import LayerGradCam, Lime, Occlusion
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    side, num_labels = 224, 20
    torch.manual_seed(0)
    classifier = build_classifier(BackboneConfig("resnet50"), LinearHeadConfig(), num_labels, image_size=side)
    torch.nn.init.normal_(classifier.get_parameter("head.linear.weight"))
    method = build_method(BaselineConfig(), classifier).eval().to(options.device)
    method.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    subject, layer = Subject(method), classifier.backbone.model.layer4
    blobs = torch.rand(1, 3, side // 16, side // 16, device=options.device)  # segments of noise would be one
    image = torch.nn.functional.interpolate(blobs, (side, side), mode="bicubic").clamp(0, 1)

    def ours(name: str, **chosen: Any) -> Callable[[], Tensor]:
        return lambda: explain(subject, image, name, **chosen).maps

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.method = method

        def forward(self, images: Tensor) -> Tensor:
            return self.method.predict(images)

    model = Logits()
    captum_cam, peer_cam = LayerGradCam(model, layer), GradCAM(model, [layer])
    cam = ours("grad_cam")()

    def of_captum() -> Tensor:
        found: Any = [captum_cam.attribute(image, target=label) for label in range(num_labels)]
        return torch.cat(found, 1)

    def of_pytorch_grad_cam() -> list[Any]:
        targets: list[Any] = [ClassifierOutputTarget(label) for label in range(num_labels)]
        return [peer_cam(image, [target]) for target in targets]

    gap = (of_captum().detach() - cam).abs().amax((2, 3)) / cam.abs().amax((2, 3))
    loops: dict[str, tuple[str, Callable[[], Any], float | None]] = {
        "captum": ("20x, difference 1e-5 of the highest value", of_captum, gap.max().item()),
        "pytorch-grad-cam": ("50x", of_pytorch_grad_cam, None),
    }
    for peer, (asked, loop, difference) in loops.items():
        yield Row(
            what=f"Grad-CAM of {num_labels} labels, ResNet-50, {side} px",
            peer=f"{peer}, one label after the other",
            asked=asked,
            difference=difference,
            **compare(ours("grad_cam"), loop, options),
        )

    windows = {"window_px": 56, "stride_px": 28, "baseline": "black"}
    occlusion = Occlusion(model)

    def occlude() -> Any:
        return occlusion.attribute(image, (3, 56, 56), (3, 28, 28), target=0, baselines=0)

    maps = torch.nn.functional.interpolate(ours("occlusion", **windows)()[:, :1], (side, side))
    theirs = occlude()[:, :1]
    yield Row(
        what=f"Occlusion of {num_labels} labels, 49 windows, fp32",
        peer=f"captum, one label after the other (one timed, times {num_labels})",
        asked="18x, difference 1e-5 of the highest value",
        difference=float((maps - theirs).abs().max() / theirs.abs().max()),
        **compare(ours("occlusion", **windows), occlude, options, num_labels),
    )
    yield Row(
        what=f"Occlusion of {num_labels} labels, bf16",
        peer="ours, fp32",
        asked="1.5x where the CPU has bf16",
        **compare(ours("occlusion", precision="bf16", **windows), ours("occlusion", **windows), options),
    )
    segments = slic_segments(image, 40, 10.0)
    lime, copies = Lime(model), 50
    yield Row(
        what=f"LIME of {num_labels} labels, {copies} copies",
        peer=f"captum, one label after the other (one timed, times {num_labels})",
        asked="18x",
        **compare(
            ours("lime", num_samples=copies, baseline="black"),
            lambda: lime.attribute(image, target=0, feature_mask=segments[:, None], n_samples=copies, baselines=0),
            options,
            num_labels,
        ),
    )


BENCHMARKS: dict[str, Callable[[BenchmarkOptions], Iterator[Row]]] = {
    "mean_ap": mean_ap,
    "views": views,
    "loader": loader,
    "pooling": pooling,
    "store": store,
    "annotate": annotate,
    "train": train,
    "relabel": relabel,
    "transport": transport,
    "patchct": patchct,
    "heads": heads,
    "explainers": explainers,
}


def main(argv: list[str]) -> None:
    names = [argument for argument in argv if not is_override(argument) and not argument.startswith("-")]
    if {"-h", "--help"} & set(argv) or not argv:
        print(f"usage: python tools/benchmark.py NAME ... [key=value ...]\n\n{__doc__}")
        for name, benchmark in BENCHMARKS.items():
            print(f"  {name:12}{(benchmark.__doc__ or '').splitlines()[0]}")
        print(f"\n{describe_options(BenchmarkOptions)}")
        return
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        raise InputError(f"expected some of {', '.join(BENCHMARKS)}, got {', '.join(unknown) or 'none'}")
    rest = [argument for argument in argv if argument not in names]
    options = parse_options(BenchmarkOptions, rest, prog="python tools/benchmark.py", description=__doc__)
    options = replace(options, device=str(resolve_device(options.device)))
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.out:
        check_out(options.out)
    environment = describe_environment(torch.device(options.device))
    print(
        f"{environment['machine']}, threads={environment['threads']}, load {os.getloadavg()[0]:.1f}; median of "
        f"{options.pairs} pairs (10th to 90th percentile)\n"
    )
    print("| what | against | times as fast | asked | milliseconds | |\n| --- | --- | ---: | --- | ---: | --- |")
    rows = []
    for name in tqdm(names, disable=None):
        for row in BENCHMARKS[name](options):
            low, high = row.interval
            notes = [row.note] if row.note else []
            notes += [] if row.difference is None else [f"difference {row.difference:.1e}"]
            print(
                f"| {row.what} | {row.peer} | {row.ratio:.3g} ({low:.3g} to {high:.3g}) | {row.asked} | "
                f"{row.ours_ms:.3g} / {row.peer_ms:.3g} | {'; '.join(notes)} |",
                flush=True,
            )
            rows.append(asdict(row))
    if options.out:
        write_json(Path(options.out), {"rows": rows, "environment": environment, "load": os.getloadavg()[0]})


if __name__ == "__main__":
    run_command(main)
