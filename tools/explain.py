"""Explain a run's decisions, label by label: maps, grids and a report to look at; or compare the explainers by measures; or
show which patches of a data set are nearest to each label.

python tools/explain.py runs/<name> images=folder method=[grad_cam,occlusion] labels=predicted
python tools/explain.py runs/<name> labels=errors pick=worst      # of the run's own test images
python tools/explain.py compare runs/<name> num_images=200 out=comparison
python tools/explain.py prototypes runs/<name> split=val
"""

import csv
import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mlvision.config import describe_options, parse_options, run_command
from mlvision.data.images import folder_manifest
from mlvision.data.loader import Loader, LoaderConfig, eval_loader, evenly
from mlvision.data.manifest import Manifest
from mlvision.errors import InputError, check_fields
from mlvision.explain import (
    CONTROLS,
    EXPLAINERS,
    EmptySelectionError,
    Selection,
    StoredMaps,
    Subject,
    build_explainer,
    explain,
    select,
)
from mlvision.explain.comparison import FACTS, by_case, cases, join, markdown
from mlvision.explain.measure import Judged, MeasureConfig, judge_on, measure, randomised, sensitivity
from mlvision.explain.prototypes import draw_prototypes, find_prototypes
from mlvision.explain.render import ExplainedImage, ShownMethod, draw_grid
from mlvision.explain.report import ReportData, write_report
from mlvision.explain.selection import SELECTIONS, class_index
from mlvision.labels import LabelMapStore
from mlvision.labels.geometry import whole_images
from mlvision.losses import binary_cross_entropy
from mlvision.metrics.faithfulness import cross_label_matrix
from mlvision.metrics.summary import log_odds
from mlvision.models.weights import state_hash
from mlvision.run import LoadedRun, describe_environment, load_run, read_for, write_json
from mlvision.types import Batch


@dataclass(frozen=True)
class RunOptions:
    """Of which run and split, and how it is run: what all commands have."""

    split: Annotated[str, "role of the run's own images: test, val or train"] = "test"
    num_images: Annotated[int, "so many of the images, spread evenly over them; 0: all"] = 100
    weights: Annotated[str, "raw, ema, or auto: ema where the run has them"] = "auto"
    device: Annotated[str, "auto (GPU where there is one), cpu, cuda or cuda:<number>"] = "auto"
    threads: Annotated[int, "CPU threads of torch; 0: torch's own choice"] = 0
    batch_size: Annotated[int, "images explained together"] = 16
    num_workers: Annotated[int, "processes that read images; 0: the main one"] = 2

    def __post_init__(self) -> None:
        least = {"num_images": 0, "threads": 0, "batch_size": 1, "num_workers": 0}
        rules = [(name, getattr(self, name) >= low, f"{low} or more") for name, low in least.items()]
        check_fields(self, "", [*rules, *self._rules()])

    def _rules(self) -> list[tuple[str, bool, str]]:
        return []


@dataclass(frozen=True)
class MapOptions(RunOptions):
    """What the two commands that make maps have beside."""

    options: Annotated[dict[str, dict[str, Any]], "options of methods: {occlusion: {window_px: 24}}"] = field(
        default_factory=dict
    )
    threshold: Annotated[float, "a class is predicted where its score is at least this"] = 0.5
    measures: MeasureConfig = field(default_factory=MeasureConfig)


@dataclass(frozen=True)
class CompareOptions(MapOptions):
    """Which explainers are compared, and on how many images."""

    num_images: Annotated[int, "so many of the images, spread evenly over them; 0: all"] = 200
    methods: Annotated[list[str], "names in EXPLAINERS; empty: all that the model can carry"] = field(
        default_factory=list
    )
    sensitivity_images: Annotated[
        int, "Max-Sensitivity is measured on so many of them: it explains every image again"
    ] = 32
    sanity_images: Annotated[int, "maps of randomised weights are made of so many of them; 0: none"] = 16
    out: Annotated[str, "folder to write; empty: comparison in the run folder"] = ""

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [(name, getattr(self, name) >= 0, "0 or more") for name in ("sensitivity_images", "sanity_images")]


