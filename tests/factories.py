"""What many tests need built."""

from pathlib import Path

import torch

from mlvision.config import Config
from mlvision.errors import InputError
from mlvision.label_maps.store import LabelMapWriter, StoreMeta
from mlvision.methods import METHODS, Method, MethodConfig
from mlvision.models import HEADS, BackboneConfig, Classifier, Preprocessing, build_classifier
from mlvision.options import parse_options
from mlvision.parts import Context
from mlvision.runs.splits import read_training_manifests
from mlvision.space import LabelSpace
from mlvision.types import Batch, CropBox, LabelMap


def context(num_classes: int) -> Context:
    """Of so many classes, without statistics."""
    return Context(LabelSpace(tuple(f"class {c}" for c in range(num_classes))))


def build_method(config: MethodConfig, classifier: Classifier, preprocessing: Preprocessing | None = None) -> Method:
    """A method around a classifier, of weights that expect their images in a given way."""
    classifier.backbone.preprocessing = preprocessing or classifier.backbone.preprocessing
    return config.build(context(classifier.num_classes), classifier)


def small_classifier(head: str, num_classes: int, side: int = 48, backbone: str = "test_vit") -> Classifier:
    """With a head of HEADS; a head that compares with names gets random ones."""
    torch.manual_seed(0)
    assets = {"label_embeddings": torch.randn(num_classes, 8)}
    return build_classifier(BackboneConfig(backbone), HEADS[head](), num_classes, image_size=side, assets=assets)


def head_of(name: str) -> str:
    """The first head that a method of METHODS can train."""
    for head in HEADS:
        try:
            build_method(METHODS[name](), small_classifier(head, 2))
        except InputError:
            continue
        return head
    raise AssertionError(f"no head of HEADS fits the method {name}")


def small_batch(num_classes: int, num_images: int = 4, side: int = 48, cells: tuple[int, int] = (5, 4)) -> Batch:
    """Noise with random labels, a few of which are unknown, random views, and label maps of two classes per cell."""
    noise = torch.Generator().manual_seed(0)
    targets = (torch.rand(num_images, num_classes, generator=noise) < 0.5).float()
    targets[0, 0] = float("nan")
    corner = 0.4 * torch.rand(num_images, 2, generator=noise)
    boxes = torch.cat([corner, corner + 0.5], 1)
    size, flipped = (num_images, min(2, num_classes), *cells), torch.arange(num_images) % 2 == 0
    best = torch.rand(num_images, num_classes, *cells, generator=noise).topk(size[1], dim=1)
    label_map = LabelMap(4 * best.values, best.indices, "logit", 0.0, groups=(1,) * num_classes)
    images = torch.randint(256, (num_images, 3, side, side), dtype=torch.uint8, generator=noise)
    view = CropBox(boxes, flipped, torch.zeros(num_images, dtype=torch.int64))
    return Batch(images, targets, torch.arange(num_images), view, label_map)


def write_label_maps(arguments: list[str], folder: Path) -> None:
    """A store of random logits for the training images of a run's arguments."""
    manifest = read_training_manifests(parse_options(Config, arguments, prog="train.py", description=""))[0]
    num, classes = len(manifest), len(manifest.classes)
    meta = StoreMeta(
        manifest.hash, num, manifest.class_hash, classes, "random", "", (3, 4), "logit", (classes,), 0, num
    )
    maps = 2 * torch.randn(num, classes, 3, 4, generator=torch.Generator().manual_seed(0))
    LabelMapWriter.create_or_resume(folder, meta).write(range(num), maps)
