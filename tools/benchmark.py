"""Measure ours against a peer, interleaved in one process; as ratios, for times of a shared machine are not stable.

python tools/benchmark.py mean_ap views pooling store annotate relabel transport patchct explainers
python tools/benchmark.py pooling pairs=60 out=docs/performance/pooling.json
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from mlvision.config import describe_options, parse_options, run_command
from mlvision.data.images import read_image
from mlvision.data.transforms import BACKENDS, TrainView, ViewConfig
from mlvision.engine.optim import OptimConfig, build_optimizer
from mlvision.errors import InputError
from mlvision.explain import Subject, explain
from mlvision.explain.perturb import slic_segments
from mlvision.labels import pool_label_map
from mlvision.labels.annotate import top_k_of
from mlvision.labels.store import LabelMapStore, LabelMapWriter, StoreMeta
from mlvision.losses import conditional_transport
from mlvision.methods import Baseline, BaselineConfig, PatchCT, PatchCTConfig, Relabel, RelabelConfig
from mlvision.methods.base import Method
from mlvision.metrics import average_precision
from mlvision.models import BackboneConfig, LinearHeadConfig, TextHeadConfig, build_classifier
from mlvision.models.dense import DenseTeacher
from mlvision.run import describe_environment, write_json
from mlvision.types import Batch, CropBox, LabelMap


@dataclass(frozen=True)
class BenchmarkOptions:
    pairs: Annotated[int, "interleaved measurements of ours and the peer"] = 30
    threads: Annotated[int, "CPU threads of torch; 0: torch's own choice"] = 0
    device: Annotated[str, "cpu, cuda or cuda:<number>"] = "cpu"
    out: Annotated[str, "JSON to write; empty: none"] = ""

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.threads < 0:
            raise InputError(f"expected pairs >= 1 and threads >= 0, got {self.pairs} and {self.threads}")


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
    values, ids, fill = [], [], []
    for part in coarse.split(64):
        maps = torch.nn.functional.interpolate(part, (side, side), mode="bicubic")
        best = top_k_of(maps, k, "logit", "softmax")
        for column, found in zip((values, ids, fill), best, strict=True):
            column.append(found)
    return LabelMap(torch.cat(values), torch.cat(ids), "logit", torch.cat(fill)).to_device(device)


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


def views(options: BenchmarkOptions) -> Iterator[Row]:
    """Training views of JPEG files of 500x375, decoding included, against Pillow and torchvision v2; the cost of the box."""
    side, noise = 224, np.random.default_rng(0)
    config = ViewConfig(side)
    with tempfile.TemporaryDirectory() as name:
        paths = [str(Path(name) / f"{i}.jpg") for i in range(16)]
        for path in paths:  # smooth with some grain, about as many bytes as a photograph
            blobs = Image.fromarray(noise.integers(256, size=(24, 32, 3), dtype=np.uint8))
            coarse = blobs.resize((500, 375), Image.Resampling.BICUBIC)
            grain = noise.normal(0, 6, (375, 500, 3))
            Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=93)
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


def store(options: BenchmarkOptions) -> Iterator[Row]:
    """A batch of 256 rows of the store against 256 files of torch.save."""
    num_images, batch, side, k = 8000, 256, 15, 5
    label_map = random_maps(num_images, 1000, side, "cpu", k)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        meta = StoreMeta("", num_images, "", 1000, "", "", (side, side), "logit", "softmax", k, num_images)
        writer = LabelMapWriter.create_or_resume(folder / "store", meta)
        writer.write(range(num_images), label_map.values, label_map.ids, torch.as_tensor(label_map.fill))
        opened = LabelMapStore.open(folder / "store")
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
                return top_k_of(teacher.maps(images), 5, "logit", "softmax")

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
    batch = Batch(
        torch.randint(256, (num_images, 3, side, side), dtype=torch.uint8),
        torch.randint(2, (num_images, num_classes)).float(),
        torch.arange(num_images),
        random_crops(num_images, "cpu"),
        random_maps(num_images, num_classes, 15, "cpu"),
    ).to(options.device)
    torch.manual_seed(0)
    classifier = build_classifier(BackboneConfig("resnet18"), LinearHeadConfig(), num_classes, image_size=side)
    preprocessing = classifier.backbone.preprocessing
    methods = {
        "softmax": Relabel(RelabelConfig(target="softmax"), classifier, preprocessing),
        "multilabel": Relabel(RelabelConfig(), classifier, preprocessing),
        "baseline": Baseline(BaselineConfig(), classifier, preprocessing),
    }

    baseline = training_step(methods["baseline"], batch, options)
    for target in ("softmax", "multilabel"):
        yield Row(
            what=f"ReLabel step, {target}, ResNet-18, {side} px, B={num_images}, C={num_classes}",
            peer="the baseline's step",
            asked="at most 3 % more: ratio 0.97",
            **compare(training_step(methods[target], batch, options), baseline, options),
        )


def training_step(method: Method, batch: Batch, options: BenchmarkOptions) -> Callable[[], None]:
    """A call that trains the method by one step on the batch."""
    method.to(options.device).train()
    optimizer = build_optimizer(method.parameter_groups(), OptimConfig())

    def run() -> None:
        method(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def transport(options: BenchmarkOptions) -> Iterator[Row]:
    """Conditional transport, forward and backward, against Sinkhorn's steps and against its own matrix product."""
    torch.manual_seed(0)
    patches = torch.randn(64, 197, 512, device=options.device, requires_grad=True)
    labels = torch.randn(80, 512, device=options.device, requires_grad=True)
    weights = (torch.rand(64, 80, device=options.device) < 0.05).float()

    def carried(plan: str) -> Callable[[], None]:
        def run() -> None:
            cost = conditional_transport(patches, labels, weights, plan=plan, tau=0.1).cost.sum()
            torch.autograd.grad(cost, (patches, labels))

        return run

    def product() -> None:
        torch.autograd.grad((patches @ labels.T).sum(), (patches, labels))

    what = "conditional transport, B=64, 197 patches, 80 labels of width 512"
    ours = carried("ct")
    yield Row(what, "50 unrolled Sinkhorn steps", asked="8x", **compare(ours, carried("sinkhorn"), options))
    yield Row(what, "the matrix product", asked="at most 2.5x its time: ratio 0.4", **compare(ours, product, options))