@dataclass(frozen=True)
class ExplainOptions(MapOptions):
    """Which images, which labels, which explainers, and what is written."""

    images: Annotated[str, "folder of images, sub-folders included; empty: the run's own, of `split`"] = ""
    method: Annotated[list[str], "one name of EXPLAINERS or several, between which the report switches"] = field(
        default_factory=lambda: ["grad_cam"]
    )
    stored: Annotated[str, "label-map store of these images, shown beside the methods; empty: none"] = ""
    labels: Annotated[
        list[str],
        "all, predicted, ground_truth, errors, relevant (present or predicted), top<k>, or classes; 'a - b': what speaks "
        "for a and against b",
    ] = field(default_factory=lambda: ["predicted"])
    pick: Annotated[
        str, "evenly: spread over the images; worst: those of the highest loss (which needs their labels)"
    ] = "evenly"
    measure: Annotated[bool, "also measure the explanations: metrics.json and metrics.csv"] = False
    grids: Annotated[int, "PNG pages of each method, 8 images each; 0: none"] = 2
    seed: Annotated[int, "of methods that draw at random"] = 0
    out: Annotated[str, "folder to write; empty: explanations in the run folder"] = ""

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("method", bool(self.method), f"one of {', '.join(EXPLAINERS)}"),
            ("labels", bool(self.labels), "which labels"),
            ("pick", self.pick in ("evenly", "worst"), "evenly or worst"),
            ("grids", self.grids >= 0, "0 or more"),
        ]


@dataclass(frozen=True)
class PrototypeOptions(RunOptions):
    """Of which labels, and how many of each."""

    split: Annotated[str, "role of the run's own images: test, val or train"] = "val"
    num_images: Annotated[int, "so many of the images, spread evenly over them; 0: all"] = 0
    labels: Annotated[list[str], "classes; empty: all"] = field(default_factory=list)
    num: Annotated[int, "patches a label"] = 8
    out: Annotated[str, "folder to write; empty: prototypes in the run folder"] = ""

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [("num", self.num >= 1, "1 or more")]


USAGE = f"""usage: python tools/explain.py RUN [key=value ...]
       python tools/explain.py compare RUN [key=value ...]
       python tools/explain.py prototypes RUN [key=value ...]

{__doc__}
Options of data.* are the run's own, overridden. Methods: {", ".join(EXPLAINERS)}; controls: {", ".join(CONTROLS)}.

{describe_options(ExplainOptions)}

Options of compare:

{describe_options(CompareOptions)}

Options of prototypes:

{describe_options(PrototypeOptions)}"""


def main(argv: list[str]) -> Any:
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return None
    commands = {"compare": compare, "prototypes": show_prototypes}
    return commands[argv[0]](argv[1:]) if argv[0] in commands else explain_run(argv)


def explain_run(argv: list[str]) -> Path:
    """Maps, grids, measures and the report of one run."""
    run, options = read_arguments([as_list(argument) for argument in argv], ExplainOptions, "python tools/explain.py")
    out = Path(options.out or run.folder / "explanations")
    if out.exists():
        raise InputError(f"out: {out} is there already; give another folder")
    if options.images:
        manifest, known = folder_manifest(Path(options.images), run.classes), False
    else:
        manifest, known = read_for(run, options.split)[0], True
    labels = wanted_labels(options.labels, run.classes, known)
    if options.measure and not known:
        raise InputError("measure: measures need the images' labels, and a folder has none; leave images= empty")
    explainers = build_explainers(options.method, options.options)
    if options.stored:
        explainers["stored"] = open_store(options.stored, manifest)
    rows = chosen_rows(run, manifest, options, known)
    subject = Subject(run.method)
    with writing(out) as folder:
        explained, columns = [], []
        for batch in tqdm(
            batches_of(manifest, run, rows, options),
            total=math.ceil(len(rows) / options.batch_size),
            desc="explaining",
            unit=" batches",
            disable=None,
        ):
            if options.measure or options.stored:
                check_whole(batch)
            with run.precision.autocast():
                images, measured = explain_batch(subject, run, manifest, batch, explainers, labels, options, known)
            explained += images
            columns += measured
        if not explained:
            raise InputError(f"labels: none of the {len(rows)} images has such a label; there is nothing to explain")
        check_not_flat(explained, explainers)
        write_maps(folder / "maps", explained, run, options, explainers)
        shown = [shown_method(name, explainer) for name, explainer in explainers.items()]
        draw_pages(folder / "grids", explained, run, shown, options)
        summary = {
            "run": str(run.folder),
            "weights": run.weights,
            "model": run.config.model.name,
            "images": f"{len(explained)} of {len(manifest)}, {manifest.protocol or options.images}",
            "labels": ", ".join(options.labels),
            "threshold": f"{options.threshold:g}",
            "seed": str(options.seed),
        }
        write_report(
            folder / "report",
            ReportData(f"Explanations of {run.folder.name}", run.classes, shown, explained, options.threshold, summary),
        )
        if options.measure:
            write_measures(folder, run, options, columns, summary)
    print(f"{len(explained)} images, {', '.join(explainers)}: open {out / 'report' / 'index.html'}")
    return out


