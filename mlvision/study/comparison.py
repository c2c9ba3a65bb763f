"""Explainers measured on the same pairs of an image and a label: which pairs belong together, means over labels, tables."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from mlvision.errors import InputError
from mlvision.explain import CONTROLS, Subject
from mlvision.explain.selection import OUTCOMES
from mlvision.files import spreadsheet_text, whole_file
from mlvision.metrics.faithfulness import CrossLabelMatrix, cross_label_matrix
from mlvision.study.measure import FACTS, PAIR, Judged, MeasureConfig, measure, randomised, sensitivity


def shown_measures(baselines: Sequence[str], radii: Sequence[float]) -> dict[str, str]:
    """The measures that the printed table shows, and which way is better."""
    first = baselines[0]
    return {
        **{f"srg_{name}": f"SRG, {name} ^" for name in baselines},
        f"specificity_{first}": "specificity ^",
        "map_discrimination": "discrimination",
        "pointing": "pointing ^",
        "pointing_small": "pointing, area < 15 % ^",
        "mass_lift": "mass lift ^",
        "rank_accuracy": "rank accuracy ^",
        **{f"max_sensitivity_{radius:g}": f"Max-Sens. {radius:g} v" for radius in radii},
        "gini": "Gini",
        "png_bytes": "PNG bytes v",
        "forwards": "forwards v",
    }


# When a pair of an image and a label belongs to which case; never are they pooled.
CASES = {
    "clear": "found, the only label of its image",
    "competing": "found, beside other labels",
    "FP": "seen where it is not",
    "FN": "missed",
}


def label_means(columns: dict[str, np.ndarray], name: str, which: np.ndarray) -> tuple[float, int]:
    """The mean over labels of a measure's mean over each label's pairs, and how many pairs it was defined for."""
    values = columns[name][which].astype(np.float64)
    labels = np.stack([columns["label"][which], columns["against"][which]], axis=1)  # a contrast is a label of its own
    defined = np.isfinite(values)
    if not defined.any():
        return float("nan"), 0
    values, labels = values[defined], labels[defined]
    means = [values[(labels == label).all(1)].mean() for label in np.unique(labels, axis=0)]
    return float(np.mean(means)), int(defined.sum())


def cases(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Which pairs belong to each of CASES."""
    outcome, alone = columns["outcome"], columns["num_present"] == 1
    found = outcome == OUTCOMES.index("TP")
    return {
        "clear": found & alone,
        "competing": found & ~alone,
        "FP": outcome == OUTCOMES.index("FP"),
        "FN": outcome == OUTCOMES.index("FN"),
    }


def by_case(columns: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Of each case: how many pairs, how many of them flat, and each column's mean over labels."""
    found = {}
    for case, which in cases(columns).items():
        means = {key: label_means(columns, key, which) for key in columns if key not in PAIR}
        found[case] = {
            "pairs": int(which.sum()),
            "flat": int(columns["flat"][which].sum()),
            "means": {key: mean for key, (mean, _) in means.items()},
            "defined": {key: count for key, (_, count) in means.items()},
        }
    return found


def measured_means(columns: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Of each case the measures' means over labels alone."""
    return {
        case: {key: mean for key, mean in found["means"].items() if key not in FACTS}
        for case, found in by_case(columns).items()
    }


def join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Batches to one table; a measure that some batches lack is NaN there."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    return {
        name: np.concatenate([part.get(name, np.full(len(part["image"]), np.nan)) for part in parts]) for name in names
    }


def write_pairs(
    path: Path, tables: Mapping[str, dict[str, np.ndarray]], split: str, keys: Sequence[str], classes: Sequence[str]
) -> None:
    """A CSV with a row for each explained label of each method: of contrasts, `against` is their second label.

    Names that a spreadsheet would take for a formula get an apostrophe in front.

    Args:
        split: what the split is called.
        keys: of all images of the manifest, whose rows the tables give.
        classes: all class names.
    """
    words = {
        "image": lambda row: spreadsheet_text(keys[int(row)]),
        "label": lambda label: spreadsheet_text(classes[int(label)]),
        "against": lambda label: "" if label < 0 else spreadsheet_text(classes[int(label)]),
        "outcome": lambda outcome: "unknown" if outcome < 0 else OUTCOMES[outcome],
    }
    names = list(dict.fromkeys(key for table in tables.values() for key in table))
    with whole_file(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "method", *names])
        for method, table in tables.items():
            for row in range(len(table["image"])):
                cells = {name: table[name][row] if name in table else "" for name in names}
                writer.writerow(
                    [split, method, *(words[name](cell) if name in words else cell for name, cell in cells.items())]
                )


