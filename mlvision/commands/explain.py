"""Explain a run's decisions, label by label: maps, grids and a report to look at; or compare the explainers by measures; or
show which patches of a data set are nearest to each label.

python tools/explain.py runs/<name> images=folder method=[grad_cam,occlusion] labels=predicted
python tools/explain.py runs/<name> labels=errors pick=worst      # of the run's own validation images
python tools/explain.py compare runs/<name> num_images=200 out=comparison
python tools/explain.py prototypes runs/<name>
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from mlvision.data.folder import folder_manifest
from mlvision.data.loader import MOST_WORKERS, Loader, LoaderConfig, eval_loader, evenly
from mlvision.data.manifest import Manifest
from mlvision.engine.precision import MOST_THREADS
from mlvision.errors import InputError, check_fields
from mlvision.explain import CONTROLS, EXPLAINERS, StoredMaps, Subject, build_explainers, explain
from mlvision.explain.selection import class_index, parse_labels
from mlvision.files import whole_file, whole_folder, write_arrays, write_json
from mlvision.label_maps import LabelMapStore
from mlvision.models.weights import state_hash
from mlvision.options import describe_options, parse_options, print_help, take_path
from mlvision.runs.environment import describe_environment
from mlvision.runs.load import LoadedRun, load_run, read_for
from mlvision.study.batches import Asker, Columns, check_whole, image_losses
from mlvision.study.comparison import Comparison, join, markdown, measured_means, options_of, write_pairs
from mlvision.study.files import refuse_flat, save_maps, save_pages
from mlvision.study.measure import MeasureConfig
from mlvision.study.prototypes import draw_prototypes, find_prototypes, write_prototypes
from mlvision.study.render import ExplainedImage, ShownMethod
from mlvision.study.report import ReportData, write_report


def _differ(names: list[str]) -> bool:
    return len(set(names)) == len(names)


@dataclass(frozen=True)
class RunOptions:
    """Of which run and split, and how it is run: what all commands have."""

    split: Annotated[str, "role of the run's own images: val, test or train"] = "val"
    num_images: Annotated[int, "so many of the images, spread evenly over them; 0: all"] = 100
    weights: Annotated[str, "raw, ema, or auto: ema where the run has them"] = "auto"
    device: Annotated[str, "auto (GPU where there is one), cpu, cuda or cuda:<number>"] = "auto"
    threads: Annotated[int, "CPU threads of torch; 0: torch's own choice"] = 0
    batch_size: Annotated[int, "images explained together"] = 16
    num_workers: Annotated[int, "processes that read images; 0: the main one"] = 2

    def __post_init__(self) -> None:
        rules = [
            ("num_images", self.num_images >= 0, "0 or more"),
            ("threads", 0 <= self.threads <= MOST_THREADS, f"0 to {MOST_THREADS}"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("num_workers", 0 <= self.num_workers <= MOST_WORKERS, f"0 to {MOST_WORKERS}"),
        ]
        check_fields(self, "", [*rules, *self._rules()])

    def _rules(self) -> list[tuple[str, bool, str]]:
        return []


@dataclass(frozen=True)
class MapOptions(RunOptions):
    """What the two commands that make maps have beside."""

    options: Annotated[dict[str, dict[str, Any]], "options of methods: {occlusion: {window_px: 24}}"] = field(
        default_factory=dict
    )
    threshold: Annotated[
        float | None,
        "a class is predicted where its score is at least this; of classes that exclude each other the best is; nothing: "
        "what the run's post-hoc steps say, else 0.5",
    ] = None
    seed: Annotated[int, "of methods that draw at random, of controls and of the measures' noise"] = 0
    measures: MeasureConfig = field(default_factory=MeasureConfig)

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("threshold", self.threshold is None or 0 <= self.threshold <= 1, "a score from 0 to 1"),
            ("seed", self.seed >= 0, "0 or more"),
        ]


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
        least = [(name, getattr(self, name) >= 0, "0 or more") for name in ("sensitivity_images", "sanity_images")]
        return [*super()._rules(), ("methods", _differ(self.methods), "each method once"), *least]


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
        "for a and against b; class:<name> for a class that is called like a rule",
    ] = field(default_factory=lambda: ["predicted"])
    pick: Annotated[
        str, "evenly: spread over the images; worst: those of the highest loss (which needs their labels)"
    ] = "evenly"
    measure: Annotated[bool, "also measure the explanations: metrics.json and metrics.csv"] = False
    grids: Annotated[int, "PNG pages of each method, 8 images each; 0: none"] = 2
    out: Annotated[
        str, "folder to write; empty: explanations in the run folder, explanations_<name> of a folder of images"
    ] = ""

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            *super()._rules(),
            ("method", bool(self.method), f"one of {', '.join(EXPLAINERS)}"),
            ("method", _differ(self.method), "each method once"),
            ("labels", bool(self.labels), "which labels"),
            ("labels", _differ(self.labels), "each label once"),
            ("pick", self.pick in ("evenly", "worst"), "evenly or worst"),
            ("grids", self.grids >= 0, "0 or more"),
        ]


@dataclass(frozen=True)
class PrototypeOptions(RunOptions):
    """Of which labels, and how many of each."""

    num_images: Annotated[int, "so many of the images, spread evenly over them; 0: all"] = 0
    labels: Annotated[list[str], "classes; empty: all"] = field(default_factory=list)
    num: Annotated[int, "patches a label"] = 8
    out: Annotated[str, "folder to write; empty: prototypes in the run folder"] = ""

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [("num", 1 <= self.num <= 1000, "1 to 1000"), ("labels", _differ(self.labels), "each label once")]


def usage() -> str:
    of_methods = "".join(
        f"\n{name}:\n{described}\n"
        for name, explainer in {**EXPLAINERS, **CONTROLS}.items()
        if (described := describe_options(explainer))
    )
    return f"""usage: python tools/explain.py RUN [key=value ...]
       python tools/explain.py compare RUN [key=value ...]
       python tools/explain.py prototypes RUN [key=value ...]

