"""How good explanations are: whatever has to run the model again to judge one, pair by pair of an image and a label.

Everything is measured of the maps that the judged explainer really gives; an explainer that is asked again (sensitivity,
randomised weights) is the same object.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor, nn

from mlvision.data.records import Record
from mlvision.errors import check_fields
from mlvision.explain import Explanation, Selection, Subject, explain
from mlvision.explain.impute import BASELINES
from mlvision.explain.perturb import PRECISIONS, perturbed_logits
from mlvision.explain.selection import outcomes
from mlvision.explain.subject import undisturbed
from mlvision.label_maps.geometry import resample
from mlvision.label_maps.oracle import object_cover, oracle_map
from mlvision.metrics.faithfulness import cross_label_drops, deletion_measures, patch_order, specificity
from mlvision.metrics.localisation import mass_in_mask, pointing_in_mask, rank_accuracy
from mlvision.metrics.map_shape import entropy, gini, map_discrimination, max_sensitivity, png_bytes, spearman

COVER_GRID = (56, 56)  # on which annotated areas are compared with maps
FINER = 4  # times as fine on each side is the grid of objects that cover no cell by a half
SMALL = 0.15  # of the image: on larger objects any map that is hot in the middle hits
CUT = 0.2  # of the patches are removed for the cross-label drops
# Columns that say which pair it is, and with those of its size and cost all that are no measures of the explanation.
PAIR = {"image", "label", "against", "outcome", "score", "num_present", "flat"}
FACTS = PAIR | {"area", "seconds", "forwards"}


@dataclass(frozen=True)
class MeasureConfig:
    """Which measures are taken, and how finely."""

    lattice: Annotated[int, "patches along each side that deletion removes"] = 14
    steps: Annotated[
        int, "steps of a deletion curve; a multiple of 5, so that a fifth of the patches is one of them"
    ] = 15
    baselines: Annotated[list[str], "what removed patches become; every one is measured"] = field(
        default_factory=lambda: ["mean", "blur"]
    )
    sensitivity: Annotated[list[float], "radii of uniform noise on images in [0, 1]"] = field(
        default_factory=lambda: [0.02, 0.2]
    )
    sensitivity_samples: Annotated[int, "noisy copies of an image; 0: sensitivity is not measured"] = 10
    tolerance: Annotated[float, "pointing game: distance from the object that still counts, as a share of the side"] = (
        0.0
    )
    batch_size: Annotated[int, "images a forward pass; 0: by their size and the device"] = 0
    precision: Annotated[str, "of the deletion curves: fp32, bf16 or fp16 autocast; empty: as the run"] = ""

    def __post_init__(self) -> None:
        rules = (
            ("lattice", 2 <= self.lattice <= 256, "2 to 256"),
            ("steps", 5 <= self.steps <= 1000 and self.steps % 5 == 0, "a multiple of 5, 5 to 1000"),
            (
                "baselines",
                bool(self.baselines) and set(self.baselines) <= set(BASELINES),
                f"some of {', '.join(BASELINES)}",
            ),
            ("sensitivity", all(radius > 0 for radius in self.sensitivity), "radii above 0"),
            ("sensitivity_samples", 0 <= self.sensitivity_samples <= 1000, "0 to 1000"),
            ("tolerance", self.tolerance >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 0, "0 or more"),
            ("precision", self.precision in PRECISIONS, "fp32, bf16, fp16 or nothing"),
        )
        check_fields(self, "", rules)


@dataclass
class Judged:
    """One batch that every explainer is judged on.

    Attributes:
        pixels: `[B, in_chans, H, W]` in [0, 1].
        targets: `[B, C]`: 1 present, 0 absent, NaN unknown.
        selection: which labels are explained.
        rows: `[B]`, of the images in the manifest.
        logits: `[B, C]` of the images as they are.
        scores: `[B, C]` in [0, 1].
        predicted: `[B, C]`, what they decide.
        cover: `[P, H2, W2]`: the share of each fine cell that the objects of a pair's label cover; NaN without annotation.
        mask: `[P, H3, W3]`: where a point counts as on these objects: cells that they cover by a half or more, on a finer
            grid than `cover` so that small objects have cells too.
    """

    pixels: Float[Tensor, "B in_chans H W"]
    targets: Float[Tensor, "B C"]
    selection: Selection
    rows: Int64[Tensor, " B"]
    logits: Float[Tensor, "B C"]
    scores: Float[Tensor, "B C"]
    predicted: Bool[Tensor, "B C"]
    cover: Float32[np.ndarray, "P H2 W2"]
    mask: Bool[np.ndarray, "P H3 W3"]
    forward_seconds: float

    def some(self, which: Bool[Tensor, " B"]) -> "Judged":
        """Some of the images alone."""
        image, _ = self.pairs
        here = which.to(self.pixels.device)
        columns = {name: getattr(self, name)[here] for name in ("pixels", "targets", "logits", "scores", "predicted")}
        pairs = here[image].cpu().numpy()
        rows, selection = self.rows[which.to(self.rows.device)], self.selection.rows(here)
        cover, mask = self.cover[pairs], self.mask[pairs]
        return replace(self, **columns, rows=rows, selection=selection, cover=cover, mask=mask)

    @property
    def pairs(self) -> tuple[Int64[Tensor, " P"], Int64[Tensor, " P"]]:
        """(image, place in the selection) of each explained label."""
        image, place = self.selection.valid.nonzero(as_tuple=True)
        return image, place


@dataclass
class Measured:
    """Explanations of a batch and how good they are.

    Attributes:
        columns: of P pairs each: `image` (row of the manifest), `label`, `outcome` (place in OUTCOMES, -1 unknown), `score`,
            `num_present`, `area` (share of the image, NaN where not annotated), `seconds` and `forwards` (of its image, for
            all its labels, in seconds and in plain forward passes), `flat`, and the measures: NaN where undefined, and of
            flat maps.
        drops: `[P, C]`: how much each logit falls when a fifth of the image, where the map is highest, becomes the first
            baseline; NaN for flat maps.
    """

    explanation: Explanation
    columns: dict[str, np.ndarray]
    drops: Float64[np.ndarray, "P C"]


def judge_on(
    subject: Subject,
    pixels: Float[Tensor, "B in_chans H W"],
    targets: Float[Tensor, "B C"],
    selection: Selection,
    rows: Int64[Tensor, " B"],
    records: Sequence[Record],
    *,
    threshold: float | Float[Tensor, " C"],
) -> Judged:
    """Put together what a batch is judged by; times a plain forward pass."""
    with torch.inference_mode(), undisturbed(subject.module):
        logits = subject.logits(pixels).float()
        times = []
        for _ in range(3):
            started = _now(pixels.device)
            subject.logits(pixels)
            times.append(_now(pixels.device) - started)
    logits, seconds = logits.clone(), sorted(times)[1]
    space = subject.space(logits.shape[1])
    scores = space.scores(logits)
    predicted = space.decide(scores, threshold)
    image, place = selection.valid.nonzero(as_tuple=True)
    cover, mask = areas_of_labels(
        [records[i] for i in image.tolist()], selection.labels[image, place].tolist(), logits.shape[1]
    )
    return Judged(pixels, targets.to(logits), selection, rows, logits, scores, predicted, cover, mask, seconds)


def areas_of_labels(
    records: Sequence[Record], labels: Sequence[int], num_classes: int
) -> tuple[Float32[np.ndarray, "P H2 W2"], Bool[np.ndarray, "P H3 W3"]]:
    """The area of each label's objects in its image, by polygons and masks, else by boxes: `cover` and `mask` of `Judged`.

    The mask is what the label's objects together cover by a half or more of a cell of COVER_GRID. An object that covers no
    such cell by a half counts by the cells of a grid FINER times as fine; if it covers none of those by a half either, by
    those that it touches.
    """
    covers = np.full((len(records), *COVER_GRID), np.nan, dtype=np.float32)
    fine = (FINER * COVER_GRID[0], FINER * COVER_GRID[1])
    masks = np.zeros((len(records), *fine), dtype=bool)
    for row, (record, label) in enumerate(zip(records, labels, strict=True)):
        boxes = record.boxes
        if boxes is None:
            continue
        which = (boxes.labels == label) & ~boxes.crowd
        if which.any():
            segmentation = [boxes.segmentation[i] for i in np.flatnonzero(which)]
            found = oracle_map(
                boxes.xyxy[which], boxes.labels[which], boxes.crowd[which], segmentation, num_classes, COVER_GRID
            )
            covers[row] = found.cover[0]
            masks[row] = (covers[row] >= 0.5).repeat(FINER, axis=0).repeat(FINER, axis=1)
            for box, shape in zip(boxes.xyxy[which], segmentation, strict=True):
                if object_cover(box, shape, COVER_GRID).max() < 0.5:
                    share = object_cover(box, shape, fine)
                    masks[row] |= share >= 0.5 if share.max() >= 0.5 else share > 0
    return covers, masks


def measure(subject: Subject, judged: Judged, explainer: Any, config: MeasureConfig, seed: int = 0) -> Measured:
    """Explain a batch and measure the explanations.

    Args:
        seed: of whatever the explainer draws at random, and of noise.

    Raises:
        InputError: as `explain`.
    """
    image, place = judged.pairs
    started = _now(judged.pixels.device)
    explanation = _ask(subject, judged, explainer, judged.pixels, seed)
    seconds = _now(judged.pixels.device) - started
    maps = explanation.maps[image, place].cpu()
    labels = judged.selection.labels[image, place]
    present = judged.targets[image] == 1
    columns = {
        "image": judged.rows.cpu()[image.cpu()].numpy(),
        "label": labels.cpu().numpy(),
        "against": judged.selection.rivals[image, place].cpu().numpy(),
        "outcome": outcomes(judged.predicted, judged.targets)[image, labels].cpu().numpy(),
        "score": judged.scores[image, labels].cpu().numpy(),
        "num_present": present.sum(1).cpu().numpy(),
        "area": judged.cover.mean((1, 2)),
        "seconds": np.full(len(image), seconds / len(judged.pixels)),
        "forwards": np.full(len(image), seconds / judged.forward_seconds),
        "flat": explanation.flat[image, place].cpu().numpy(),
    }
    columns |= _shape(maps, config.lattice) | _localisation(maps, judged.cover, judged.mask, config.tolerance)
    drops: dict[str, np.ndarray] = {}
    for baseline in config.baselines:
        measures, drops[baseline] = _deletion(subject, judged, maps, baseline, config, seed)
        columns |= measures
    columns["map_discrimination"] = _discrimination(explanation, judged)[image.cpu().numpy()]
    if config.sensitivity_samples:
        columns |= sensitivity(subject, judged, explainer, config, maps, seed)
    for name, values in columns.items():
        if name not in FACTS:
            values[columns["flat"]] = np.nan
    kept = drops[config.baselines[0]]
    kept[columns["flat"]] = np.nan
    return Measured(explanation, columns, kept)


def _ask(
    subject: Subject, judged: Judged, explainer: Any, pixels: Float[Tensor, "B in_chans H W"], seed: int
) -> Explanation:
    return explain(subject, pixels, explainer, judged.selection, judged.rows, seed=seed, allow_flat=True)


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _shape(maps: Float[Tensor, "P h w"], lattice: int) -> dict[str, np.ndarray]:
    """Gini index and entropy depend on the number of cells: they are of the lattice, which is the same for every method."""
    cells = resample(maps, (lattice, lattice))
    return {"gini": gini(cells), "entropy": entropy(cells), "png_bytes": png_bytes(maps)}


def _localisation(
    maps: Float[Tensor, "P h w"],
    cover: Float32[np.ndarray, "P H2 W2"],
    mask: Bool[np.ndarray, "P H3 W3"],
    tolerance: float,
) -> dict[str, np.ndarray]:
    """By the annotated areas; evidence against a label is no place to look for it, so only positive values have mass."""
    names = ("pointing", "pointing_small", "mass", "mass_lift", "rank_accuracy")
    found = {name: np.full(len(maps), np.nan) for name in names}
    known = np.isfinite(cover).all((1, 2))
    if known.any():
        some, area = maps.numpy()[known], cover[known]
        share, chance = mass_in_mask(some, area)
        hits = pointing_in_mask(some, mask[known].astype(np.float32), tolerance)
        found["pointing"][known] = hits
        found["pointing_small"][known] = np.where(area.mean((1, 2)) < SMALL, hits, np.nan)
        found["mass"][known], found["mass_lift"][known] = share, share / chance
        found["rank_accuracy"][known] = rank_accuracy(some, area).accuracy
    return found


class Removals:
    """Masks that remove the patches of a lattice, by rank: the highest first, then the lowest first, `steps` + 1 of each."""

    def __init__(self, order: Int64[Tensor, "P cells"], size: tuple[int, int], lattice: int, steps: int):
        self.num = 2 * (steps + 1)
        self._steps, self._total = steps, lattice * lattice
        self._ranks = order.argsort(1)
        rows, columns = (torch.arange(side, device=order.device) * lattice // side for side in size)
        self._patch = rows[:, None] * lattice + columns

    def keep(self, images: Int64[Tensor, " n"], numbers: Int64[Tensor, " n"]) -> Float[Tensor, "n H W"]:
        # Least first is the mirror image of most first, also where a step is no whole number of patches.
        step, highest_first = numbers % (self._steps + 1), numbers <= self._steps
        gone = torch.where(highest_first, step, self._steps - step)
        cut = torch.div(2 * gone * self._total + self._steps, 2 * self._steps, rounding_mode="floor")[:, None]
        ranks = self._ranks[images]
        kept = torch.where(highest_first[:, None], ranks >= cut, ranks < cut)
        return kept[:, self._patch].float()


def deletion_curves(
    subject: Subject,
    pixels: Float[Tensor, "P in_chans H W"],
    maps: Float[Tensor, "P h w"],
    baseline: str,
    config: MeasureConfig,
    seed: int = 0,
) -> tuple[Float[Tensor, "P K1 C"], Float[Tensor, "P K1 C"]]:
    """All logits while the patches with the most, and with the least, evidence are removed first.

    A patch's evidence is the mean of the map over it; of equal ones the upper left comes first. Step 0 is the whole image.
    """
    lattice = resample(maps.to(pixels), (config.lattice, config.lattice))
    masks = Removals(patch_order(lattice), (pixels.shape[2], pixels.shape[3]), config.lattice, config.steps)
    with undisturbed(subject.module, seed):
        answers = perturbed_logits(
            subject, pixels, masks, baseline=baseline, batch_size=config.batch_size, precision=config.precision
        )
    most, least = answers.unflatten(1, (2, config.steps + 1)).unbind(1)
    return most, least


def _deletion(
    subject: Subject, judged: Judged, maps: Float[Tensor, "P h w"], baseline: str, config: MeasureConfig, seed: int
) -> tuple[dict[str, np.ndarray], Float64[np.ndarray, "P C"]]:
    image, place = judged.pairs
    # As many pairs at once as there are images: what has the size of the images does not grow with the labels.
    parts = [
        deletion_curves(subject, judged.pixels[some], some_maps, baseline, config, seed)
        for some, some_maps in zip(*(column.split(len(judged.pixels)) for column in (image, maps)), strict=True)
    ]
    most, least = (torch.cat(curves) for curves in zip(*parts, strict=True))
    pair = judged.selection.each(image, place)
    curves = [pair.scores(curve)[..., 0].double().cpu().numpy() for curve in (most, least)]
    measures: dict[str, np.ndarray] = dict(deletion_measures(curves[0], curves[1])._asdict())
    labels = pair.labels.cpu().numpy()
    after = most[:, round(CUT * config.steps)]
    drops = cross_label_drops(most[:, 0].cpu().numpy(), after[:, None].cpu().numpy(), labels)
    present = (judged.targets[image] == 1).cpu().numpy()
    measures["specificity"] = specificity(drops, labels, present)[:, 0]
    measures["drop"] = drops[np.arange(len(drops)), 0, labels[:, 0]]
    return {f"{name}_{baseline}": values for name, values in measures.items()}, drops[:, 0]


def _discrimination(explanation: Explanation, judged: Judged) -> Float[np.ndarray, " B"]:
    """Of each image: how little the maps of its present labels resemble each other."""
    found = np.full(len(judged.pixels), np.nan)
    for row, (labels, maps) in enumerate(zip(judged.selection.labels, explanation.maps, strict=True)):
        present = (labels >= 0) & (judged.targets[row, labels.clamp(min=0)] == 1) & ~explanation.flat[row]
        if int(present.sum()) > 1:
            found[row] = map_discrimination(maps[present].cpu())
    return found


def sensitivity(
    subject: Subject,
    judged: Judged,
    explainer: Any,
    config: MeasureConfig,
    maps: Float[Tensor, "P h w"] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Max-Sensitivity: the largest relative change of a map under small noise on the image; all labels from each copy.

    Args:
        maps: of the images as they are, where they are there already.

    Source: Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019, definition 2.
    """
    image, place = judged.pairs
    if maps is None:
        maps = _ask(subject, judged, explainer, judged.pixels, seed).maps[image, place].cpu()
    noise = torch.Generator().manual_seed(seed)
    found = {}
    for radius in config.sensitivity:
        largest = np.zeros(len(maps))
        for _ in range(config.sensitivity_samples):
            shift = (2 * torch.rand(judged.pixels.shape, generator=noise) - 1).to(judged.pixels) * radius
            again = _ask(subject, judged, explainer, (judged.pixels + shift).clamp(0, 1), seed)
            largest = np.maximum(largest, max_sensitivity(maps, again.maps[image, place].cpu()[None]))
        found[f"max_sensitivity_{radius:g}"] = largest
    return found