class Comparison:
    """Measures every explainer on batch after batch; one that a batch shows to be impossible is left out from then on.

    Args:
        sensitive: rows of the images on which Max-Sensitivity is measured, which explains every image again and again.
        randomise: rows of the images whose maps are compared with those of randomised weights.
        seed: of explainers and controls that draw at random, and of noise.
    """

    def __init__(
        self,
        subject: Subject,
        explainers: Mapping[str, Any],
        measures: MeasureConfig,
        sensitive: Int64[Tensor, " n"],
        randomise: Int64[Tensor, " m"],
        seed: int = 0,
    ):
        self._subject, self._explainers, self._measures = subject, dict(explainers), measures
        self._sensitive, self._randomise, self._seed = sensitive, randomise, seed
        self._columns: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in explainers}
        self._drops: dict[str, list[np.ndarray]] = {name: [] for name in explainers}
        self._sanity: dict[str, list[tuple[int, list[dict[str, Any]]]]] = {name: [] for name in explainers}

    def add(self, judged: Judged) -> None:
        """Measure every explainer on a batch."""
        for name in list(self._explainers):
            try:
                self._add(name, judged)
            except InputError as error:
                print(f"left out: {name} ({error})")
                for table in (self._explainers, self._columns, self._drops, self._sanity):
                    del table[name]

    def _add(self, name: str, judged: Judged) -> None:
        explainer, once = self._explainers[name], replace(self._measures, sensitivity_samples=0)
        found = measure(self._subject, judged, explainer, once, self._seed)
        which = torch.isin(judged.rows, self._sensitive)
        if self._measures.sensitivity_samples and which.any():
            noisy = sensitivity(self._subject, judged.some(which), explainer, self._measures, seed=self._seed)
            place = which[judged.pairs[0].cpu()].numpy()
            for key, values in noisy.items():
                found.columns[key] = np.full(len(place), np.nan)
                found.columns[key][place] = values
        which = torch.isin(judged.rows, self._randomise)
        if which.any():
            part = judged.some(which)
            stages = randomised(self._subject, part, explainer, seed=self._seed)
            self._sanity[name].append((len(part.pairs[0]), stages))
        self._columns[name].append(found.columns)
        self._drops[name].append(found.drops)

    @property
    def tables(self) -> dict[str, dict[str, np.ndarray]]:
        """Each explainer's columns, of all batches; none where nothing was measured."""
        return {name: join(parts) for name, parts in self._columns.items() if parts}

    def cross_label(self, num_classes: int) -> dict[str, CrossLabelMatrix]:
        """The cross-label matrix of each explainer."""
        matrices = {}
        for name, table in self.tables.items():
            # Of labels that were found, whose evidence is really there.
            groups = cases(table)
            which = (groups["clear"] | groups["competing"]) & ~table["flat"]
            labels = table["label"][which]
            drops = np.concatenate(self._drops[name])[which]
            matrices[name] = cross_label_matrix(drops[:, None], labels[:, None], num_classes)
        return matrices

    def methods(self, matrices: Mapping[str, CrossLabelMatrix]) -> dict[str, dict[str, Any]]:
        """Of each explainer its options, the means by case, what random weights do, and means of its cross-label matrix."""
        return {
            name: {
                "options": options_of(self._explainers[name]),
                "control": name in CONTROLS,
                "cases": by_case(table),
                "randomised": _mean_by_stage(self._sanity[name]),
                "cross_label": own_and_others(matrices[name].drops),
            }
            for name, table in self.tables.items()
        }


