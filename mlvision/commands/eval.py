"""Evaluate a trained run on one split: metrics.json, the scores of all its images, a per-class table, a precision-recall
figure, and its record.

python eval.py runs/<name>
python eval.py runs/<name> split=val evaluators=[multilabel,bootstrap] device=cpu
python eval.py runs/<name> split=val posthoc=[thresholds]
python eval.py runs/<name>/checkpoints/last.pt
torchrun --nproc-per-node 8 eval.py runs/<name>

Post-hoc steps are fitted on the validation images, with the chosen weights, and kept in the run folder. From then on eval.py
reports what they give beside the plain results, and predict.py and explain.py use them.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from mlvision.config import Config
from mlvision.data.loader import eval_loader
from mlvision.data.manifest import Manifest
from mlvision.engine.distributed import is_main, on_every_rank, on_main, rank, world_size
from mlvision.engine.evaluate import predict
from mlvision.errors import InputError, check_fields
from mlvision.evaluators import (
    BySizeConfig,
    CalibrationConfig,
    Evaluator,
    EvaluatorConfig,
    MultilabelConfig,
    RealConfig,
    check_each_once,
    measure,
)
from mlvision.files import read_written, spreadsheet_text, whole_file, write_arrays
from mlvision.metrics import per_class_table
from mlvision.options import EVALUATION, build_options, describe_options, marked, print_help, take_path
from mlvision.posthoc import Chain, FittedOn, PosthocConfig, fit_chain
from mlvision.runs.folder import is_trained
from mlvision.runs.load import LoadedRun, load_run, read_for
from mlvision.runs.records import write_metrics, write_record
from mlvision.runs.splits import ROLES
from mlvision.types import Predictions


@dataclass(frozen=True)
class EvalOptions:
    """What is evaluated, and what is measured of it."""

    split: Annotated[str, "which of the run's splits: test, val or train"] = "test"
    evaluators: Annotated[list[EvaluatorConfig], "what is measured"] = field(
        default_factory=lambda: [MultilabelConfig(), CalibrationConfig(), BySizeConfig(), RealConfig()]
    )
    posthoc: Annotated[
        list[PosthocConfig], "steps to fit on the validation images, in their order; empty: those that the run has"
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fields(self, "", (("split", self.split in ROLES, f"one of {', '.join(ROLES)}"),))
        check_each_once(self.evaluators)
        if "multilabel" not in (config.name for config in self.evaluators):
            raise InputError("evaluators: expected multilabel among them, by whose metrics records are compared")


OWN = tuple(option.name for option in fields(EvalOptions))
OF_RUN = tuple(marked(Config, EVALUATION))


def usage() -> str:
    return f"""usage: python eval.py RUN [key=value ...]

{__doc__}
{describe_options(EvalOptions)}