{__doc__}
Options of data.* are the run's own, overridden. Methods: {", ".join(EXPLAINERS)}; controls: {", ".join(CONTROLS)}.

{describe_options(ExplainOptions)}

Options of compare:

{describe_options(CompareOptions)}

Options of prototypes:

{describe_options(PrototypeOptions)}

Options of methods, as options={{<method>: {{<option>: <value>}}}}:
{of_methods}"""


def main(argv: list[str]) -> Any:
    print_help(argv, usage, needed=True)
    commands = {"compare": compare, "prototypes": show_prototypes}
    return commands[argv[0]](argv[1:]) if argv[0] in commands else explain_run(argv)


def explain_run(argv: list[str]) -> Path:
    """Maps, grids, measures and the report of one run; written image by image, so that memory does not grow with them."""
    run, options = read_arguments(argv, ExplainOptions, "python tools/explain.py")
    out = new_folder(options.out or run.folder / default_name(options))
    if options.images:
        manifest, known = folder_manifest(Path(options.images), run.classes, run.config.data.max_pixels), False
        print(manifest.protocol)
    else:
        manifest, known = read_for(run, options.split)[0], True
    split = "none" if options.images else name_of(options.split, manifest)
    if options.measure and not known:
        raise InputError("measure: measures need the images' labels, and a folder has none; leave images= empty")
    labels = parse_labels(options.labels, run.classes, known)
    explainers = build_explainers(options.method, options.options)
    if options.stored:
        explainers["stored"] = open_store(options.stored, manifest)
    rows = chosen_rows(run, manifest, options, known)
    thresholds = thresholds_of(run, options)
    of_pages = thresholds.numpy() if isinstance(thresholds, Tensor) else thresholds
    asker = Asker(Subject(run.method), manifest, labels, thresholds, known)
    shown = [ShownMethod.of(name, explainer) for name, explainer in explainers.items()]
    facts = {
        "split": split,
        "seed": options.seed,
        "threshold": thresholds.tolist() if isinstance(thresholds, Tensor) else thresholds,
        "run": str(run.folder),
        "weights": run.weights,
    }
    facts["model_hash"] = state_hash([run.method])
    about = {
        method.name: {"options": options_of(explainers[method.name]), "signed": method.signed, **facts}
        for method in shown
    }
    summary = {
        "run": str(run.folder),
        "weights": run.weights,
        "model": run.config.model.name,
        "split": split,
        "images": f"{len(rows)} of {len(manifest)}, {manifest.protocol or options.images}",
        "labels": ", ".join(options.labels),
        "threshold": "each label's own" if isinstance(thresholds, Tensor) else f"{thresholds:g}",
        "seed": str(options.seed),
    }
    columns: dict[str, list[Columns]] = {name: [] for name in explainers}
    with whole_folder(out) as folder:
        images = refuse_flat(explained_images(run, asker, explainers, rows, options, columns), explainers)
        images = save_maps(images, folder / "maps", run.classes, about)
        title = f"{run.folder.name}, {f'images of {options.images}' if options.images else f'split {split}'}"
        images = save_pages(images, folder / "grids", run.classes, shown, of_pages, num=options.grids, title=title)
        title = f"Explanations of {title}"
        write_report(folder / "report", ReportData(title, run.classes, shown, images, of_pages, summary))
        if options.measure:
            tables = {name: join(parts) for name, parts in columns.items()}
            write_pairs(folder / "metrics.csv", tables, split, [record.key for record in manifest.records], run.classes)
            means = {name: measured_means(table) for name, table in tables.items()}
            environment = describe_environment(run.precision.device)
            write_json(folder / "metrics.json", {**summary, "environment": environment, "means": means})
    print(f"{', '.join(explainers)}, {len(rows)} of {len(manifest)} images: open {out / 'report' / 'index.html'}")
    return out


def default_name(options: ExplainOptions) -> str:
    return f"explanations_{Path(options.images).resolve().name}" if options.images else "explanations"


def explained_images(
    run: LoadedRun,
    asker: Asker,
    explainers: dict[str, Any],
    rows: Int64[np.ndarray, " n"],
    options: ExplainOptions,
    columns: dict[str, list[Columns]],
) -> Iterator[ExplainedImage]:
    """One after the other, those that have such a label; what is measured of them is added to `columns`."""
    measures = options.measures if options.measure else None
    anything = False
    for batch in batches_of(asker.manifest, run, rows, options).tracked("explaining"):
        if options.measure or options.stored:
            check_whole(batch.view.boxes)
        with run.precision.autocast():
            asked = asker.ask(batch)
            images, measured = ([], {}) if asked is None else asker.explain(asked, explainers, options.seed, measures)
        for name, found in measured.items():
            columns[name].append(found)
        anything = anything or bool(images)
        yield from images
    if not anything:
        raise InputError(f"labels: none of the {len(rows)} images has such a label; there is nothing to explain")


def name_of(role: str, manifest: Manifest) -> str:
    """What a split is called in every table and page: its role, and its own name where that is another."""
    return role if manifest.split == role else f"{role} ({manifest.split})"


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
    losses = []
    for batch in batches_of(manifest, run, np.arange(len(manifest)), options):
        with torch.inference_mode(), run.precision.autocast():
            logits = run.method.predict(batch.images.to(run.precision.device))
        losses.append(image_losses(logits.float().cpu(), batch.targets, run.space))
    worst = torch.cat(losses).nan_to_num(nan=-1).argsort(descending=True).numpy()
    return np.sort(worst[: options.num_images or None])


def read_arguments(argv: list[str], options_type: type, command: str) -> tuple[LoadedRun, Any]:
    """The run, with what is overridden of its data, and the tool's own options."""
    path, rest = take_path(argv, "a run folder")
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