def randomised(
    subject: Subject, judged: Judged, explainer: Any, stages: int = 4, seed: int = 0
) -> list[dict[str, Any]]:
    """Cascading re-initialisation: how much maps resemble the original ones as more and more layers, from the head down,
    get random weights. An explainer whose maps stay as they are does not explain the weights.

    Returns:
        For 0 to `stages` parts of the layers: their share, and the mean Spearman correlation over pairs.

    Source: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, section 3.1.
    """
    image, place = judged.pairs
    original = _ask(subject, judged, explainer, judged.pixels, seed)
    changed = subject.copy()
    layers = [part for part in changed.module.modules() if hasattr(part, "reset_parameters")]
    # The head is not always the last module that a network lists.
    head = [] if changed.classifier is None else list(changed.classifier.head.modules())
    layers = [part for part in layers if part not in head] + [part for part in layers if part in head]
    layers.reverse()
    before = original.maps[image, place].cpu()
    found = [{"share": 0.0, "spearman": 1.0}]
    for stage in range(stages):
        with torch.random.fork_rng():
            torch.manual_seed(seed + stage)
            for part in layers[len(layers) * stage // stages : len(layers) * (stage + 1) // stages]:
                part.reset_parameters()  # pyright: ignore[reportCallIssue]
            if stage == stages - 1:  # what no layer draws anew: class tokens, position embeddings, layer scales
                for parameter in _loose_parameters(changed.module):
                    nn.init.normal_(parameter, std=0.02)
        again = _ask(changed, judged, explainer, judged.pixels, seed)
        alike = np.asarray(spearman(before, again.maps[image, place].cpu()))
        mean = float(np.nanmean(alike)) if np.isfinite(alike).any() else float("nan")
        found.append({"share": (stage + 1) / stages, "spearman": mean})
    return found


def _loose_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that belong to no layer with a `reset_parameters` of its own."""
    parts = [part for part in module.modules() if not hasattr(part, "reset_parameters")]
    return [parameter for part in parts for parameter in part.parameters(recurse=False)]