Options of the run that still matter here, others are refused: {", ".join(OF_RUN)}. All options of a run:
{describe_options(Config)}"""


def main(argv: list[str]) -> dict:
    print_help(argv, usage, needed=True)
    path, arguments = take_path(argv, "a run folder or a checkpoint")
    options, overrides = on_every_rank(lambda: read_arguments(arguments))
    run, manifests, bad, evaluators = on_every_rank(lambda: prepare(path, options, overrides))
    loaders = {
        role: eval_loader(manifest, run.view, run.config.loader, rank=rank(), world_size=world_size())
        for role, manifest in manifests.items()
    }

    @cache
    def predicted(role: str, weights: str) -> Predictions:
        method = on_every_rank(partial(run.with_weights, weights)).method
        what = f"evaluating {weights} weights" if role == options.split else f"validation images, {weights} weights"
        return predict(method, loaders[role].tracked(what, shown=is_main()), run.precision)

    if options.posthoc:  # before the split is predicted: what cannot be fitted is found out early
        of_val = predicted("val", run.weights)
        chain = on_every_rank(lambda: fitted(options.posthoc, run, manifests["val"], of_val))
    else:
        chain = on_every_rank(lambda: run.posthoc)
    predictions = {
        weights: predicted(options.split, weights) for weights in (("raw", "ema") if run.weights == "ema" else ("raw",))
    }
    return on_main(lambda: report(path, options, run, manifests[options.split], bad, evaluators, predictions, chain))


def read_arguments(arguments: Sequence[str]) -> tuple[EvalOptions, list[str]]:
    """The options of evaluation itself, and the arguments that override those of the run."""
    own = [argument for argument in arguments if re.split("[.=]", argument)[0] in OWN]
    overrides = [argument for argument in arguments if argument not in own]
    for argument in overrides:
        key = argument.partition("=")[0]
        if not any(key == used or key.startswith(f"{used}.") for used in OF_RUN):
            raise InputError(
                f"{key}: evaluation does not use this option; expected some of {', '.join((*OWN, *OF_RUN))}"
            )
    return build_options(EvalOptions, {}, overrides=own), overrides


def prepare(
    path: str, options: EvalOptions, overrides: list[str]
) -> tuple[LoadedRun, dict[str, Manifest], list[tuple[str, str, str]], list[Evaluator]]:
    """The run, by role the images that judge it and those that steps are fitted on, (split, key, reason) of each of the
    former that was left out, and what measures it."""
    run = load_run(path, overrides=overrides)
    manifest, bad = read_for(run, options.split)
    manifests = {options.split: manifest}
    if options.posthoc and options.split != "val":
        manifests["val"], _ = read_for(run, "val")
    for name in ("environment.json", "metrics.json"):  # read again when all is predicted: too late to learn of damage
        if (run.folder / name).is_file():
            read_written(run.folder / name)
    return run, manifests, bad, [config.build(run.context) for config in options.evaluators]


def fitted(configs: list[PosthocConfig], run: LoadedRun, val: Manifest, predictions: Predictions) -> Chain:
    """The steps, fitted on predictions of the run's validation images."""
    fitted_on = FittedOn("val", f"{val.protocol}; split {val.split}", len(predictions.index), run.weights, run.step)
    return fit_chain(configs, predictions, replace(run.context, space=predictions.space), fitted_on)


