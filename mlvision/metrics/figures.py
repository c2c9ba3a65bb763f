"""Pictures of an evaluation. Drawn through matplotlib's object interface: no pyplot, no global state."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Float, Float64, Shaped
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlvision.lettering import families, short
from mlvision.metrics.average_precision import (
    average_precisions,
    mean_average_precision,
    precision_envelope,
    ranks_of_positives,
)
from mlvision.metrics.inputs import ArrayT, to_array
from mlvision.metrics.summary import check_names

# Okabe and Ito's blue and vermilion: apart from each other for every kind of colour vision, and in grey print.
BEST, WORST, OTHER, INK = "#0072b2", "#d55e00", "#b4bac1", "#22262b"
NUM_NAMED = 3
MAX_BARS = 40
RECALLS = np.linspace(0, 1, 201)


def draw_precision_recall(
    path: str | Path | IO[bytes],
    logits: Float[ArrayT, "N C"],
    targets: Shaped[ArrayT, "N C"],
    classes: Sequence[str],
    *,
    title: str = "",
) -> None:
    """Draw the precision-recall curve of each class, their mean, and the classes ordered by average precision.

    A curve is drawn in steps, so the area under it is the class's plain AP: straight lines between its points would
    flatter it. The mean is taken over envelopes, since plain curves saw. Classes without a known positive are left out
    and counted.

    Args:
        path: A PNG; its folder must exist.
        logits: Raw outputs (or any scores, only their order counts).
        targets: 1 present, 0 absent, NaN unknown.
        classes: Their names.
        title: What was evaluated, such as data set, split and resolution.

    Raises:
        InputError: As `average_precision`; not one name for each class.
    """
    check_names(classes, logits.shape[1])
    ap, ap_envelope = (to_array(values) for values in average_precisions(logits, targets, ("plain", "envelope")))
    s, t = to_array(logits), to_array(targets)
    order = [int(c) for c in np.argsort(-ap, kind="stable") if not np.isnan(ap[c])]  # best first

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    curves, bars = figure.subplots(1, 2, width_ratios=(1.35, 1))
    mean, num_skipped = mean_average_precision(ap)
    facts = f"mAP {mean:.4f} (plain), {len(s):,} images, {len(order)} classes"
    facts += f", {num_skipped} without positives left out" if num_skipped else ""
    write_title(figure, [title, facts])

    colours = dict.fromkeys(order, OTHER)
    if len(order) >= 2 * NUM_NAMED:
        colours |= dict.fromkeys(order[:NUM_NAMED], BEST) | dict.fromkeys(order[-NUM_NAMED:], WORST)
    _draw_curves(curves, s, t, order, colours, float(np.nanmean(ap_envelope)) if order else float("nan"))
    _draw_bars(bars, ap, (t == 1).sum(axis=0), classes, order, colours)
    figure.savefig(path, dpi=130, format="png")


def _draw_curves(
    axes: Axes,
    scores: Float[np.ndarray, "N C"],
    targets: Shaped[np.ndarray, "N C"],
    order: list[int],
    colours: dict[int, str],
    mean: float,
) -> None:
    for level in (0.2, 0.4, 0.6, 0.8):
        recall = np.linspace(level / (2 - level), 1, 100)
        axes.plot(recall, level * recall / (2 * recall - level), color=OTHER, linewidth=0.7, linestyle=(0, (2, 4)))
        axes.text(1.005, level / (2 - level), f"F1 {level}", color="#7b838c", fontsize=8, va="center")

    envelopes = []
    for c in order:
        found, shown = ranks_of_positives(scores[:, c], targets[:, c])
        recall, precision = found / len(found), found / shown
        envelopes.append(_at_recalls(recall, precision_envelope(found, shown)))
        named = colours[c] != OTHER
        axes.plot(
            np.concatenate([[0], recall]),
            np.concatenate([precision[:1], precision]),
            color=colours[c],
            linewidth=1.1 if named else 0.8,
            alpha=0.95 if named else max(0.3, min(0.9, 30 / len(order))),
            zorder=3 if named else 2,
            drawstyle="steps-pre",
        )
    if envelopes:
        label = f"mean (area: mAP_envelope {mean:.4f})"
        axes.plot(RECALLS, np.mean(envelopes, axis=0), color=INK, linewidth=2.6, zorder=4, label=label)
    for colour, label in ((BEST, f"{NUM_NAMED} best"), (WORST, f"{NUM_NAMED} worst"), (OTHER, "a class")):
        if colour in colours.values():
            axes.plot([], [], color=colour, linewidth=1.6, label=label)
    if envelopes:
        # Above the axes: inside, every corner holds curves that matter.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=9.5, frameon=False, columnspacing=1.2)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    _strip(axes)


def _draw_bars(
    axes: Axes,
    ap: Float64[np.ndarray, " C"],
    supports: Shaped[np.ndarray, " C"],
    classes: Sequence[str],
    order: list[int],
    colours: dict[int, str],
) -> None:
    if not order:
        axes.text(0.5, 0.5, "no class has a known positive", ha="center", color=INK, transform=axes.transAxes)
        axes.set_axis_off()
        return
    # Where all do not fit, the middle of the list is what the reader misses least; a gap shows the cut.
    num_left_out = max(len(order) - MAX_BARS, 0)
    half = MAX_BARS // 2
    rows: list[int | None] = [*order] if not num_left_out else [*order[:half], None, *order[-half:]]
    size = min(10.0, 340 / len(rows))
    names = []
    for y, c in enumerate(rows):
        if c is None:
            axes.text(
                0.01,
                y,
                f"{num_left_out} more classes between",
                fontsize=size,
                style="italic",
                color="#7b838c",
                va="center",
            )
            names.append("")
            continue
        axes.barh(y, ap[c], height=0.72, color=colours[c])
        axes.text(ap[c] + 0.01, y, f"{ap[c]:.3f}", fontsize=size, color=INK, va="center")
        names.append(f"{literal(short(classes[c]))}  ({supports[c]:,})")
    axes.set_yticks(range(len(rows)), names, fontsize=size, fontfamily=families(names))
    axes.set(
        xlim=(0, 1.1),
        ylim=(len(rows) - 0.4, -0.6),
        xticks=np.linspace(0, 1, 6),
        xlabel="AP of each class (its positives)",
    )
    axes.tick_params(axis="y", length=0)
    _strip(axes)


def _at_recalls(recall: Float64[np.ndarray, " P"], envelope: Float64[np.ndarray, " P"]) -> Float64[np.ndarray, " R"]:
    """Read an envelope at fixed recalls: the precision of the first positive that reaches each."""
    return envelope[np.searchsorted(recall, RECALLS - 1e-12)]  # 3 / 10 reaches 0.3, however both are rounded


def _strip(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def write_title(figure: Figure, lines: Sequence[str], color: str = INK) -> None:
    """Lines over a whole figure, the empty ones left out."""
    words = [short(line, int(10 * figure.get_figwidth())) for line in lines if line]
    figure.suptitle(literal("\n".join(words)), fontsize=13, color=color, fontfamily=families(words))


def literal(text: str) -> str:
    """Keep matplotlib from reading the dollars of a name as mathematics."""
    return text.replace("$", r"\$")