def check_not_flat(explained: list[ExplainedImage], explainers: dict[str, Any]) -> None:
    """Refuse a method none of whose maps says anything."""
    for name in explainers:
        if all(np.ptp(image.maps[name], axis=(1, 2)).max(initial=0) == 0 for image in explained):
            raise InputError(
                f"{name}: the maps of all labels of all {len(explained)} images are flat; they explain nothing. The images "
                "may be uniform, the grid a single cell, or the model's answer constant"
            )


def as_list(argument: str) -> str:
    """`method=occlusion` for `method=[occlusion]`."""
    key, equals, value = argument.partition("=")
    return f"{key}=[{value}]" if equals and key in ("method", "labels") and not value.startswith("[") else argument


def wanted_labels(given: list[str], classes: tuple[str, ...], known: bool) -> Any:
    """A rule's name, or class names and pairs of them.

    Raises:
        InputError: a rule that needs the images' labels where none are known, or an unknown class.
    """
    rules = [word for word in given if word in SELECTIONS or re.fullmatch(r"top\d+", word)]
    if rules and len(given) > 1:
        raise InputError(f"labels: '{rules[0]}' stands alone, or classes are listed; got {', '.join(given)}")
    if rules:
        if rules[0] in ("ground_truth", "errors", "relevant") and not known:
            raise InputError(f"labels: {rules[0]} needs the images' labels, and a folder has none; leave images= empty")
        return rules[0]
    pairs: list[Any] = []
    for word in given:
        a, minus, b = word.partition(" - ")
        contrast = bool(minus) and word not in classes
        pairs.append((a, b) if contrast else word)
        for name in (a, b) if contrast else (word,):
            class_index(name, len(classes), classes)
    return pairs


def open_store(path: str, manifest: Manifest) -> StoredMaps:
    """Stored maps of exactly these images."""
    store = LabelMapStore.open(path)
    store.check(record_hash=manifest.hash, class_hash=manifest.class_hash, num_records=len(manifest))
    return StoredMaps(store)


def chosen_rows(run: LoadedRun, manifest: Manifest, options: ExplainOptions, known: bool) -> Int64[np.ndarray, " n"]:
    """Which images, in the order of the manifest."""
    if options.pick == "evenly":
        return rows_of(options.num_images, manifest)
    if not known:
        raise InputError("pick: worst needs the images' labels, and a folder has none; leave images= empty")
    everything = np.arange(len(manifest))
    losses = []
    for batch in batches_of(manifest, run, everything, options):
        with torch.inference_mode(), run.precision.autocast():
            logits = run.method.predict(batch.images.to(run.precision.device))
        losses.append(image_losses(logits.float().cpu(), batch.targets, run.method.activation))
    worst = torch.cat(losses).nan_to_num(nan=-1).argsort(descending=True).numpy()
    return np.sort(worst[: options.num_images or None])


def image_losses(logits: Float[Tensor, "B C"], targets: Float[Tensor, "B C"], activation: str) -> Float[Tensor, " B"]:
    """The sum over known labels of the binary cross-entropy; NaN where none is known."""
    losses = binary_cross_entropy(log_odds(logits, activation), targets, reduction="none").sum(1)
    return losses.where(targets.isfinite().any(1), torch.nan)


