"""A dense teacher with ImageNet weights, on photos of ImageNet."""

import csv

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from mlvision.models import BackboneConfig, build_teacher, check_identity


def test_mean_of_the_maps_is_the_teachers_answer_on_photos(real_data):
    """A fifth of the photos, whole, squashed to the teacher's size, as bytes; the top-1 must be worth having too."""
    folder = real_data / "imagenet_samples"
    rows = list(csv.DictReader(open(folder / "labels.csv")))[::5]
    teacher = build_teacher(BackboneConfig("tf_efficientnet_lite0", pretrained="package"))
    interpolation = InterpolationMode(teacher.preprocessing.interpolation)
    assert teacher.grid == (7, 7)
    correct = 0
    for start in range(0, len(rows), 25):
        batch = rows[start : start + 25]
        views = []
        for row in batch:
            image = functional.pil_to_tensor(Image.open(folder / "images" / row["image"]).convert("RGB"))
            views.append(functional.resize(image, list(teacher.image_size), interpolation, antialias=True))
        images = torch.stack(views)
        with torch.inference_mode():
            output = teacher(images)
            own = teacher.logits(images) if start == 0 else output.logits
        mean = output.maps.mean((2, 3))
        torch.testing.assert_close(mean, own, rtol=0, atol=1e-4)
        assert torch.equal(mean.argmax(1), own.argmax(1))
        if start == 0:
            assert check_identity(teacher, images, strict=True) is None
        correct += sum(int(row["index"]) == int(p) for row, p in zip(batch, mean.argmax(1), strict=True))
    assert correct / len(rows) >= 0.80
