"""What the tables of label quality say, which `study/label_quality.py` collects.

The tables, of N images and M crops (those of an image adjacent), C classes: `targets` `[N, C]`; `stored` `[N, C]`: whether
any cell stores the class; `whole/<operator>` `[N, C]` and `crop/<operator>` `[M, C]`: pooled probabilities; `area` `[M]`;
`shown` `[M, C]`: what the crop shows, NaN where that is unknown; `background` `[N]`: the sum over the classes of the
probabilities in each image's emptiest cell, the one whose most probable class is the least probable; `size` `[N, C]`: the
share of the image that the class's objects cover, 0 for none, NaN where no objects are annotated; `pairs` `[P, 5]`, a row
for each label of an image that has boxes: class, pointing game, its chance, share of the mass in the boxes, its chance.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from mlvision.metrics.average_precision import average_precision, mean_average_precision
from mlvision.metrics.calibration import expected_calibration_error, reliability_table
from mlvision.space import Groups, has_groups, split_groups

NUM_AREA_BINS = 5
NUM_SIZE_BINS = 3
BACKGROUND_LIMIT = 1.5  # times the labels of an image, from which cells that show nothing are called too high
_PAIR_COLUMNS = ("pointing_game", "pointing_game_chance", "mass_in_box", "mass_in_box_chance")


def operators_of(tables: dict[str, np.ndarray]) -> list[str]:
    """The pooling operators that the maps allow."""
    return [name.removeprefix("whole/") for name in tables if name.startswith("whole/")]


def agreement(tables: dict[str, np.ndarray]) -> dict[str, dict[str, float | int]]:
    """Of each operator over whole images: top-1 (is the best class among the labels) and mAP (plain)."""
    return {name: _agreement(tables[f"whole/{name}"], tables["targets"]) for name in operators_of(tables)}


def _agreement(scores: Float[np.ndarray, "n C"], targets: Float[np.ndarray, "n C"]) -> dict[str, float | int]:
    mean, num_skipped = mean_average_precision(average_precision(scores, targets))
    top1, num_images = known_mean(top1_hits(scores, targets))
    return {
        "top1": top1,
        "top1_images": num_images,
        "mAP": mean,
        "mAP_classes": scores.shape[1] - num_skipped,
        "mAP_classes_without_positives": num_skipped,
    }


def by_object_size(tables: dict[str, np.ndarray]) -> list[dict[str, Any]] | None:
    """mAP (plain) of each operator over whole images, for the labels whose objects cover least of their image, for the
    middle third, and for those that cover most; a label of another third is left out. None where no image has objects."""
    size, targets = tables["size"], tables["targets"]
    present = (targets == 1) & (size > 0)
    if not present.any():
        return None
    edges = np.quantile(size[present], np.linspace(0, 1, 1 + NUM_SIZE_BINS))
    which = np.searchsorted(edges[1:-1], size, side="right")
    found = []
    for number, limits in enumerate(pairwise(edges)):
        chosen = present & (which == number)
        judged = np.where((targets == 1) & ~chosen, np.nan, targets)
        scores = {name: _agreement(tables[f"whole/{name}"], judged)["mAP"] for name in operators_of(tables)}
        found.append({"share_of_area": [float(limit) for limit in limits], "labels": int(chosen.sum()), "mAP": scores})
    return found


def top1_hits(scores: Float[np.ndarray, "n C"], targets: Float[np.ndarray, "n C"]) -> Float[np.ndarray, " n"]:
    """1 where the best class (of equal ones the first) is a label, 0 where not, NaN where that is unknown or none is."""
    if not len(scores):
        return np.zeros(0)
    hit = np.take_along_axis(targets, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where((targets == 1).any(axis=1), hit.astype(np.float64), np.nan)


def known_mean(values: Float[np.ndarray, " n"]) -> tuple[float, int]:
    """The mean of what is known, and of how many."""
    known = values[~np.isnan(values)]
    return (float(known.mean()) if len(known) else float("nan")), len(known)


def entropies(probabilities: Float[np.ndarray, "n C"], groups: Groups) -> Float[np.ndarray, " n"]:
    """In nats: the mean over groups of their distributions' entropies, a class for itself says yes or no."""
    runs = split_groups(torch.from_numpy(probabilities).double(), groups)
    whole = [torch.cat([p, 1 - p], 2) if p.shape[2] == 1 else p for p in runs]
    return torch.cat([torch.special.entr(p).sum(2) for p in whole], dim=1).mean(1).numpy()


def unit(groups: Groups) -> str:
    """What entropies and divergences are counted in."""
    if not has_groups(groups):
        return "nats a class"
    return "nats" if len(groups) == 1 else "nats a group"


def area_bins(
    areas: Float[np.ndarray, " M"], scale: tuple[float, float]
) -> Iterator[tuple[list[float], Bool[np.ndarray, " M"]]]:
    """Equal parts of the crops' `scale`: their limits, and which crops lie in each; one beyond it lies in the last."""
    low, high = scale
    edges = np.linspace(low, high, 1 + (NUM_AREA_BINS if high > low else 1))
    which = np.searchsorted(edges[1:-1], areas, side="right")
    for number, limits in enumerate(pairwise(edges)):
        yield [float(limit) for limit in limits], which == number


