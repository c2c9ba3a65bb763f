import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mlvision.errors import InputError
from mlvision.metrics import average_precision
from mlvision.metrics.figures import BEST, WORST, draw_precision_recall


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, so that a test can read what is in them."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    return figures


def simulated(num_images=300, num_classes=12, seed=0):
    rng = np.random.default_rng(seed)
    targets = (rng.random((num_images, num_classes)) < 0.2).astype(np.float32)
    gap = np.linspace(0.2, 4, num_classes)
    return (rng.standard_normal(targets.shape) + gap * targets).round(1).astype(np.float32), targets


def step_area(line):
    assert line.get_drawstyle() == "steps-pre"
    recall, precision = line.get_data()
    return float((np.diff(recall) * precision[1:]).sum())


def test_the_area_under_each_curve_is_its_ap_and_bars_are_in_order(tmp_path, drawn):
    logits, targets = simulated()
    targets[:, 5] = 0
    targets[np.random.default_rng(1).random(targets.shape) < 0.1] = math.nan
    names = [f"class {c}" for c in range(12)]
    draw_precision_recall(tmp_path / "pr.png", torch.from_numpy(logits), torch.from_numpy(targets), names, title="toy")
    curves, bars = drawn[0].axes
    ap = average_precision(logits, targets)
    order = [c for c in np.argsort(-ap) if c != 5]

    lines = [line for line in curves.get_lines() if line.get_drawstyle() == "steps-pre"]
    np.testing.assert_allclose([step_area(line) for line in lines], ap[order], rtol=1e-12)
    assert [line.get_color() for line in lines] == [BEST] * 3 + ["#b4bac1"] * 5 + [WORST] * 3
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], ap[order], rtol=1e-12)
    positives = (targets == 1).sum(axis=0)
    assert [text.get_text() for text in bars.get_yticklabels()] == [f"class {c}  ({positives[c]})" for c in order]
    heading = drawn[0].get_suptitle()
    assert heading.startswith("toy\n")
    assert f"mAP {np.nanmean(ap):.4f} (plain), 300 images, 11 classes, 1 without positives left out" in heading


def test_the_area_under_the_mean_is_map_envelope(tmp_path, drawn):
    logits, targets = simulated(num_images=3000, num_classes=5)
    draw_precision_recall(tmp_path / "pr.png", logits, targets, list("abcde"))
    (mean,) = [line for line in drawn[0].axes[0].get_lines() if line.get_label().startswith("mean")]
    recall, precision = mean.get_data()
    expected = average_precision(logits, targets, "envelope").mean()
    assert np.trapezoid(precision, recall) == pytest.approx(expected, abs=2e-3)
    assert f"{expected:.4f}" in mean.get_label()


def test_many_classes_show_both_ends_and_say_how_many_are_between(tmp_path, drawn):
    logits, targets = simulated(num_classes=90)
    draw_precision_recall(tmp_path / "pr.png", logits, targets, [f"class {c}" for c in range(90)])
    bars = drawn[0].axes[1]
    ap = np.sort(average_precision(logits, targets))[::-1]
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], [*ap[:20], *ap[-20:]], rtol=1e-12)
    assert "50 more classes between" in [text.get_text() for text in bars.texts]


def test_writes_a_png_with_ink_and_leaves_matplotlib_alone(tmp_path):
    state = (matplotlib.get_backend(auto_select=False), matplotlib.rcParams.copy())
    path = tmp_path / "pr.png"
    names = ["price in $ and $$", "x" * 60, *"abcdefghij"]
    draw_precision_recall(path, *simulated(), names)
    assert state == (matplotlib.get_backend(auto_select=False), matplotlib.rcParams.copy())
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape == (910, 1690)
    halves = pixels[:, :845], pixels[:, 845:]
    assert all(0.01 < (half < 200).mean() < 0.6 for half in halves)


@pytest.mark.filterwarnings("error:Glyph")
def test_names_of_any_text_are_in_the_picture(tmp_path, drawn):
    names = ["\u732b", "\U0001f98a", "two\nlines", "w" * 10_000, "\udcff", "a\0b", "$x^2$", *"hijkl"]
    draw_precision_recall(tmp_path / "pr.png", *simulated(), names, title="\u732b\n" + "t" * 10_000)
    shown = {text.get_text().rpartition("  (")[0] for text in drawn[0].axes[1].get_yticklabels()}
    assert {"two lines", "w" * 27 + "…", r"\xff", r"a\x00b", r"\$x^2\$"} <= shown
    title = drawn[0].get_suptitle().splitlines()
    assert len(title) == 2
    assert len(title[0]) <= 130


def test_no_positive_at_all_is_said_and_not_an_error(tmp_path, drawn):
    draw_precision_recall(tmp_path / "pr.png", np.zeros((4, 2)), np.zeros((4, 2)), ["a", "b"])
    assert "no class has a known positive" in [text.get_text() for text in drawn[0].axes[1].texts]


def test_one_name_for_each_class(tmp_path):
    with pytest.raises(InputError, match="classes: 1 names for logits of 12 classes"):
        draw_precision_recall(tmp_path / "pr.png", *simulated(), ["a"])
    assert not (tmp_path / "pr.png").exists()
