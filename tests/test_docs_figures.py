"""The figures of the docs that carry a marker are those of the records.

A marker is a comment behind the figure, invisible on the page, that says where it comes from:

    0.685<!-- relabel_scenes/single_labels mAP -->            mean over the seeds, of the weights that validation chose
    0.890 +- 0.002<!-- relabel_scenes/x mAP -->               with their sample standard deviation
    0.12<!-- relabel_scenes/x gap -->                         the closed gap between the grid's bounds
    -0.002<!-- heads_ucmerced/text_ct-text mAP seed 0 -->     a difference, here of one seed
    0.30 +- 0.05<!-- explainers/scenes_text own_maps competing pointing -->
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from mlvision.commands import results_table

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/methods").glob("*.md")])
MARKED = re.compile(r"(?P<figure>[-+]?\d+\.\d+)(?: \+- (?P<spread>\d+\.\d+))?<!-- (?P<source>[^>]*) -->")


def values_of(grid: str, experiment: str, metric: str) -> dict[int, float]:
    """By seed."""
    if "-" in experiment:
        first, second = (values_of(grid, name, metric) for name in experiment.split("-"))
        return {seed: first[seed] - second[seed] for seed in first.keys() & second.keys()}
    records = [json.loads(path.read_text()) for path in (ROOT / "docs/results" / grid).glob(f"{experiment}-seed*.json")]
    if metric == "gap":
        low, high = (
            values_of(grid, bound, "mAP") for bound in results_table.options_of(ROOT / "configs/grids", grid)["bounds"]
        )
        return {s: (value - low[s]) / (high[s] - low[s]) for s, value in values_of(grid, experiment, "mAP").items()}
    return {record["config"]["seed"]: results_table.chosen_metrics(record)[metric] for record in records}


def measured(source: str) -> list[float]:
    where, *rest = source.split()
    grid, name = where.split("/", 1)
    if grid == results_table.EXPLAINERS:
        method, case, metric = rest
        comparisons = [
            json.loads(path.read_text()) for path in (ROOT / "docs/results" / grid).glob(f"{name}-seed*.json")
        ]
        return [comparison["methods"][method]["cases"][case]["means"][metric] for comparison in comparisons]
    metric, *seed = rest
    values = values_of(grid, name, metric)
    return [values[int(seed[1])]] if seed else list(values.values())


def wrong(text: str, values: Callable[[str], list[float]] = measured) -> list[str]:
    """What a marker of the page contradicts."""
    faults = [f"no figure before <!-- {source} -->" for source in re.findall(r"(?<![\d])<!-- (\w+/[^>]*) -->", text)]
    for match in MARKED.finditer(text):
        figure, spread, source = match["figure"], match["spread"], match["source"]
        of_source = values(source)
        if not of_source:
            faults.append(f"{source}: no record")
            continue
        pairs = [(figure, statistics.mean(of_source))]
        if spread is not None:
            pairs.append((spread, statistics.stdev(of_source)))
        for printed, value in pairs:
            decimals = len(printed.split(".")[1])
            if float(printed) != round(value, decimals):
                faults.append(f"{source}: {printed} is printed, the records say {value:.{decimals + 2}f}")
    return faults


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_marked_figures_are_those_of_the_records(page):
    assert not wrong(page.read_text())


def test_every_record_is_of_a_clean_commit():
    records = sorted((ROOT / "docs/results").rglob("*.json"))
    commits = {path.name: re.findall(r'"commit": "([^"]*)"', path.read_text()) for path in records}
    assert records
    assert not [name for name, found in commits.items() if not found or any("dirty" in commit for commit in found)]


def test_a_wrong_figure_is_found():
    def values(source):
        return {"grid/a mAP": [0.5, 0.7], "grid/none mAP": []}[source]

    assert not wrong("0.60 +- 0.14<!-- grid/a mAP --> and 0.6<!-- grid/a mAP -->", values)
    assert wrong("0.61<!-- grid/a mAP -->", values) == ["grid/a mAP: 0.61 is printed, the records say 0.6000"]
    assert wrong("0.60 +- 0.15<!-- grid/a mAP -->", values) == ["grid/a mAP: 0.15 is printed, the records say 0.1414"]
    assert wrong("0.60<!-- grid/none mAP -->", values) == ["grid/none mAP: no record"]
    assert wrong("much <!-- grid/a mAP -->", values) == ["no figure before <!-- grid/a mAP -->"]
    assert sum(len(MARKED.findall(page.read_text())) for page in PAGES) > 60
