"""The report on label maps: a summary in words, and a page of figures. Both know only what `judge_label_maps` found."""

import textwrap
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from mlvision.lettering import families, short
from mlvision.metrics.figures import BEST, INK, MAX_BARS, OTHER, WORST, literal, write_title
from mlvision.space import has_groups

_NAMES = {"mean_logit": "mean logit", "mean_probability": "mean probability", "max": "maximum"}
_COLOURS = {"mean_logit": WORST, "mean_probability": OTHER, "max": BEST}
_AREA = "crop's share of the image's area"


def summarise(quality: dict[str, Any]) -> str:
    """The report in a few lines, of what `judge_label_maps` found."""
    maps, crops, judged = quality["maps"], quality["crops"], f"'{quality['labels_split']}'"
    lines = [
        f"{quality['store']}: {_source(quality)}",
        f"judged on {quality['num_images']:,} of {quality['num_images_of_split']:,} images of '{quality['split']}' by the "
        f"labels of {judged}, {quality['num_classes']} classes; {quality['protocol']}",
        f"{'pooling operator':18}{'whole images':>24}{'crops, labels they show':>28}",
        f"{'':18}{'top-1':>12}{'mAP (plain)':>12}{'top-1':>16}{'mAP (plain)':>12}",
    ]
    for name, whole in quality["agreement"].items():
        shown = crops["all"][name]
        numbers = whole["top1"], whole["mAP"], shown["top1_shown"], shown["mAP_shown"]
        lines.append(
            f"{_NAMES[name]:18}" + "".join(f"{n:>{w}.4f}" for n, w in zip(numbers, (12, 12, 16, 12), strict=True))
        )
    sizes = quality["object_sizes"]
    if sizes:
        limits = ", ".join("{:.3f}-{:.3f}".format(*part["share_of_area"]) for part in sizes)
        lines.append(f"mAP of whole images by the share of the image that a label's objects cover ({limits}):")
        for name in quality["agreement"]:
            lines.append(f"{_NAMES[name]:18}" + "".join(f"{part['mAP'][name]:>12.4f}" for part in sizes))
    ends = [f"{part['entropy']:.3f}" for part in (crops["bins"][0], crops["bins"][-1])]
    lines.append(f"entropy ({crops['entropy_of']}): {ends[0]} in the smallest crops, {ends[1]} in the largest")
    found = quality["calibration"]
    lines.append(f"calibration of the maximum: ECE {found['ece']:.4f} over {found['entries']:,} labels of images")
    found = quality["background"]
    lines.append(
        f"background: the emptiest cell expects {found['expected_labels']:.2f} labels, an image has {found['labels']:.2f}"
    )
    found = quality["localisation"]
    if found:
        lines.append(
            f"localisation, {found['pairs']:,} labels with boxes: pointing game {found['pointing_game']:.4f} (chance "
            f"{found['pointing_game_chance']:.4f}), mass in box {found['mass_in_box']:.4f} = {found['lift']:.2f} x chance"
        )
    else:
        lines.append("localisation: no image has boxes")
    found = quality["exact"]
    if found:
        lines.append(
            f"KL(exact || pooled), {found['all']['crops']:,} crops at {_pixels(found)}, {found['unit']}: "
            f"{found['all']['kl_pooled']:.4f}; against the whole image's label {found['all']['kl_whole_image']:.4f}"
        )
    if maps["approximate"] is not None:
        lines.append(
            f"approximate: the mean of the maps differs from the teacher's logits by {maps['approximate']:.3g}"
        )
    lines += [f"WARNING: {fault}" for fault in quality["verdict"]] or ["verdict: no fault found"]
    return "\n".join(lines)


def _source(quality: dict[str, Any]) -> str:
    maps = quality["maps"]
    classes = f"the {maps['top_k']} best classes of" if maps["top_k"] else "all classes in"
    kind, groups = maps["kind"], maps["groups"]
    if kind == "logit":
        if has_groups(groups):
            kind = "softmax logit" if len(groups) == 1 else f"logit in {len(groups)} groups"
        else:
            kind = "sigmoid logit"
    return f"maps by {maps['teacher']}, {kind}, {classes} each of {maps['grid'][0]} x {maps['grid'][1]} cells"


