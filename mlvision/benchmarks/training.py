"""Training steps: against those of timm, and of each method against those of the baseline."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2

from mlvision.benchmarks.base import BenchmarkOptions, Row, build_method, compare, peak_bytes
from mlvision.benchmarks.label_maps import random_crops, random_maps
from mlvision.engine.optim import OptimConfig
from mlvision.engine.trainer import Trainer
from mlvision.losses import AslConfig
from mlvision.methods import BaselineConfig, Method, MethodConfig, PatchCTConfig, RelabelConfig
from mlvision.models import (
    BackboneConfig,
    HeadConfig,
    LinearHeadConfig,
    TextHeadConfig,
    build_classifier,
)
from mlvision.runs.build import compile_backbone
from mlvision.types import Batch


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


TRAIN_STEPS = 100_000  # of the schedule: more than are ever timed


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
        for name, (head, config, target) in methods.items():
            classifier = build_classifier(backbone, head, num_classes, image_size=setting.side, assets=assets)
            method = build_method(config, classifier)
            given = batch if method.needs_label_map else replace(batch, label_map=None)
            ours = training_step(method, given, options, setting.backend)
            memory = peak_bytes(ours, options.device)
            yield Row(
                what=f"{name} step, {setting.model}, {setting.side} px, B={setting.num_images}, C={num_classes}, "
                f"{precision.name}{compiled}",
                peer="timm's benchmark script",
                target=target,
                note=f"peak memory {memory / 2**20:.0f} against {peer_memory / 2**20:.0f} MiB",
                **compare(ours, peer, options),
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
            target="at most 3 % more: ratio 0.97",
            **compare(training_step(methods[target], batch, options), baseline, options),
        )


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
        target="at most 5 % more: ratio 0.95",
        **compare(ours, baseline, options),
    )