def report(
    path: str,
    options: EvalOptions,
    run: LoadedRun,
    manifest: Manifest,
    bad: list[tuple[str, str, str]],
    evaluators: list[Evaluator],
    predictions: dict[str, Predictions],
    chain: Chain | None,
) -> dict:
    """Write and print what the predictions of each weights are worth, and the run's own after the post-hoc steps; the
    metrics."""
    role, chosen = options.split, predictions[run.weights]
    from mlvision.metrics.figures import draw_precision_recall  # matplotlib: a second to import

    results = {weights: measure(evaluators, of_weights, manifest) for weights, of_weights in predictions.items()}
    table = per_class_table(chosen.logits, chosen.targets, manifest.classes, space=chosen.space)

    after = chain and chain.apply(chosen)
    if after:
        results["posthoc"] = measure(evaluators, after, manifest)
        table = with_posthoc(table, after, manifest)

    # What is said of another checkpoint than the chosen one stands beside the run's own, under its name.
    of_checkpoint = Path(path).is_file()
    name = f"{role}_{Path(path).stem}" if of_checkpoint else role
    table_file, figure_file = run.folder / f"per_class_{name}.csv", run.folder / f"precision_recall_{name}.png"
    scores_file = run.folder / f"predictions_{name}.npz"
    save_predictions(scores_file, chosen, manifest)
    if chain and options.posthoc:
        chain.save(run.posthoc_file)
    with whole_file(table_file, newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(row | {"class": spreadsheet_text(str(row["class"]))} for row in table)
    with whole_file(figure_file, "wb") as file:
        draw_precision_recall(file, chosen.logits, chosen.targets, manifest.classes)
    metrics = {
        "protocol": f"{manifest.protocol}; {len(manifest)} images, {len(manifest.classes)} classes, "
        f"{run.config.view.eval_side} px, split {manifest.split}; plain AP, F-measures at 0.5"
        + (f"; posthoc: {chain.phrase}" if chain else ""),
        "checkpoint": str(Path(path)),
        "weights": run.weights,
        "skipped_images": [{"key": key, "reason": reason} for _, key, reason in bad],
        **results,
    }
    write_metrics(run, name, metrics)
    written = ["metrics.json", scores_file.name, table_file.name, figure_file.name]
    written += [str(run.posthoc_file.relative_to(run.folder))] if options.posthoc else []
    if role == "test" and not of_checkpoint:
        if is_trained(run.folder, run.config):
            write_record(run, metrics)
            written.append("record.json")
        else:
            print("no record.json is written: checkpoints/last.pt does not say that this run was trained to its end")
    print(metrics["protocol"])
    for weights, summary in ((weights, results[weights]) for weights in predictions):
        shown = f"mAP (plain) {summary['mAP']:.4f}  CF1 {summary['CF1']:.4f}  OF1 {summary['OF1']:.4f}"
        shown += f"  mAP from {summary['mAP_low']:.4f} to {summary['mAP_high']:.4f}" if "mAP_low" in summary else ""
        shown += f"  ReaL accuracy {summary['real_accuracy']:.4f}" if "real_accuracy" in summary else ""
        mark = "*" if weights == run.weights else " "
        print(f"{weights:>4} {mark}  {shown}  ({summary['num_skipped_classes']} classes without positives)")
        logits, space = predictions[weights].logits, predictions[weights].space
        if not space.decide(space.scores(logits), 0.5).any():
            print("        no score reaches 0.5, so nothing is predicted, and CF1 and OF1 are 0")
    if chain:
        before, now = results[run.weights], results["posthoc"]
        names = ("CF1", "OF1", "CF1_exact3", "OF1_exact3")
        changes = "  ".join(f"{name} {before[name]:.4f} -> {now[name]:.4f}" for name in names)
        print(f"posthoc  {changes}" + ("  (of the images that it was fitted on)" if role == "val" else ""))
    print(f"written to {run.folder}: {', '.join(written)}")
    return metrics


def with_posthoc(
    table: list[dict[str, str | float | int]], after: Predictions, manifest: Manifest
) -> list[dict[str, str | float | int]]:
    """The rows of the plain table, with each class's threshold after the post-hoc steps and what it decides."""
    rows = per_class_table(after.logits, after.targets, manifest.classes, threshold=after.thresholds, space=after.space)
    thresholds = torch.as_tensor(after.thresholds).expand(len(table)).tolist()
    names = ("precision", "recall", "f1")
    return [
        plain | {"threshold": threshold} | {f"{name}_posthoc": row[name] for name in names}
        for plain, row, threshold in zip(table, rows, thresholds, strict=True)
    ]


def save_predictions(path: Path, predictions: Predictions, manifest: Manifest) -> None:
    """Keep the scores of a split, so that whatever is measured or fitted afterwards needs no second pass.

    The .npz needs nothing else to be understood; its rows are in the order of the manifest:

    | array | |
    | --- | --- |
    | logits | `[N, C]` float32, of the weights that metrics.json names as the run's |
    | targets | `[N, C]` float32: 1 present, 0 absent, NaN unknown |
    | index | `[N]` int64: rows of the manifest |
    | keys | `[N]` text: the images |
    | classes | `[C]` text: the columns |
    | groups | `[G]` int64: sizes of groups of consecutive classes that share a softmax, 1: a class that has a sigmoid |
    | exclusive | `[E]` int64: sizes of groups of which each image shows exactly one class, 1: a class for itself |
    """
    arrays = {
        "logits": predictions.logits.numpy(),
        "targets": predictions.targets.numpy(),
        "index": predictions.index.numpy(),
        "keys": np.array([manifest.records[row].key for row in predictions.index.tolist()]),
        "classes": np.array(manifest.classes),
        "groups": np.array(predictions.space.groups),
        "exclusive": np.array(predictions.space.exclusive),
    }
    write_arrays(path, arrays)