def explain_batch(
    subject: Subject,
    run: LoadedRun,
    manifest: Manifest,
    batch: Batch,
    explainers: dict[str, Any],
    labels: Any,
    options: ExplainOptions,
    known: bool,
) -> tuple[list[ExplainedImage], list[tuple[str, dict[str, np.ndarray]]]]:
    """The images of a batch that have such a label, with every method's maps; and their measures."""
    chosen = choose(subject, run, batch, labels, options, known)
    if chosen is None:
        return [], []
    kept, pixels, logits, selection = chosen
    targets, rows = batch.targets[kept], batch.index[kept]
    scores, losses = run.method.scores(logits), image_losses(logits, targets, run.method.activation)
    found, measured = {}, []
    if options.measure:  # the explanation that is measured is the one that is shown
        records = [manifest.records[row] for row in rows.tolist()]
        judged = judge_on(
            subject, pixels, targets, selection, rows, records,
            threshold=options.threshold, activation=run.method.activation,
        )  # fmt: skip
        config = replace(options.measures, seed=options.seed)
        for name, explainer in explainers.items():
            one = measure(subject, judged, explainer, config)
            found[name] = one.explanation
            measured.append((name, one.columns))
    else:
        for name, explainer in explainers.items():
            found[name] = explain(subject, pixels, explainer, selection, rows, seed=options.seed, allow_flat=True)
    shown = {name: by_label(columns, selection) for name, columns in measured}
    images = []
    for place in range(len(rows)):
        maps = {name: one.maps[place].cpu().numpy() for name, one in found.items()}
        images.append(
            ExplainedImage(
                manifest.records[int(rows[place])].key,
                batch.images[kept][place].permute(1, 2, 0).numpy(),
                scores[place].numpy(),
                targets[place].numpy(),
                selection.labels[place].cpu().numpy(),
                maps,
                logits[place].numpy(),
                float(losses[place]),
                None if selection.against is None else selection.against[place].cpu().numpy(),
                {name: {key: table[place] for key, table in tables.items()} for name, tables in shown.items()},
            )
        )
    return images, measured


def choose(
    subject: Subject, run: LoadedRun, batch: Batch, labels: Any, options: MapOptions, known: bool
) -> tuple[Bool[Tensor, " B"], Float[Tensor, "n in_chans H W"], Float[Tensor, "n C"], Selection] | None:
    """Which images of a batch have such a label; their pixels, logits (on the CPU) and selection. None where none has."""
    pixels = subject.pixels(batch.images)
    with torch.inference_mode():
        logits = subject.logits(pixels).float().cpu().clone()
    try:
        selection = select(
            labels,
            logits,
            targets=batch.targets if known else None,
            threshold=options.threshold,
            classes=run.classes,
            activation=run.method.activation,
        )
    except EmptySelectionError:
        return None
    kept = selection.valid.any(1)
    return kept, pixels[kept.to(pixels.device)], logits[kept], selection.rows(kept).to(pixels.device)


def by_label(columns: dict[str, np.ndarray], selection: Selection) -> dict[str, np.ndarray]:
    """The measures that the report shows as `[B, L]`, NaN in empty places."""
    where = tuple(index.cpu().numpy() for index in selection.valid.nonzero(as_tuple=True))
    tables = {}
    for key in columns:
        if key.startswith(("srg_", "specificity_")) or key in ("pointing", "mass_lift"):
            tables[key] = np.full(selection.labels.shape, np.nan)
            tables[key][where] = columns[key]
    return tables


def shown_method(name: str, explainer: Any) -> ShownMethod:
    described = (type(explainer).__doc__ or "").strip().splitlines()
    return ShownMethod(
        name,
        signed=getattr(explainer, "signed", False),
        label_specific=getattr(explainer, "label_specific", True),
        description=described[0] if described else "",
    )


def write_maps(
    folder: Path, explained: list[ExplainedImage], run: LoadedRun, options: ExplainOptions, explainers: dict[str, Any]
) -> None:
    """One .npz a method: maps of its own size in float16, and all that is needed to read them."""
    folder.mkdir()
    most = max(len(image.labels) for image in explained)

    def padded(values: np.ndarray | None, fill: float) -> np.ndarray:
        values = np.full((most,), fill) if values is None else values
        return np.concatenate([values, np.full((most - len(values), *values.shape[1:]), fill, values.dtype)])

    model_hash = state_hash([run.method])
    for name, explainer in explainers.items():
        maps = np.stack([padded(image.maps[name], 0) for image in explained])
        # float16 ends at 65,504: each image has its own scale, and its shape survives whatever the unit.
        scale = np.abs(maps).max((1, 2, 3), keepdims=True).astype(np.float32)
        scale = np.where(scale > 0, scale, 1)
        about = {
            "method": name,
            "options": asdict(explainer) if is_dataclass(explainer) and not isinstance(explainer, type) else {},
            "seed": options.seed,
            "threshold": options.threshold,
            "run": str(run.folder),
            "weights": run.weights,
            "model_hash": model_hash,
        }
        np.savez_compressed(
            folder / f"{name}.npz",
            maps=(maps / scale).astype(np.float16),
            scale=scale[:, 0, 0, 0],
            labels=np.stack([padded(image.labels, -1) for image in explained]),
            against=np.stack([padded(image.against, -1) for image in explained]).astype(np.int64),
            logits=np.stack([image.logits for image in explained if image.logits is not None]),
            targets=np.stack([image.targets for image in explained]),
            keys=np.array([image.key for image in explained]),
            classes=np.array(run.classes),
            about=np.array(json.dumps(about)),
        )


