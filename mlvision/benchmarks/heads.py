"""Heads: what each adds to the time of a backbone."""

from collections.abc import Callable, Iterator

import torch

from mlvision.benchmarks.base import BenchmarkOptions, Row, compare
from mlvision.models import (
    BackboneConfig,
    CsraHeadConfig,
    HeadConfig,
    LinearHeadConfig,
    MLDecoderHeadConfig,
    Query2LabelHeadConfig,
    TextHeadConfig,
    build_classifier,
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
            target="",
            note="{:.0f} against {:.0f} images/s; ".format(*images_a_second) + f"{parameters / 1e6:.1f} M parameters",
            **measured,
        )
