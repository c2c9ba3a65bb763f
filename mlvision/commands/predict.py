"""Predict the labels of images: a folder, single files, or a split of the run's own data.

python tools/predict.py runs/<name> images=folder out=predictions.csv
python tools/predict.py runs/<name> images=[a.jpg,more/b.png] out=predictions.jsonl top_k=3
python tools/predict.py runs/<name> split=val out=val.csv

.csv has the columns image, labels (apart by ;) and one per class, its score. A name that a spreadsheet would take for a
formula, by its first letter = + - or @, has an apostrophe in front there. .jsonl has one JSON object per line, {"image":
..., "labels": [...], "scores": {class: score}}, with every name as it is. The labels are those whose score reaches
`threshold` (of classes that exclude each other the best one), or with `top_k` the classes of the highest scores, the highest
first. Post-hoc steps that eval.py has fitted for the run are applied, unless `threshold` is given.

Options of data.* are the run's own, overridden: data.on_bad_image=skip leaves out files that cannot be decoded,
data.max_pixels is the largest image that is read.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Annotated, NamedTuple

import torch

from mlvision.data.folder import images_manifest
from mlvision.data.images import drop_unreadable
from mlvision.data.loader import MOST_WORKERS, LoaderConfig, eval_loader
from mlvision.data.manifest import Manifest
from mlvision.engine.precision import MOST_THREADS
from mlvision.errors import InputError, check_fields, printable
from mlvision.files import check_out, spreadsheet_text, whole_file
from mlvision.options import describe_options, parse_options, print_help, take_path
from mlvision.posthoc import Chain
from mlvision.progress import track
from mlvision.runs.load import LoadedRun, add_classes, load_run, read_for
from mlvision.runs.splits import check_images
from mlvision.types import Predictions

SEPARATOR = ";"  # of labels in one cell
OWN_COLUMNS = ("image", "labels")


@dataclass(frozen=True)
class PredictOptions:
    images: Annotated[
        list[str], "what is predicted: a folder, sub-folders included, an image file, or a list of both"
    ] = field(default_factory=list)
    split: Annotated[str, "instead of images: role of the run's own images, test, val or train"] = ""
    out: Annotated[str, "file to write, .csv or .jsonl; one that is there is replaced"] = "predictions.csv"
    extra_labels: Annotated[
        list[str], "names of classes that the model was not trained on; a head that compares with names can take them"
    ] = field(default_factory=list)
    threshold: Annotated[
        float | None,
        "a class is a label where its score is at least this; of classes that exclude each other the best is; nothing: "
        "what the run's post-hoc steps say, else 0.5",
    ] = None
    top_k: Annotated[
        int, "label each image with its k highest-scoring classes, ignoring `threshold`; 0: use `threshold`"
    ] = 0
    weights: Annotated[str, "raw, ema, or auto: ema where the run has them"] = "auto"
    device: Annotated[str, "auto (GPU where there is one), cpu, cuda or cuda:<number>"] = "auto"
    threads: Annotated[int, "CPU threads of torch; 0: torch's own choice"] = 0
    batch_size: Annotated[int, "images a batch"] = 64
    num_workers: Annotated[int, "processes that read images; 0: the main one"] = 2

    def __post_init__(self) -> None:
        rules = (
            ("images", not (self.images and self.split), "nothing next to split="),
            ("threshold", self.threshold is None or 0 <= self.threshold <= 1, "a score, from 0 to 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("threads", 0 <= self.threads <= MOST_THREADS, f"0 to {MOST_THREADS}"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("num_workers", 0 <= self.num_workers <= MOST_WORKERS, f"0 to {MOST_WORKERS}"),
        )
        check_fields(self, "", rules)


class Predicted(NamedTuple):
    """One image: its key, the indices of its labels, and the score of each class."""

    key: str
    labels: list[int]
    scores: list[float]


def main(argv: list[str]) -> None:
    usage = "usage: python tools/predict.py RUN [key=value ...]"
    print_help(argv, lambda: f"{usage}\n\n{__doc__}\n{describe_options(PredictOptions)}", needed=True)
    path, rest = take_path(argv, "a run folder or a checkpoint")
    of_data = [argument for argument in rest if argument.startswith("data.")]
    own = [argument for argument in rest if argument not in of_data]
    options = parse_options(PredictOptions, own, prog="python tools/predict.py", description=__doc__)
    out = check_out(options.out, tuple(WRITERS))
    write = WRITERS[out.suffix.lower()]
    if options.threads:
        torch.set_num_threads(options.threads)
    run = load_run(path, device=options.device, weights=options.weights, overrides=of_data)
    chain = run.posthoc if options.threshold is None else None
    if chain and options.extra_labels:
        raise InputError(
            "extra_labels: the run's post-hoc steps were fitted for its own classes only; threshold= does without them"
        )
    of_run, run = run, add_classes(run, options.extra_labels) if options.extra_labels else run
    manifest = read_images(of_run, options)
    if options.top_k > len(run.classes):
        raise InputError(f"top_k: expected at most the {len(run.classes)} classes, got {options.top_k}")
    if write is write_csv:
        check_columns(run.classes)
    with whole_file(out, newline="") as file:  # written batch by batch, so memory stays flat
        write(file, run.classes, predictions(run, manifest, options, chain))
    if chain:
        print(f"post-hoc steps: {chain.phrase}")
    print(f"{len(manifest)} images, {len(run.classes)} classes: {printable(str(out))}")
    names = [*run.classes, *(record.key for record in manifest.records)] if write is write_csv else []
    num_changed = sum(spreadsheet_text(name) != name for name in names)
    if num_changed:
        print(f"{num_changed} names begin like a formula and have an apostrophe in front; .jsonl has them as they are")


def read_images(run: LoadedRun, options: PredictOptions) -> Manifest:
    """The images that are asked for, without those that are to be left out.

    Raises:
        InputError: none, or more than one way to name them; a file that is none.
    """
    if not options.images and not options.split:
        raise InputError(
            "images: expected a folder or image files, got nothing; split= names a split of the run's data"
        )
    data = run.config.data
    if options.split:
        config = replace(run.config, loader=replace(run.config.loader, num_workers=options.num_workers))
        manifest, unreadable = read_for(replace(run, config=config), options.split)
        bad = [(key, reason) for _, key, reason in unreadable]
    else:
        manifest, bad = images_manifest(options.images, run.classes, data.max_pixels), []
        check_images(run.config.model.in_chans, manifest)
        if data.on_bad_image == "skip":
            manifest, bad = drop_unreadable(manifest, options.num_workers)
    print(printable(manifest.protocol))
    for key, reason in bad:
        print(f"left out: {printable(key)} ({printable(reason)})")
    return manifest


def predictions(
    run: LoadedRun, manifest: Manifest, options: PredictOptions, chain: Chain | None
) -> Iterator[Predicted]:
    """What the run says of each image, in the order of the manifest."""
    device = run.precision.device
    loading = LoaderConfig(eval_batch_size=options.batch_size, num_workers=options.num_workers)
    loader = eval_loader(manifest, run.view, loading)
    for batch in track(loader, len(loader), "predicting", "batches", images=options.batch_size):
        with torch.inference_mode(), run.precision.autocast():
            logits = run.method.predict(batch.images.to(device))
        logits = logits.float().cpu()
        found = Predictions(logits, torch.full_like(logits, math.nan), batch.index, run.space)
        found = chain.apply(found) if chain else found
        scores = run.space.scores(found.logits)
        if options.top_k:
            labels = scores.topk(options.top_k, dim=1).indices.tolist()
        else:
            threshold = found.thresholds if options.threshold is None else options.threshold
            labels = [row.nonzero().flatten().tolist() for row in run.space.decide(scores, threshold)]
        for row, own_labels, own_scores in zip(batch.index.tolist(), labels, scores.tolist(), strict=True):
            key = manifest.records[row].key
            if any(map(math.isnan, own_scores)):
                raise InputError(f"{key}: the model gives NaN for it: its weights are damaged, or {device} is")
            yield Predicted(key, own_labels, own_scores)


def check_columns(classes: Sequence[str]) -> None:
    """Refuse class names that a reader of the CSV would take for something else.

    Raises:
        InputError: a name that is a column's already, or that holds what sets labels apart.
    """
    for name in classes:
        fault = ""
        if name in OWN_COLUMNS:
            fault = "is also the name of a column"
        elif SEPARATOR in name:
            fault = f"holds the '{SEPARATOR}' that sets labels apart"
        if fault:
            raise InputError(f"out: class '{name}' {fault} of a .csv; write a .jsonl instead")


def write_csv(file: IO[str], classes: Sequence[str], rows: Iterable[Predicted]) -> None:
    writer = csv.writer(file)
    writer.writerow([*OWN_COLUMNS, *map(spreadsheet_text, classes)])
    for row in rows:
        labels = SEPARATOR.join(classes[label] for label in row.labels)
        writer.writerow([spreadsheet_text(row.key), spreadsheet_text(labels), *(f"{s:.6f}" for s in row.scores)])


def write_jsonl(file: IO[str], classes: Sequence[str], rows: Iterable[Predicted]) -> None:
    for row in rows:
        scores = {name: round(score, 6) for name, score in zip(classes, row.scores, strict=True)}
        labels = [classes[label] for label in row.labels]
        file.write(json.dumps({"image": row.key, "labels": labels, "scores": scores}, ensure_ascii=False) + "\n")


WRITERS: dict[str, Callable[[IO[str], Sequence[str], Iterable[Predicted]], None]] = {
    ".csv": write_csv,
    ".jsonl": write_jsonl,
}