def thresholds_of(run: LoadedRun, options: MapOptions) -> Float[Tensor, " C"] | float:
    """From which score on a class is predicted: what is asked for, else what the run's post-hoc steps say.

    Raises:
        InputError: as `LoadedRun.posthoc`.
    """
    return run.thresholds if options.threshold is None else options.threshold


def new_folder(out: str | Path) -> Path:
    """A folder to write; looked at before anything is computed.

    Raises:
        InputError: it is there already, or the folder that it belongs in is not.
    """
    path = Path(out)
    if os.path.lexists(path):  # a link that leads nowhere, too
        raise InputError(f"out: {out} is there already; give another folder")
    if not path.parent.is_dir():
        raise InputError(f"out: the folder {path.parent} does not exist")
    return path


def rows_of(num: int, manifest: Manifest) -> Int64[np.ndarray, " n"]:
    """So many rows, spread evenly; 0: all."""
    return evenly(num or len(manifest), len(manifest))


def batches_of(manifest: Manifest, run: LoadedRun, rows: Int64[np.ndarray, " n"], options: RunOptions) -> Loader:
    loading = LoaderConfig(eval_batch_size=options.batch_size, num_workers=options.num_workers)
    return eval_loader(manifest, run.view, loading, rows=rows)


# Comparison