def own_and_others(drops: Float64[np.ndarray, "C C"]) -> dict[str, float]:
    """Means over the pairs of labels that a cross-label matrix knows: of each label with itself, and with others."""
    own = np.eye(len(drops), dtype=bool)
    parts = {"own": drops[own], "others": drops[~own]}
    return {name: float(np.nanmean(part)) if np.isfinite(part).any() else math.nan for name, part in parts.items()}


def options_of(explainer: Any) -> dict[str, Any]:
    """The fields of an explainer's dataclass; none where it is no dataclass."""
    return asdict(explainer) if is_dataclass(explainer) and not isinstance(explainer, type) else {}


def _mean_by_stage(parts: list[tuple[int, list[dict[str, Any]]]]) -> list[dict[str, float]]:
    """The mean over batches, by their number of pairs, of what `randomised` gives."""
    stages = []
    for rows in zip(*(part for _, part in parts), strict=True):
        values = [(count, row["spearman"]) for (count, _), row in zip(parts, rows, strict=True)]
        known = [(count, value) for count, value in values if not math.isnan(value)]
        total = sum(count for count, _ in known)
        mean = sum(count * value for count, value in known) / total if total else math.nan
        stages.append({"share": rows[0]["share"], "spearman": mean})
    return stages


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """A table for each case; controls last. Of several results (runs that differ in their seed) mean +- sample deviation.

    Args:
        results: what `tools/explain.py compare` writes to comparison.json.
    """
    first, measures = results[0]["methods"], results[0]["options"]["measures"]
    titles = shown_measures(measures["baselines"], measures["sensitivity"])
    methods = sorted(first, key=lambda name: first[name]["control"])
    lines = []
    for case, meaning in CASES.items():
        pairs = [result["methods"][methods[0]]["cases"][case]["pairs"] for result in results]
        lines += [f"### {case}: {meaning} ({' + '.join(map(str, pairs))} pairs)", ""]
        values = {name: {key: _means(results, name, case, key) for key in titles} for name in methods}
        shown = [key for key in titles if any(values[name][key] for name in methods)]
        if not shown:
            lines += ["none", ""]
            continue
        lines.append(f"| explainer | {' | '.join(titles[key] for key in shown)} |")
        lines.append(f"| --- | {' | '.join('---:' for _ in shown)} |")
        for name in methods:
            lines.append(f"| {_title(name, first)} | {' | '.join(_cell(values[name][key]) for key in shown)} |")
        lines.append("")
    lines += ["### Spearman correlation with the maps after layers got random weights, from the head down: v", ""]
    stages = [row["share"] for row in next((one["randomised"] for one in first.values() if one["randomised"]), [])]
    if not stages:
        return "\n".join([*lines, "not measured", ""])
    lines.append(f"| explainer | {' | '.join(f'{share:.0%} of the layers' for share in stages[1:])} |")
    lines.append(f"| --- | {' | '.join('---:' for _ in stages[1:])} |")
    for name in methods:
        rows = [result["methods"][name]["randomised"] for result in results]
        cells = ([row[stage]["spearman"] for row in rows if row] for stage in range(1, len(stages)))
        known = ([value for value in cell if value is not None and math.isfinite(value)] for cell in cells)
        lines.append(f"| {_title(name, first)} | {' | '.join(map(_cell, known))} |")
    return "\n".join([*lines, ""])


def _title(name: str, methods: dict[str, Any]) -> str:
    return f"*{name}*" if methods[name]["control"] else name


def _means(results: Sequence[dict[str, Any]], method: str, case: str, key: str) -> list[float]:
    """The measure in each result where it is defined."""
    found = [result["methods"][method]["cases"][case]["means"].get(key) for result in results]
    return [value for value in found if value is not None and math.isfinite(value)]


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    text = _figure(float(np.mean(values)), 3)
    return text if len(values) < 2 else f"{text} +- {_figure(float(np.std(values, ddof=1)), 2)}"


def _figure(value: float, digits: int) -> str:
    if abs(value) < 1e-9:  # what rounding leaves of 0
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