def draw_pages(
    folder: Path, explained: list[ExplainedImage], run: LoadedRun, shown: list[ShownMethod], options: ExplainOptions
) -> None:
    folder.mkdir()
    for method in shown:
        for page in range(options.grids):
            images = explained[8 * page : 8 * page + 8]
            if images:
                drawn = draw_grid(images, run.classes, method, options.threshold, title=run.folder.name)
                Image.fromarray(drawn).save(folder / f"{method.name}_{page}.png")


def write_measures(
    folder: Path,
    run: LoadedRun,
    options: ExplainOptions,
    columns: list[tuple[str, dict[str, np.ndarray]]],
    summary: dict[str, str],
) -> None:
    """metrics.csv has a row for each explained label; metrics.json the means over labels, by what became of the label."""
    tables = {
        name: join([part for key, part in columns if key == name]) for name in dict.fromkeys(key for key, _ in columns)
    }
    write_pairs(folder / "metrics.csv", tables)
    means = {
        name: {
            case: {key: mean for key, mean in found["means"].items() if key not in FACTS}
            for case, found in by_case(table).items()
        }
        for name, table in tables.items()
    }
    write_json(
        folder / "metrics.json", {**summary, "environment": describe_environment(run.precision.device), "means": means}
    )


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all."""
    if not out.parent.is_dir():
        raise InputError(f"out: the folder {out.parent} does not exist")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        folder = Path(name) / out.name
        folder.mkdir()
        yield folder
        folder.replace(out)


def read_arguments(argv: list[str], options_type: type, command: str) -> tuple[LoadedRun, Any]:
    """The run, with what is overridden of its data, and the tool's own options."""
    if not argv or "=" in argv[0]:
        raise InputError(f"expected a run folder: {command} RUN [key=value ...]")
    path, *rest = argv
    of_data = [argument for argument in rest if argument.startswith("data.")]
    own = [argument for argument in rest if argument not in of_data]
    options = parse_options(options_type, own, prog=command, description=__doc__ or "")
    if options.threads:
        torch.set_num_threads(options.threads)
    run = load_run(path, device=options.device, weights=options.weights, overrides=of_data)
    if run.config.model.in_chans != 3:
        raise InputError(
            f"{path}: takes images of {run.config.model.in_chans} channels; explanations are drawn on pictures"
        )
    return run, options


def rows_of(num: int, manifest: Manifest) -> Int64[np.ndarray, " n"]:
    """So many rows, spread evenly; 0: all."""
    return evenly(num or len(manifest), len(manifest))


def batches_of(manifest: Manifest, run: LoadedRun, rows: Int64[np.ndarray, " n"], options: RunOptions) -> Loader:
    loading = LoaderConfig(eval_batch_size=options.batch_size, num_workers=options.num_workers)
    return eval_loader(manifest, run.view, loading, rows=rows)


# Comparison