def draw_quality(path: Path | IO[bytes], quality: dict[str, Any]) -> None:
    """The page, a PNG: a row of panels over all classes, a row with bars for each class.

    Args:
        quality: as `judge_label_maps` found it: what is undefined is NaN, not None.
    """
    figure = Figure(figsize=(21, 11), layout="constrained")
    FigureCanvasAgg(figure)
    images = f"{quality['num_images']:,} images of '{quality['split']}', judged by '{quality['labels_split']}'"
    warnings = [line for fault in quality["verdict"] for line in textwrap.wrap(f"WARNING: {fault}", 180)]
    write_title(figure, [f"{quality['store']}: {_source(quality)}", images, *warnings], WORST if warnings else INK)
    upper, lower = figure.subfigures(2, 1, squeeze=False).flat
    panels = [
        (_draw_agreement, quality["agreement"]),
        (_draw_sizes, quality["object_sizes"]),
        (_draw_crops, quality["crops"]),
        (_draw_entropy, quality["crops"]),
        (_draw_exact, quality["exact"]),
        (_draw_calibration, quality["calibration"]),
    ]
    panels = [(draw, found) for draw, found in panels if found is not None]
    for axes, (draw, found) in zip(upper.subplots(1, len(panels)), panels, strict=True):
        draw(axes, found)
    coverage, boxes = lower.subplots(1, 2)
    bars = {"highest_with": ("images with the label", BEST), "highest_without": ("images without it", OTHER)}
    label = "share of the images with the label whose map stores it"
    _draw_classes(coverage, quality["classes"], bars, ["stored"], label, "highest probability in a map: mean by class")
    if quality["localisation"]:
        bars = {"pointing_game": ("pointing game", BEST), "mass_in_box": ("mass in boxes", WORST)}
        chance = [f"{key}_chance" for key in bars]
        label = "chance: what a constant map scores"
        _draw_classes(boxes, quality["classes"], bars, chance, label, "maps against boxes: mean by class")
    else:
        boxes.text(0.5, 0.5, "no image has boxes", ha="center", transform=boxes.transAxes)
        boxes.set_axis_off()
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")


def _draw_agreement(axes: Axes, found: dict[str, dict[str, Any]]) -> None:
    for number, (name, values) in enumerate(found.items()):
        for place, key in enumerate(("top1", "mAP")):
            x = place + (number - (len(found) - 1) / 2) * 0.27
            axes.bar(x, values[key], width=0.25, color=_COLOURS[name], label=_NAMES[name] if not place else None)
            axes.text(x, values[key] + 0.01, f"{values[key]:.3f}", ha="center", fontsize=8, color=INK)
    images = next(iter(found.values()))["top1_images"]
    axes.set_xticks([0, 1], [f"top-1 ({images:,} images)", "mAP (plain)"])
    axes.set(ylabel="top-1 accuracy, mAP", title="whole images against their labels")
    _leave_room(axes, 1.0, 1.3)
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def _draw_crops(axes: Axes, crops: dict[str, Any]) -> None:
    middle = [np.mean(part["area"]) for part in crops["bins"]]
    labels = {"top1_image": ("top-1, image's labels", ":"), "mAP_shown": ("mAP, labels the crop shows", "-")}
    names = [name for name in _NAMES if name in crops["all"]]
    for number, name in enumerate(names):
        for key, (label, style) in labels.items():
            values = [part[name][key] for part in crops["bins"]]
            # Operators often agree: the first lines are broad, so that they show beneath the last.
            looks = {"color": _COLOURS[name], "linewidth": 1.5 * (len(names) - number), "ms": 4}
            axes.plot(middle, values, style, marker="o", label=f"{_NAMES[name]}: {label}", **looks)
    axes.set(xlabel=_AREA, ylabel="top-1 accuracy, mAP", title="random crops")
    _leave_room(axes, 1.0, 1.45)
    axes.legend(frameon=False, loc="upper left", fontsize=8)


def _draw_sizes(axes: Axes, sizes: list[dict[str, Any]]) -> None:
    for number, name in enumerate(sizes[0]["mAP"]):
        width = 1.5 * (len(sizes[0]["mAP"]) - number)
        values = [part["mAP"][name] for part in sizes]
        axes.plot(range(len(sizes)), values, "o-", ms=4, color=_COLOURS[name], linewidth=width, label=_NAMES[name])
    names = ["{:.3f} to {:.3f}\n{:,} labels".format(*part["share_of_area"], part["labels"]) for part in sizes]
    axes.set_xticks(range(len(sizes)), names, fontsize=8)
    axes.set(
        xlabel="share of the image that the label's objects cover", ylabel="mAP", title="by the size of the objects"
    )
    _leave_room(axes, 1.0, 1.3)
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def _draw_entropy(axes: Axes, crops: dict[str, Any]) -> None:
    values = [part["entropy"] for part in crops["bins"]]
    name, unit = crops["entropy_of"].split(", ")
    axes.plot([np.mean(part["area"]) for part in crops["bins"]], values, marker="o", ms=4, color=INK)
    axes.set(xlabel=_AREA, ylabel=f"entropy, {unit}", title=f"entropy of a crop's label ({_NAMES[name]})")
    _leave_room(axes, np.nanmax(values), 1.1)