def patchct(options: BenchmarkOptions) -> Iterator[Row]:
    """A training step with transport against the baseline's with a linear head, on the same images."""
    side, num_images, num_classes = 128, 32, 80
    batch = Batch(
        torch.randint(256, (num_images, 3, side, side), dtype=torch.uint8),
        (torch.rand(num_images, num_classes) < 0.05).float(),
        torch.arange(num_images),
        random_crops(num_images, "cpu"),
    ).to(options.device)
    torch.manual_seed(0)
    text = {"label_embeddings": torch.randn(num_classes, 384)}
    backbone = BackboneConfig("resnet18")
    linear = build_classifier(backbone, LinearHeadConfig(), num_classes, image_size=side)
    named = build_classifier(backbone, TextHeadConfig(), num_classes, image_size=side, **text)
    preprocessing = linear.backbone.preprocessing
    baseline = training_step(Baseline(BaselineConfig(loss="asl"), linear, preprocessing), batch, options)
    ours = training_step(PatchCT(PatchCTConfig(), named, preprocessing), batch, options)
    yield Row(
        what=f"PatchCT step, ResNet-18, {side} px, B={num_images}, C={num_classes}",
        peer="the baseline's step",
        asked="at most 5 % more: ratio 0.95",
        **compare(ours, baseline, options),
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
    method = Baseline(BaselineConfig(), classifier, classifier.backbone.preprocessing).eval().to(options.device)
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
    "pooling": pooling,
    "store": store,
    "annotate": annotate,
    "relabel": relabel,
    "transport": transport,
    "patchct": patchct,
    "explainers": explainers,
}


def main(argv: list[str]) -> None:
    names = [argument for argument in argv if "=" not in argument and not argument.startswith("-")]
    if {"-h", "--help"} & set(argv) or not argv:
        print(f"usage: benchmark.py NAME ... [key=value ...]\n\n{__doc__}")
        for name, benchmark in BENCHMARKS.items():
            print(f"  {name:10}{benchmark.__doc__}")
        print(f"\n{describe_options(BenchmarkOptions)}")
        return
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        raise InputError(f"expected some of {', '.join(BENCHMARKS)}, got {', '.join(unknown) or 'none'}")
    rest = [argument for argument in argv if argument not in names]
    options = parse_options(BenchmarkOptions, rest, prog="benchmark.py", description=__doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
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
