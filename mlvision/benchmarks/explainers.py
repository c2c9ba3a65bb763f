"""Explainers: batched over labels, against a loop over them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mlvision.benchmarks.base import BenchmarkOptions, Row, build_method, compare
from mlvision.explain import Subject, explain
from mlvision.explain.perturb import slic_segments
from mlvision.methods import BaselineConfig
from mlvision.models import (
    BackboneConfig,
    LinearHeadConfig,
    build_classifier,
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
    for peer, (target, loop, difference) in loops.items():
        yield Row(
            what=f"Grad-CAM of {num_labels} labels, ResNet-50, {side} px",
            peer=f"{peer}, one label after the other",
            target=target,
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
        target="18x, difference 1e-5 of the highest value",
        difference=float((maps - theirs).abs().max() / theirs.abs().max()),
        **compare(ours("occlusion", **windows), occlude, options, num_labels),
    )
    yield Row(
        what=f"Occlusion of {num_labels} labels, bf16",
        peer="ours, fp32",
        target="1.5x where the CPU has bf16",
        **compare(ours("occlusion", precision="bf16", **windows), ours("occlusion", **windows), options),
    )
    segments = slic_segments(image, 40, 10.0)
    lime, copies = Lime(model), 50
    yield Row(
        what=f"LIME of {num_labels} labels, {copies} copies",
        peer=f"captum, one label after the other (one timed, times {num_labels})",
        target="18x",
        **compare(
            ours("lime", num_samples=copies, baseline="black"),
            lambda: lime.attribute(image, target=0, feature_mask=segments[:, None], n_samples=copies, baselines=0),
            options,
            num_labels,
        ),
    )