def compare(argv: list[str]) -> dict[str, Any]:
    """Every explainer and control on the same pairs of images and labels: comparison.json and .md, pairs.csv with a row for
    each pair, and cross_label.npz with the cross-label matrices."""
    run, options = read_arguments(argv, CompareOptions, "python tools/explain.py compare")
    out = new_folder(options.out or run.folder / "comparison")
    manifest, _ = read_for(run, options.split)
    rows = rows_of(options.num_images, manifest)
    # Sub-sets are spread over the same images: data sets are often sorted by class.
    sensitive, randomise = (
        torch.from_numpy(rows[evenly(num, len(rows))]) for num in (options.sensitivity_images, options.sanity_images)
    )
    thresholds = thresholds_of(run, options)
    reached = "at or above its threshold" if isinstance(thresholds, Tensor) else f">= {thresholds:g}"
    asker = Asker(Subject(run.method), manifest, "relevant", thresholds)
    explainers = chosen_explainers(run, options)
    comparison = Comparison(asker.subject, explainers, options.measures, sensitive, randomise, options.seed)
    for batch in batches_of(manifest, run, rows, options).tracked("explaining"):
        check_whole(batch.view.boxes)
        with run.precision.autocast():
            asked = asker.ask(batch)
            if asked is not None:
                comparison.add(asker.judged(asked))
    if not comparison.tables:
        raise InputError(
            f"{manifest.split}: no label of these {len(rows)} images is present or predicted, or every method was left out"
        )
    protocol = (
        f"{manifest.protocol}; {len(rows)} of {len(manifest)} images of split {manifest.split}, spread evenly, every label "
        f"that is present or predicted (score {reached}); each figure is the mean over labels of the mean "
        "over a label's pairs"
    )
    matrices = comparison.cross_label(len(run.classes))
    result = {
        "protocol": protocol,
        "run": str(run.folder),
        "weights": run.weights,
        "model": run.config.model.name,
        "split": name_of(options.split, manifest),
        "classes": list(run.classes),
        "options": asdict(options) | ({} if isinstance(thresholds, Tensor) else {"threshold": thresholds}),
        "methods": comparison.methods(matrices),
        "environment": describe_environment(run.precision.device),
    }
    table = f"{protocol}.\n\n{markdown([result])}"
    with whole_folder(out) as folder:
        write_json(folder / "comparison.json", result)
        with whole_file(folder / "comparison.md") as file:
            file.write(table + "\n")
        arrays = {
            f"{name}_{part}": array for name, found in matrices.items() for part, array in found._asdict().items()
        }
        write_arrays(folder / "cross_label.npz", {"classes": np.array(run.classes), **arrays})
        keys = [record.key for record in manifest.records]
        write_pairs(folder / "pairs.csv", comparison.tables, result["split"], keys, run.classes)
    print(table)
    print(f"written to {out}: comparison.json, comparison.md, pairs.csv, cross_label.npz")
    return result


def chosen_explainers(run: LoadedRun, options: CompareOptions) -> dict[str, Any]:
    """The explainers that were asked for, and the controls; where none was named, those that the model can carry."""
    built = build_explainers([*(options.methods or EXPLAINERS), *CONTROLS], options.options)
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


# Prototypes


def show_prototypes(argv: list[str]) -> Path:
    """The patches that are nearest to each label: prototypes.png to look at, prototypes.csv to go on with."""
    run, options = read_arguments(argv, PrototypeOptions, "python tools/explain.py prototypes")
    out = new_folder(options.out or run.folder / "prototypes")
    labels = [class_index(name, len(run.classes), run.classes) for name in options.labels or run.classes]
    manifest, _ = read_for(run, options.split)
    split = name_of(options.split, manifest)
    batches = batches_of(manifest, run, rows_of(options.num_images, manifest), options)
    with run.precision.autocast():
        found = find_prototypes(Subject(run.method), batches.tracked("looking"), options.num)
    dataset = batches.dataset
    with whole_folder(out) as folder:
        page = draw_prototypes(
            found,
            labels,
            run.classes,
            manifest.target,
            lambda row: dataset[0, row].views[0].image.permute(1, 2, 0).numpy(),
            title=f"{run.folder.name}, split {split}",
        )
        Image.fromarray(page).save(folder / "prototypes.png")
        write_prototypes(folder / "prototypes.csv", found, labels, manifest, split)
    print(f"{len(labels)} labels, {found.indices.shape[1]} patches each, of {len(manifest)} images: {out}")
    return out
