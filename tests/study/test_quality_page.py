"""The summary and the page of a report whose numbers are made up: each must come back where it belongs."""

import copy

import pytest
from matplotlib.figure import Figure
from PIL import Image

from mlvision.study.quality_page import draw_quality, summarise

NAN = float("nan")
OPERATORS = ("mean_logit", "mean_probability", "max")
BINS = [[0.2, 0.6], [0.6, 1.0]]


@pytest.fixture
def quality():
    def crops(base):
        measures = ("top1_image", "mAP_shown", "top1_shown")
        of_operators = {
            name: {key: base + (3 * i + j) / 100 for j, key in enumerate(measures)} for i, name in enumerate(OPERATORS)
        }
        return {"crops": 20, "entropy": base * 3, **of_operators}

    def exact(base):
        return {"crops": 8, "kl_pooled": base / 10, "kl_whole_image": base / 5}

    def row(name, value):
        measures = ("highest_with", "highest_without", "stored", "pointing_game", "mass_in_box")
        chances = {"pointing_game_chance": value / 2, "mass_in_box_chance": value / 4}
        return {"class": name, "images_with": 1234, **dict.fromkeys(measures, value), **chances}

    maps = {"teacher": "runs/t", "kind": "logit", "groups": (3,), "top_k": 5, "grid": (3, 4)}
    return {
        "store": "maps/$a$",
        "maps": maps | {"approximate": None},
        "split": "train_single",
        "labels_split": "train",
        "protocol": "a protocol",
        "num_images": 40,
        "num_images_of_split": 1234,
        "num_classes": 3,
        "agreement": {
            name: {"top1": 0.61 + i / 10, "top1_images": 39, "mAP": 0.53 + i / 10} for i, name in enumerate(OPERATORS)
        },
        "object_sizes": [
            {
                "share_of_area": [0.01, 0.04],
                "labels": 1100,
                "mAP": {name: 0.1 + i / 10 for i, name in enumerate(OPERATORS)},
            },
            {
                "share_of_area": [0.04, 0.2],
                "labels": 1100,
                "mAP": {name: 0.4 + i / 10 for i, name in enumerate(OPERATORS)},
            },
        ],
        "crops": {
            "entropy_of": "mean_logit, nats",
            "all": crops(0.4),
            "bins": [{"area": area, **crops(sum(area) / 4)} for area in BINS],
        },
        "calibration": {
            "ece": 0.0123,
            "entries": 4321,
            "bins": [
                {"count": 4000, "confidence": 0.1, "frequency": 0.2},
                {"count": 0, "confidence": NAN, "frequency": NAN},
                {"count": 321, "confidence": 0.8, "frequency": 0.7},
            ],
        },
        "background": {"expected_labels": 1.234, "labels": 2.345},
        "verdict": [],
        "localisation": {
            "pointing_game": 0.71,
            "pointing_game_chance": 0.31,
            "mass_in_box": 0.52,
            "lift": 2.08,
            "pairs": 2345,
        },
        "classes": [row("cat", 0.3), row("$x^2$", 0.6), row("never there", NAN)],
        "exact": {
            "image_size": [96, 128],
            "unit": "nats",
            "all": {"crops": 16, "kl_pooled": 0.0456, "kl_whole_image": 0.0789},
            "bins": [{"area": area, **exact(sum(area))} for area in BINS],
        },
    }


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a page, and gives its axes back."""
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))

    def axes_of(quality):
        given = copy.deepcopy(quality)
        draw_quality(tmp_path / "page.png.partial", quality)
        assert repr(quality) == repr(given)
        with Image.open(tmp_path / "page.png.partial") as page:
            assert page.format == "PNG"
        return drawn[-1].axes

    return axes_of


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def marks(axes):
    return [path.vertices[0, 1] for lines in axes.collections for path in lines.get_paths()]


def test_the_page_shows_the_numbers(quality, draw):
    agreement, sizes, crops, entropy, exact, calibration, coverage, boxes = draw(quality)
    assert heights(agreement) == pytest.approx([0.61, 0.53, 0.71, 0.63, 0.81, 0.73])
    shown = [line.get_ydata().tolist() for line in sizes.get_lines()]
    assert shown == [pytest.approx(values) for values in ([0.1, 0.4], [0.2, 0.5], [0.3, 0.6])]
    assert sizes.get_xticklabels()[0].get_text() == "0.010 to 0.040\n1,100 labels"
    lines = [line.get_ydata().tolist() for line in crops.get_lines()]
    expected = [
        [b[name][key] for b in quality["crops"]["bins"]] for name in OPERATORS for key in ("top1_image", "mAP_shown")
    ]
    assert lines == expected
    assert crops.get_lines()[0].get_xdata().tolist() == pytest.approx([0.4, 0.8])
    assert [line.get_ydata().tolist() for line in entropy.get_lines()] == [pytest.approx([0.6, 1.2])]
    found = {line.get_label(): line.get_ydata().tolist() for line in exact.get_lines()}
    assert found["of the pooled label"] == pytest.approx([0.08, 0.16])
    assert found["of the whole image's label"] == pytest.approx([0.16, 0.32])
    assert calibration.get_lines()[1].get_xydata().tolist() == [[0.1, 0.2], [0.8, 0.7]]
    assert [text.get_text() for text in calibration.texts] == ["4,000", "321"]
    assert "ECE 0.0123" in calibration.get_title()
    for axes, at in ((coverage, [0.3, 0.6]), (boxes, [0.15, 0.3, 0.075, 0.15])):
        assert heights(axes) == pytest.approx([0.3, 0.6, 0.3, 0.6])
        assert [text.get_text() for text in axes.texts] == ["0.30", "0.60", "0.30", "0.60"]
        assert marks(axes) == pytest.approx(at)
        # A class of which nothing is known has no bar, and dollars are no mathematics.
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["cat (1,234)", r"\$x^2\$ (1,234)"]
    for axes in (agreement, sizes, crops, entropy, exact, calibration, coverage, boxes):
        assert axes.get_title()
        assert axes.get_ylabel()


def test_no_data_lie_under_a_legend(quality, draw):
    quality["agreement"]["max"]["top1"] = quality["crops"]["bins"][0]["max"]["mAP_shown"] = 1.0
    quality["classes"][0] |= {"highest_with": 1.0, "stored": 1.0, "pointing_game": 1.0}
    legends = 0
    for axes in draw(quality):
        if axes.get_legend():
            legends += 1
            bottom = axes.get_legend().get_window_extent().transformed(axes.transData.inverted()).y0
            values = [*heights(axes), *marks(axes), *(y for line in axes.get_lines() for y in line.get_ydata())]
            tops = [text.get_window_extent().transformed(axes.transData.inverted()).y1 for text in axes.texts]
            values += tops if axes.get_title().startswith(("highest", "maps against")) else []
            assert bottom > max(values)
    assert legends == 6


def test_of_many_classes_those_with_the_lowest_bars_are_shown(quality, draw):
    row = quality["classes"][0]
    values = [(7 * i % 50) / 50 for i in range(50)]
    quality["classes"] = [row | {"class": f"c{i}", "highest_with": value} for i, value in enumerate(values)]
    coverage = draw(quality)[6]
    assert heights(coverage)[:40] == sorted(values)[:40]
    assert "the 40 lowest of 50 classes" in coverage.get_title()


def test_what_was_not_measured_has_no_panel(quality, draw):
    quality |= {"exact": None, "localisation": None, "object_sizes": None}
    axes = draw(quality)
    assert len(axes) == 6
    assert [text.get_text() for text in axes[-1].texts] == ["no image has boxes"]
    text = summarise(quality)
    assert "localisation: no image has boxes" in text
    assert "KL" not in text


def test_the_summary_by_hand(quality):
    lines = summarise(quality).splitlines()
    assert lines[0] == "maps/$a$: maps by runs/t, softmax logit, the 5 best classes of each of 3 x 4 cells"
    assert lines[1] == (
        "judged on 40 of 1,234 images of 'train_single' by the labels of 'train', 3 classes; a protocol"
    )
    assert [line.split() for line in lines[4:7]] == [
        ["mean", "logit", "0.6100", "0.5300", "0.4200", "0.4100"],
        ["mean", "probability", "0.7100", "0.6300", "0.4500", "0.4400"],
        ["maximum", "0.8100", "0.7300", "0.4800", "0.4700"],
    ]
    assert (
        lines[7]
        == "mAP of whole images by the share of the image that a label's objects cover (0.010-0.040, 0.040-0.200):"
    )
    assert [line.split() for line in lines[8:11]] == [
        ["mean", "logit", "0.1000", "0.4000"],
        ["mean", "probability", "0.2000", "0.5000"],
        ["maximum", "0.3000", "0.6000"],
    ]
    assert lines[11:] == [
        "entropy (mean_logit, nats): 0.600 in the smallest crops, 1.200 in the largest",
        "calibration of the maximum: ECE 0.0123 over 4,321 labels of images",
        "background: the emptiest cell expects 1.23 labels, an image has 2.35",
        "localisation, 2,345 labels with boxes: pointing game 0.7100 (chance 0.3100), mass in box 0.5200 = 2.08 x chance",
        "KL(exact || pooled), 16 crops at 96x128 px, nats: 0.0456; against the whole image's label 0.0789",
        "verdict: no fault found",
    ]
    quality["maps"]["approximate"], quality["verdict"] = 0.0321, ["one fault", "another"]
    assert summarise(quality).splitlines()[-3:] == [
        "approximate: the mean of the maps differs from the teacher's logits by 0.0321",
        "WARNING: one fault",
        "WARNING: another",
    ]


def test_the_page_warns(quality, draw):
    assert "WARNING" not in draw(quality)[0].figure.get_figure(root=True).get_suptitle()
    quality["verdict"] = ["one fault"]
    assert draw(quality)[0].figure.get_figure(root=True).get_suptitle().endswith("\nWARNING: one fault")