def compare(argv: list[str]) -> dict[str, Any]:
    """Every explainer and control on the same pairs of images and labels; writes comparison.json, .md, pairs.csv, and the
    cross-label matrices."""
    run, options = read_arguments(argv, CompareOptions, "python tools/explain.py compare")
    out = Path(options.out or run.folder / "comparison")
    if out.exists():
        raise InputError(f"out: {out} is there already; give another folder")
    manifest, _ = read_for(run, options.split)
    subject = Subject(run.method)
    rows = rows_of(options.num_images, manifest)
    # Sub-sets are spread over the same images: data sets are often sorted by class.
    sensitive, randomise = (
        torch.from_numpy(rows[evenly(num, len(rows))]) for num in (options.sensitivity_images, options.sanity_images)
    )
    explainers = chosen_explainers(run, options)
    columns: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in explainers}
    drops: dict[str, list[np.ndarray]] = {name: [] for name in explainers}
    sanity: dict[str, list[tuple[int, list[dict[str, Any]]]]] = {name: [] for name in explainers}
    curves = replace(options.measures, sensitivity_samples=0)
    batches = batches_of(manifest, run, rows, options)
    total = math.ceil(len(rows) / options.batch_size)
    for batch in tqdm(batches, total=total, desc="explaining", unit=" batches", disable=None):
        with run.precision.autocast():
            judged = judge_batch(subject, run, manifest, batch, options)
            for name, explainer in list(explainers.items()) if judged else ():
                assert judged is not None
                try:
                    found = measure(subject, judged, explainer, curves)
                    which = torch.isin(judged.rows, sensitive)
                    if options.measures.sensitivity_samples and which.any():
                        noisy = sensitivity(subject, judged.some(which), explainer, options.measures)
                        place = which[judged.pairs[0].cpu()].numpy()
                        for key, values in noisy.items():
                            found.columns[key] = np.full(len(place), np.nan)
                            found.columns[key][place] = values
                    which = torch.isin(judged.rows, randomise)
                    if which.any():
                        part = judged.some(which)
                        sanity[name].append((len(part.pairs[0]), randomised(subject, part, explainer, curves)))
                except InputError as error:
                    print(f"left out: {name} ({error})")
                    for table in (explainers, columns, drops, sanity):
                        table.pop(name)
                    continue
                columns[name].append(found.columns)
                drops[name].append(found.drops)
    if not any(columns.values()):
        raise InputError(
            f"{manifest.split}: no label of these {len(rows)} images is present or predicted, or every method was left out"
        )
    result = summarise(run, manifest, options, explainers, columns, drops, sanity, len(rows))
    write_comparison(out, result, columns)
    print(result["table"])
    print(f"written to {out}: comparison.json, comparison.md, pairs.csv")
    return result


