import math

import numpy as np
import pytest
import torch
from factories import context
from sklearn.metrics import coverage_error, label_ranking_average_precision_score, label_ranking_loss

from mlvision.data.manifest import Manifest
from mlvision.evaluators import LabelRankingConfig
from mlvision.space import LabelSpace
from mlvision.types import Predictions


def ranking(logits, targets, softmax=False):
    space = LabelSpace(tuple(map(str, range(logits.shape[1]))))
    predictions = Predictions(logits, targets, torch.arange(len(logits)), space.with_softmax() if softmax else space)
    manifest = Manifest(space.classes, (), "val")
    return LabelRankingConfig().build(context(logits.shape[1])).measure(predictions, manifest)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("num_images", "num_classes"), [(200, 7), (3, 40), (50, 2)])
def test_it_is_what_scikit_learn_gives(num_images, num_classes, softmax):
    """With ties, images without labels, and images with nothing else."""
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randint(-4, 4, (num_images, num_classes), generator=generator).float()
    targets = (torch.rand(num_images, num_classes, generator=generator) < 0.4).float()
    targets[0], targets[1] = 0.0, 1.0
    arrays = targets.numpy().astype(int), logits.numpy()
    expected = {
        "LRAP": label_ranking_average_precision_score(*arrays),
        "coverage_error": coverage_error(*arrays),
        "ranking_loss": label_ranking_loss(*arrays),
    }
    assert ranking(logits, targets, softmax) == pytest.approx(expected, rel=1e-12)


def test_unknown_classes_are_out_of_the_ranking():
    """As if the table had no such column; an image of which nothing is known counts nowhere."""
    logits = torch.tensor([[3.0, 9.0, 1.0, 2.0], [0.5, 9.0, 0.7, 0.1], [1.0, 2.0, 3.0, 4.0]])
    targets = torch.tensor([[0.0, math.nan, 1.0, 1.0], [1.0, math.nan, 0.0, 0.0], [math.nan] * 4])
    kept = [0, 2, 3]
    assert ranking(logits, targets) == pytest.approx(ranking(logits[:2, kept], targets[:2, kept]), rel=1e-12)


def test_by_hand():
    """Ranks 1 (not a label), 2 and 3 (labels): precision 1/2 and 2/3; both pairs are wrong."""
    found = ranking(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 1.0]]))
    assert found == pytest.approx({"LRAP": 7 / 12, "coverage_error": 3.0, "ranking_loss": 1.0})


def test_of_nothing_known_there_is_no_number():
    found = ranking(torch.zeros(2, 3), torch.full((2, 3), math.nan))
    assert all(np.isnan(value) for value in found.values())
