"""Splits and predictions that evaluators are tried on."""

import numpy as np
import torch
from factories import context

from mlvision.data.manifest import Manifest
from mlvision.data.records import Boxes, Record
from mlvision.space import LabelSpace
from mlvision.types import Predictions

CLASSES = context(3).space.classes


def record(key, labels, sides=(), **columns):
    """An image of 200x100 pixels with one square of each label."""
    xyxy = np.array([[0, 0, side / 200, side / 100] for side in sides], dtype=np.float32).reshape(-1, 4)
    number = len(sides)
    boxes = Boxes(
        xyxy, np.array(labels[:number], dtype=int), np.zeros(number, bool), np.zeros(number, bool), (None,) * number
    )
    return Record(key, key, labels, boxes=boxes if sides else None, size=(200, 100), **columns)


SPACE = LabelSpace(CLASSES)
PLAIN = Manifest(CLASSES, [Record(f"{i}", f"{i}", (i % 3,), unknown=((i + 1) % 3,)) for i in range(6)], "val")
SIZED = Manifest(
    CLASSES,
    [record("a", (0,), (10,)), record("b", (0, 1), (99, 20)), record("c", (2,)), record("d", (1,), (31,))],
    "val",
)
REAL = Manifest(
    CLASSES, [Record("a", "a", (0, 2)), Record("b", "b", (1,)), Record("c", "c", (0,))], "val", real_lists=True
)
UNSEEN = Manifest(CLASSES, [Record("a", "a", (), unknown=(0, 1, 2))], "val")


def predictions(manifest, space=SPACE):
    """Of each image but the first, as where one could not be read."""
    rows = np.arange(len(manifest) > 1, len(manifest))
    logits = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(5))
    return Predictions(logits, torch.from_numpy(manifest.targets[rows]), torch.from_numpy(rows), space)
