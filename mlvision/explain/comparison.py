"""Tables of measured explanations: which pairs belong together, means over labels, and the table of a comparison."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlvision.explain.selection import OUTCOMES

# Columns that say which pair it is, and with those of its size and cost all that are no measures of the explanation.
_PAIR = {"image", "label", "outcome", "score", "num_present", "flat"}
FACTS = _PAIR | {"area", "seconds", "forwards"}


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
    values, labels = columns[name][which].astype(np.float64), columns["label"][which]
    defined = np.isfinite(values)
    if not defined.any():
        return float("nan"), 0
    values, labels = values[defined], labels[defined]
    means = [values[labels == label].mean() for label in np.unique(labels)]
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
        means = {key: label_means(columns, key, which) for key in columns if key not in _PAIR}
        found[case] = {
            "pairs": int(which.sum()),
            "flat": int(columns["flat"][which].sum()),
            "means": {key: mean for key, (mean, _) in means.items()},
            "defined": {key: count for key, (_, count) in means.items()},
        }
    return found


def join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Batches to one table; a measure that some batches lack is NaN there."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    return {
        name: np.concatenate([part.get(name, np.full(len(part["image"]), np.nan)) for part in parts]) for name in names
    }


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
    mean = float(np.mean(values))
    text = f"{mean:,.0f}" if abs(mean) >= 1000 else f"{mean:.3g}"
    if len(values) < 2:
        return text
    spread = float(np.std(values, ddof=1))
    return f"{text} +- {f'{spread:,.0f}' if spread >= 1000 else f'{spread:.2g}'}"