def _draw_exact(axes: Axes, answers: dict[str, Any]) -> None:
    middle, highest = [np.mean(part["area"]) for part in answers["bins"]], 0.0
    for key, label, colour, style in (
        ("kl_whole_image", "of the whole image's label", WORST, "--"),
        ("kl_pooled", "of the pooled label", BEST, "-"),
    ):
        values = [part[key] for part in answers["bins"]]
        axes.plot(middle, values, style, marker="o", ms=4, color=colour, label=label)
        highest = max(highest, np.nanmax(values))
    axes.set(
        xlabel=_AREA,
        ylabel=f"KL(exact || label), {answers['unit']}",
        title=f"gap to the teacher's answer ({_pixels(answers)})",
    )
    _leave_room(axes, highest, 1.2)
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _pixels(answers: dict[str, Any]) -> str:
    height, width = answers["image_size"]
    return f"{height} px" if height == width else f"{height}x{width} px"


def _leave_room(axes: Axes, highest: float, factor: float) -> None:
    """Above values from 0 to `highest`, for a legend: anywhere else it would lie on some data's lines."""
    axes.set_yticks([tick for tick in MaxNLocator(6).tick_values(0, highest) if tick <= highest * 1.001])
    axes.set_ylim(0, highest * factor or 1)


def _draw_calibration(axes: Axes, found: dict[str, Any]) -> None:
    bins = [part for part in found["bins"] if part["count"]]
    axes.plot([0, 1], [0, 1], color=OTHER, linestyle="--")
    axes.plot([p["confidence"] for p in bins], [p["frequency"] for p in bins], "o-", color=BEST)
    for part in bins:
        place = part["confidence"], part["frequency"]
        looks = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 7}  # side by side however close the bins
        axes.annotate(f"{part['count']:,}", place, (0, 6), textcoords="offset points", **looks)
    _leave_room(axes, 1.0, 1.15)
    axes.set(xlim=(-0.03, 1.03), xlabel="highest probability in the map", ylabel="share that has the label")
    axes.set_title(f"calibration: ECE {found['ece']:.4f}")


def _draw_classes(
    axes: Axes,
    classes: list[dict[str, Any]],
    bars: dict[str, tuple[str, str]],
    marks: list[str],
    label: str,
    title: str,
) -> None:
    """Bars for each class with their numbers, and marks that share a label: one across all bars or one on each. Of many
    classes those whose first bar is lowest."""
    first = next(iter(bars))
    rows = [row for row in classes if not np.isnan(row[first])]
    if len(rows) > MAX_BARS:
        title += f", the {MAX_BARS} lowest of {len(rows)} classes"
        rows = sorted(rows, key=lambda row: row[first])[:MAX_BARS]
    x = np.arange(len(rows))
    for number, (key, (name, colour)) in enumerate(bars.items()):
        places = x + (number - 0.5) * 0.4
        axes.bar(places, [row[key] for row in rows], width=0.38, color=colour, label=name)
        halo = [withStroke(linewidth=2, foreground="white")]  # a mark behind a number must not strike it out
        looks = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 7, "zorder": 4, "path_effects": halo}
        for place, row in zip(places, rows, strict=True):
            if np.isfinite(row[key]):
                spot = (place, row[key])
                axes.annotate(f"{row[key]:.2f}", spot, (0, 3), textcoords="offset points", color=INK, **looks)
    for number, key in enumerate(marks):
        middle, half = x + (number - (len(marks) - 1) / 2) * 0.4, 0.4 / len(marks)
        looks = {"color": INK, "linewidth": 1.5, "clip_on": False, "zorder": 3}  # one at 0 lies on the axis
        heights = [row[key] for row in rows]
        axes.hlines(heights, middle - half, middle + half, label="" if number else label, **looks)
    names = [literal(f"{short(row['class'])} ({row['images_with']:,})") for row in rows]
    axes.set_xticks(x, names, rotation=90, fontsize=9, fontfamily=families(names))
    axes.set(xlabel="class (images with the label)", ylabel="mean over images", title=title)
    _leave_room(axes, 1.0, 1.25)
    axes.legend(frameon=False, ncols=4, loc="upper left", fontsize=9)
