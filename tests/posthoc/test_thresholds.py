import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import context

from mlvision.data.manifest import Manifest
from mlvision.errors import InputError
from mlvision.evaluators import MultilabelConfig
from mlvision.metrics import multilabel_summary, per_class_table
from mlvision.posthoc import ThresholdsConfig
from mlvision.posthoc.thresholds import best_thresholds
from mlvision.space import LabelSpace
from mlvision.types import Predictions

NAN = math.nan


def best_by_trying(scores, targets):
    """One class: every middle of two neighbouring scores, and half of the lowest one, tried as a threshold."""
    known = [(float(s), float(t)) for s, t in zip(scores, targets, strict=True) if not math.isnan(t)]
    ends = [0.0, *sorted({s for s, _ in known})]
    tried = []
    for low, high in itertools.pairwise(ends):
        cut = float(np.float32((low + high) / 2))
        hits = sum(t for s, t in known if s >= cut)
        f1 = 2 * hits / (sum(s >= cut for s, _ in known) + sum(t for _, t in known))
        tried.append((f1, -abs(cut - 0.5), cut))
    best = max(tried, default=(0, 0, 0))
    return best[2] if best[0] > 0 else 0.5


@pytest.mark.parametrize("steps", [7, 1000])  # many equal scores, few equal ones
def test_thresholds_are_the_best_of_all(steps):
    draw = np.random.default_rng(3)
    targets = (draw.random((40, 30)) < np.linspace(0, 1, 30)).astype(np.float32)
    scores = (draw.integers(0, steps + 1, targets.shape) / steps * 0.8 + 0.2 * targets).astype(np.float32)
    targets[draw.random(targets.shape) < 0.2] = NAN
    found = best_thresholds(torch.from_numpy(scores), torch.from_numpy(targets)).tolist()
    assert found == pytest.approx([best_by_trying(s, t) for s, t in zip(scores.T, targets.T, strict=True)])


@pytest.mark.parametrize(
    ("scores", "targets", "expected"),
    [
        ([0.9, 0.6, 0.3, 0.1], [1, 1, 0, 0], 0.45),
        ([0.4, 0.3, 0.2, 0.1], [1, 0, 1, 0], 0.15),  # F1 2/3, 1/2, 4/5, 2/3
        ([0.8, 0.8, 0.8, 0.2], [1, 0, 1, 0], 0.5),  # equal scores stay together
        ([0.9, 0.7, 0.3, 0.2], [1, 0, 0, 1], 0.8),  # 2/3 both with one and with all: 0.8 is nearer than 0.1
        ([0.9, 0.7, 0.3, 0.2], [1, NAN, NAN, 1], 0.1),
        ([0.0, 0.0], [1, 0], 0.5),  # no threshold above 0 finds it
        ([1.0, 1.0], [1, 0], 0.5),
        ([0.3, 0.2], [0, 0], 0.5),
        ([0.3, 0.2], [NAN, NAN], 0.5),
    ],
)
def test_thresholds_by_hand(scores, targets, expected):
    found = best_thresholds(torch.tensor(scores)[:, None], torch.tensor(targets, dtype=torch.float32)[:, None])
    assert found.tolist() == [pytest.approx(expected)]


def test_neighbours_of_float32_are_told_apart():
    """Their middle is rounded to one of them; a threshold of 1, which has no log-odds, is never given."""
    one = torch.tensor(1.0)
    even = torch.tensor(0.75)
    odd = even.nextafter(one)
    for low, high in ((even, odd), (odd, odd.nextafter(one))):
        cut = best_thresholds(torch.stack([high, low, low])[:, None], torch.tensor([[1.0], [0.0], [0.0]]))
        assert low < cut <= high
    below = one.nextafter(torch.tensor(0.0))
    cut = best_thresholds(torch.stack([one, below, torch.tensor(0.1)])[:, None], torch.tensor([[1.0], [0.0], [0.0]]))
    assert 0.1 < cut < 1


def made(targets, logits, exclusive=()):
    space = LabelSpace(context(logits.shape[1]).space.classes, exclusive=exclusive)
    return Predictions(logits, targets, torch.arange(len(logits)), space)


def test_the_best_f1_is_what_the_metrics_give():
    """No threshold for all classes does better by the mean of the classes' F1."""
    draw = torch.Generator().manual_seed(0)
    targets = (torch.rand(200, 5, generator=draw) < torch.tensor([0.05, 0.1, 0.3, 0.5, 0.9])).float()
    given = made(targets, torch.randn(200, 5, generator=draw) + targets - torch.linspace(3, -2, 5))
    applied = ThresholdsConfig().fit(given, context(5)).apply(given)
    split = Manifest(given.space.classes, [], "val")
    own = MultilabelConfig().build(context(5)).measure(applied, split)
    assert math.isnan(own["threshold"])
    assert MultilabelConfig().build(context(5)).measure(given, split)["threshold"] == 0.5
    for threshold in np.linspace(0.01, 0.99, 99):
        assert own["CF1_mean"] >= multilabel_summary(given.logits, targets, threshold=float(threshold))["CF1_mean"]
    rows = per_class_table(given.logits, targets, given.space.classes, threshold=applied.thresholds)
    scores = given.logits.sigmoid()
    for c, row in enumerate(rows):
        decided = scores[:, c] >= best_by_trying(scores[:, c], targets[:, c])
        f1 = 2 * (decided * targets[:, c]).sum() / (decided.sum() + targets[:, c].sum())
        assert row["f1"] == pytest.approx(f1.item())
    with pytest.raises(InputError, match="threshold: expected one, or one for each of 5 classes, got"):
        multilabel_summary(given.logits, targets, threshold=torch.full((4,), 0.5))
    with pytest.raises(InputError, match="threshold 1.0: expected a probability between 0 and 1"):
        multilabel_summary(given.logits, targets, threshold=np.ones(5))


def test_rare_classes_and_classes_that_exclude_each_other_keep_one_half():
    targets = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    given = made(targets, torch.tensor([[-1.0, -1, -1, -1], [-1, -1, -1, -1], [-3, -3, -3, -3], [-3, -3, -3, -3]]))
    middle = (torch.tensor(-1.0).sigmoid() + torch.tensor(-3.0).sigmoid()).item() / 2
    lowest = torch.tensor(-3.0).sigmoid().item() / 2
    step = ThresholdsConfig(min_positives=2).fit(given, context(4))
    assert step.state() == {"thresholds": pytest.approx([middle, 0.5, lowest, lowest]), "num_fitted": 3}
    assert step.phrase == "thresholds of the highest F1 for 3 of 4 classes (1 keep 0.5)"
    grouped = made(targets, given.logits, exclusive=(1, 1, 2))
    step = ThresholdsConfig(min_positives=1).fit(grouped, context(4))
    assert step.state() == {"thresholds": pytest.approx([middle, middle, 0.5, 0.5]), "num_fitted": 2}
    for refused, options in ((grouped, {"min_positives": 3}), (made(targets, given.logits, exclusive=(4,)), {})):
        with pytest.raises(InputError, match="posthoc.thresholds: expected a class .* got none among 4"):
            ThresholdsConfig(**options).fit(refused, context(4))
    with pytest.raises(InputError, match="posthoc.thresholds.min_positives: expected 1 or more, got 0"):
        ThresholdsConfig(min_positives=0)
    assert replace(given).thresholds == 0.5
