"""docs/methods/explain.md says what its records say: every cell of its tables of figures is worked out again from them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

PAGE = Path("docs/methods/explain.md")
RECORDS = Path("docs/results/explainers")
METHODS = {
    "Grad-CAM": "grad_cam",
    "Grad-CAM++": "grad_cam_pp",
    "HiResCAM": "hires_cam",
    "LayerCAM": "layer_cam",
    "Occlusion": "occlusion",
    "coarse-to-fine occlusion": "coarse_to_fine",
    "LIME": "lime",
    "RISE, 200 masks": "rise",
    "Saliency": "saliency",
    "SmoothGrad": "smooth_grad",
    "Input x Gradient": "input_x_gradient",
    "Integrated Gradients": "integrated_gradients",
    "DeepLift": "deep_lift",
    "Guided Grad-CAM": "guided_grad_cam",
    "*centre of the image*": "centre",
    "*edges*": "edges",
    "*random maps*": "random",
}
# <!-- records: scenes | competing.srg_mean:1 ... -->: the records' name, then of each column its case, measure and decimals.
MARK = re.compile(r"<!-- records: (\w+) \| (.+) -->")


def tables():
    """Of each marked table: its records, its columns and its rows as lists of cells."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if found := MARK.fullmatch(line):
            assert lines[number + 1].startswith("| "), f"{PAGE}:{number + 1}: no table follows"
            rows = []
            for row in lines[number + 3 :]:
                if not row.startswith("|"):
                    break
                rows.append([cell.strip() for cell in row.strip("|").split("|")])
            yield (
                found[1],
                [re.fullmatch(r"(\w+)\.([\w.]+):(\d)", column).groups() for column in found[2].split()],
                rows,
            )


def read(name):
    paths = sorted(RECORDS.glob(f"{name}-seed*.json"))
    assert len(paths) == 3, name
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def cell(records, method, case, measure, decimals):
    """Mean and sample deviation over the seeds, rounded once; costs, whose unit is the machine's, without the deviation."""
    values = np.array([record["methods"][method]["cases"][case]["means"][measure] for record in records], np.float64)
    mean = f"{values.mean():.{decimals}f}"
    return mean if measure == "forwards" else f"{mean} +- {values.std(ddof=1):.{decimals}f}"


TABLES = list(tables())


@pytest.mark.parametrize(("name", "columns", "rows"), TABLES, ids=[name for name, *_ in TABLES])
def test_every_cell_is_its_records(name, columns, rows):
    records = read(name)
    for label, *cells in rows:
        expected = [cell(records, METHODS[label], *column) for column in columns]
        assert cells == expected, label
    # Nobody is left out, controls least of all.
    assert {METHODS[label] for label, *_ in rows} == set(records[0]["methods"])


def test_every_table_of_figures_is_held_to_records():
    assert [name for name, *_ in TABLES] == ["scenes", "ucmerced", "coco_subset", "scenes_gradients"]
    figures = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|") and " +- " in line
    ]
    assert len(figures) == sum(len(rows) for *_, rows in TABLES)


@pytest.mark.parametrize("name", [name for name, *_ in TABLES])
def test_the_page_names_the_split_that_the_records_read(name):
    assert {record["options"]["split"] for record in read(name)} == {"test"}
    assert "read the **test** split" in PAGE.read_text(encoding="utf-8")


def centred(name, method, case, measure="srg_mean"):
    """How much better than the centre of the image, seed by seed."""
    return np.array(
        [
            np.subtract(*(record["methods"][m]["cases"][case]["means"][measure] for m in (method, "centre")))
            for record in read(name)
        ]
    )


def test_what_the_page_says_of_the_centre():
    sets = ("scenes_gradients", "ucmerced", "coco_subset")
    for name in sets:
        for method in ("saliency", "integrated_gradients"):
            assert (centred(name, method, "FN") > 0).all()
        assert (centred(name, "input_x_gradient", "competing") < 0).all()
    assert all((centred(name, "saliency", "competing") < 0).all() for name in sets[1:])
    # "in two of three seeds": Saliency on scenes, Integrated Gradients on COCO.
    assert (centred("scenes_gradients", "saliency", "competing") < 0).sum() == 2
    assert (centred("coco_subset", "integrated_gradients", "competing") < 0).sum() == 2
    assert all((centred(name, "integrated_gradients", "competing") < 0).all() for name in sets[:2])


@pytest.mark.parametrize(("name", "first", "same"), [("ucmerced", 7, 12), ("coco_subset", 5, 7)])
def test_how_many_pairs_of_the_first_are_ordered_alike_in_every_seed(name, first, same):
    records = read(name)
    scores = {
        method: np.array([record["methods"][method]["cases"]["competing"]["means"]["srg_mean"] for record in records])
        for method in records[0]["methods"]
    }
    best = sorted(scores, key=lambda method: -scores[method].mean())[:first]
    pairs = [scores[a] - scores[b] for i, a in enumerate(best) for b in best[i + 1 :]]
    assert sum(bool((pair > 0).all()) for pair in pairs) == same
    assert f"{same} of the {len(pairs)} pairs" in PAGE.read_text(encoding="utf-8")


def test_what_the_page_says_of_the_cross_label_matrix():
    for method, own, other in (("grad_cam", "7.5", "0.6"), ("occlusion", "8.1", "0.5")):
        falls, gains = [], []
        for record in read("scenes"):
            means = record["methods"][method]["cross_label"]
            falls.append(means["own"])
            gains.append(-means["others"])
        assert (f"{np.mean(falls):.1f}", f"{np.mean(gains):.1f}") == (own, other)