def chosen_explainers(run: LoadedRun, options: CompareOptions) -> dict[str, Any]:
    """The explainers that were asked for, and the controls; where none was named, those that the model can carry."""
    names = [*(options.methods or EXPLAINERS), *CONTROLS]
    built = build_explainers(names, options.options)
    if options.methods:
        return built
    image = torch.zeros(1, 3, *run.view.size, dtype=torch.uint8)
    image[:, :, : run.view.size[0] // 2] = 200
    for name, explainer in list(built.items()):
        try:
            explain(run.method, image, explainer, [0], allow_flat=True)
        except InputError as error:
            print(f"left out: {name} ({error})")
            del built[name]
    return built


def build_explainers(names: list[str], options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Explainers with their options.

    Raises:
        InputError: an unknown method, or options of one that is not asked for.
    """
    for name in options:
        if name not in names:
            raise InputError(f"options.{name}: not one of the methods here, {', '.join(names)}")
    return {name: build_explainer(name, **options.get(name, {})) for name in names}


def check_whole(batch: Batch) -> None:
    """Refuse views that show a part of the image, which annotated areas and stored maps do not."""
    if not torch.equal(batch.view.boxes, whole_images(batch.view.boxes)):
        raise InputError(
            "view.eval_resize: measures and stored maps are of whole images; this run's views are crops of them (use squash)"
        )


def judge_batch(
    subject: Subject, run: LoadedRun, manifest: Manifest, batch: Batch, options: CompareOptions
) -> Judged | None:
    """A batch with every label that is present or predicted; None where no image has one."""
    check_whole(batch)
    chosen = choose(subject, run, batch, "relevant", options, known=True)
    if chosen is None:
        return None
    kept, pixels, _, selection = chosen
    rows = batch.index[kept]
    return judge_on(
        subject, pixels, batch.targets[kept], selection, rows, [manifest.records[row] for row in rows.tolist()],
        threshold=options.threshold, activation=run.method.activation,
    )  # fmt: skip


def summarise(
    run: LoadedRun,
    manifest: Manifest,
    options: CompareOptions,
    explainers: dict[str, Any],
    columns: dict[str, list[dict[str, np.ndarray]]],
    drops: dict[str, list[np.ndarray]],
    sanity: dict[str, list[tuple[int, list[dict[str, Any]]]]],
    num_images: int,
) -> dict[str, Any]:
    """Each measure's mean over labels, for each explainer and case; the cross-label matrices; the printed table."""
    methods = {}
    for name, parts in columns.items():
        joined = join(parts)
        # Of labels that were found, whose evidence is really there.
        groups = cases(joined)
        which = (groups["clear"] | groups["competing"]) & ~joined["flat"]
        labels = joined["label"][which]
        matrix = cross_label_matrix(np.concatenate(drops[name])[which][:, None], labels[:, None], len(run.classes))
        methods[name] = {
            "options": asdict(explainers[name]) if is_dataclass(explainers[name]) else {},
            "control": name in CONTROLS,
            "cases": by_case(joined),
            "randomised": mean_by_stage(sanity[name]),
            "cross_label": {"drops": matrix.drops.tolist(), "counts": matrix.counts.tolist()},
        }
    protocol = (
        f"{manifest.protocol}; {num_images} of {len(manifest)} images of split {manifest.split}, spread evenly, every label "
        f"that is present or predicted (score >= {options.threshold:g}); each figure is the mean over labels of the mean "
        "over a label's pairs"
    )
    result = {
        "protocol": protocol,
        "run": str(run.folder),
        "weights": run.weights,
        "model": run.config.model.name,
        "classes": list(run.classes),
        "options": asdict(options),
        "methods": methods,
        "environment": describe_environment(run.precision.device),
    }
    return result | {"table": f"{protocol}.\n\n{markdown([result])}"}


def mean_by_stage(parts: list[tuple[int, list[dict[str, Any]]]]) -> list[dict[str, float]]:
    """The mean over batches, by their number of pairs, of what `randomised` gives."""
    stages = []
    for rows in zip(*(part for _, part in parts), strict=True):
        values = [(count, row["spearman"]) for (count, _), row in zip(parts, rows, strict=True)]
        known = [(count, value) for count, value in values if not math.isnan(value)]
        total = sum(count for count, _ in known)
        mean = sum(count * value for count, value in known) / total if total else math.nan
        stages.append({"share": rows[0]["share"], "spearman": mean})
    return stages


def write_comparison(out: Path, result: dict[str, Any], columns: dict[str, list[dict[str, np.ndarray]]]) -> None:
    """All files, or none."""
    with writing(out) as folder:
        write_json(folder / "comparison.json", {key: value for key, value in result.items() if key != "table"})
        (folder / "comparison.md").write_text(result["table"] + "\n")
        write_pairs(folder / "pairs.csv", {name: join(parts) for name, parts in columns.items()})


def write_pairs(path: Path, tables: dict[str, dict[str, np.ndarray]]) -> None:
    """A row for each explained label of each method."""
    names = list(dict.fromkeys(key for table in tables.values() for key in table))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", *names])
        for method, table in tables.items():
            for row in range(len(table["image"])):
                writer.writerow([method, *(table[name][row] if name in table else "" for name in names)])


# Prototypes


def show_prototypes(argv: list[str]) -> Path:
    """The patches that are nearest to each label: prototypes.png to look at, prototypes.csv to go on with."""
    arguments = [as_list(argument) for argument in argv]
    run, options = read_arguments(arguments, PrototypeOptions, "python tools/explain.py prototypes")
    out = Path(options.out or run.folder / "prototypes")
    if out.exists():
        raise InputError(f"out: {out} is there already; give another folder")
    labels = [class_index(name, len(run.classes), run.classes) for name in options.labels or run.classes]
    manifest, _ = read_for(run, options.split)
    batches = batches_of(manifest, run, rows_of(options.num_images, manifest), options)
    with run.precision.autocast():
        found = find_prototypes(
            Subject(run.method), tqdm(batches, desc="looking", unit=" batches", disable=None), options.num
        )
    dataset = batches.dataset
    with writing(out) as folder:
        page = draw_prototypes(
            found,
            labels,
            run.classes,
            manifest.target,
            lambda row: dataset[0, row].views[0].image.permute(1, 2, 0).numpy(),
            title=f"{run.folder.name}, {manifest.split}",
        )
        Image.fromarray(page).save(folder / "prototypes.png")
        with open(folder / "prototypes.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("class", "rank", "image", "row", "column", "rows", "columns", "nearness", "target"))
            for label in labels:
                columns = (found.indices[label].tolist(), found.cells[label].tolist(), found.nearness[label].tolist())
                for rank, (index, cell, near) in enumerate(zip(*columns, strict=True)):
                    target = manifest.target(index)[label]
                    key = manifest.records[index].key
                    writer.writerow((run.classes[label], rank, key, *cell, *found.grid, f"{near:.5f}", target))
    print(f"{len(labels)} labels, {found.indices.shape[1]} patches each, of {len(manifest)} images: {out}")
    return out


if __name__ == "__main__":
    run_command(main)