def over_crops(tables: dict[str, np.ndarray], groups: Groups, scale: tuple[float, float]) -> dict[str, Any]:
    """By the crops' area: entropy, top-1 by the image's labels, and agreement with what the crops show."""
    operators = operators_of(tables)
    entropy = entropies(tables[f"crop/{operators[0]}"], groups)
    labels = np.repeat(tables["targets"], len(entropy) // len(tables["targets"]), axis=0)
    hits = {name: top1_hits(tables[f"crop/{name}"], labels) for name in operators}

    def measured(chosen: Bool[np.ndarray, " M"]) -> dict[str, Any]:
        found = {"crops": int(chosen.sum()), "entropy": known_mean(entropy[chosen])[0]}
        for name in operators:
            top1, count = known_mean(hits[name][chosen])
            shown = _agreement(tables[f"crop/{name}"][chosen], tables["shown"][chosen])
            found[name] = {"top1_image": top1, "top1_image_crops": count}
            found[name] |= {f"{key.replace('images', 'crops')}_shown": value for key, value in shown.items()}
        return found

    return {
        "shown_unknown": int(np.isnan(tables["shown"]).sum()),
        "entropy_of": f"{operators[0]}, {unit(groups)}",
        "all": measured(np.ones(len(entropy), dtype=bool)),
        "bins": [{"area": limits, **measured(chosen)} for limits, chosen in area_bins(tables["area"], scale)],
    }


def calibration(tables: dict[str, np.ndarray]) -> dict[str, Any]:
    """Whether the maximum over a whole image is a probability of its labels."""
    given = tables["whole/max"], tables["targets"]
    columns = {name: column.tolist() for name, column in reliability_table(*given)._asdict().items()}
    bins = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {
        "operator": "max",
        "ece": expected_calibration_error(*given),
        "entries": sum(columns["count"]),
        "bins": bins,
    }


def background(tables: dict[str, np.ndarray]) -> dict[str, float]:
    """How many labels the emptiest cell of an image expects, and how many an image has: sums of the classes' means.

    A cell that shows nothing should be worth no more than each class's share of the images. The classifier of a teacher that
    started with a bias of 0 is worth 0.5 there for every class, while its answer to the whole image is right.
    """
    shares = [known_mean(column)[0] for column in tables["targets"].T]
    return {"expected_labels": float(tables["background"].mean()), "labels": float(np.nansum(shares))}


def verdict(quality: dict[str, Any]) -> list[str]:
    """What speaks against training on the maps, in words; nothing where nothing does."""
    faults = []
    empty, place = quality["background"], quality["localisation"]
    if empty["expected_labels"] > BACKGROUND_LIMIT * empty["labels"]:
        faults.append(
            f"the emptiest cell of an image expects {empty['expected_labels']:.2f} labels, an image has "
            f"{empty['labels']:.2f}: cells that show nothing call absent classes present. Targets of the maximum will be "
            "wrong; train a teacher whose head starts at the classes' shares"
        )
    if place and (place["lift"] <= 1 or place["pointing_game"] <= place["pointing_game_chance"]):
        faults.append("maps are worse than chance at place: do not train on them")
    return faults


def localisation(tables: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Means over the classes of their means; None where no image has boxes. The lift is a quotient of means: that of single
    small objects would outweigh all others."""
    pairs = tables["pairs"]
    if not len(pairs):
        return None
    classes = [_pair_means(pairs[pairs[:, 0] == label]) for label in np.unique(pairs[:, 0])]
    means = {name: known_mean(np.array([row[name] for row in classes]))[0] for name in _PAIR_COLUMNS}
    return {
        **means,
        "lift": means["mass_in_box"] / means["mass_in_box_chance"],
        "classes": len(classes),
        "pairs": len(pairs),
        "pairs_without_area_or_mass": int(np.isnan(pairs[:, 1:]).any(axis=1).sum()),
        "pairs_between_the_cells_centres": int((pairs[:, 2] == 0).sum()),
    }


def _pair_means(pairs: Float[np.ndarray, "p 5"]) -> dict[str, float]:
    return {name: known_mean(column)[0] for name, column in zip(_PAIR_COLUMNS, pairs[:, 1:].T, strict=True)}


def per_class(tables: dict[str, np.ndarray], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Coverage and localisation of each class; `highest` is the class's highest probability in an image's map."""
    found = []
    for c, name in enumerate(classes):
        target, highest, pairs = tables["targets"][:, c], tables["whole/max"][:, c], tables["pairs"]
        stored = tables["stored"][target == 1, c].astype(np.float64)
        pairs = pairs[pairs[:, 0] == c]
        means = _pair_means(pairs)
        found.append(
            {
                "class": name,
                "images_with": int((target == 1).sum()),
                "images_without": int((target == 0).sum()),
                "stored": known_mean(stored)[0],
                "highest_with": known_mean(highest[target == 1])[0],
                "highest_without": known_mean(highest[target == 0])[0],
                "pairs": len(pairs),
                **means,
                "lift": means["mass_in_box"] / means["mass_in_box_chance"],
            }
        )
    return found
