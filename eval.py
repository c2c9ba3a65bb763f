"""Evaluate a trained run on one split: metrics.json, a per-class table, a precision-recall figure, and its record.

python eval.py runs/<name>
python eval.py runs/<name> data.split=val device=cpu
python eval.py runs/<name>/checkpoints/last.pt
"""

import csv
from pathlib import Path

from mlvision.config import Config, describe_options, run_command
from mlvision.data.imagenet import has_real_labels
from mlvision.data.loader import eval_loader
from mlvision.engine.evaluate import predict
from mlvision.errors import InputError
from mlvision.metrics import multilabel_summary, per_class_table, real_accuracy
from mlvision.metrics.figures import draw_precision_recall
from mlvision.run import is_trained, load_run, read_for, write_metrics, write_record

USAGE = f"""usage: python eval.py RUN [key=value ...]

{__doc__}
Options of the run that still matter here: data.root, data.test, data.split, data.on_bad_image, loader.eval_batch_size,
loader.num_workers, device, precision, threads. All options:
{describe_options(Config)}"""


def main(argv: list[str]) -> dict:
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return {}
    path, *overrides = argv
    if "=" in path and not Path(path).exists():
        raise InputError(f"'{path}': expected a run folder or a checkpoint first, then key=value")
    run = load_run(path, overrides=overrides)
    role = run.config.data.split
    manifest, bad = read_for(run, role)
    loader = eval_loader(manifest, run.view, run.config.loader)

    results, chosen = {}, run.weights
    for weights in ("raw", "ema") if chosen == "ema" else ("raw",):
        method = load_run(path, overrides=overrides, weights=weights).method if weights != chosen else run.method
        found = predict(method, loader, run.precision)
        results[weights] = multilabel_summary(found.logits, found.targets, activation=method.activation)
        if has_real_labels(run.config.data, manifest.split):
            labels = [record.labels for record in manifest.records]
            results[weights]["real_accuracy"] = real_accuracy(found.logits, labels)
        if weights == chosen:
            predictions = found
    activation = run.method.activation
    table = per_class_table(predictions.logits, predictions.targets, manifest.classes, activation=activation)

    # What is said of another checkpoint than the chosen one stands beside the run's own, under its name.
    of_checkpoint = Path(path).is_file()
    name = f"{role}_{Path(path).stem}" if of_checkpoint else role
    table_file, figure_file = run.folder / f"per_class_{name}.csv", run.folder / f"precision_recall_{name}.png"
    with open(table_file, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    draw_precision_recall(figure_file, predictions.logits, predictions.targets, manifest.classes)
    metrics = {
        "protocol": f"{manifest.protocol}; {len(manifest)} images, {len(manifest.classes)} classes, "
        f"{run.config.view.eval_side} px, split {manifest.split}; plain AP, F-measures at 0.5",
        "checkpoint": str(Path(path)),
        "weights": chosen,
        "skipped_images": [{"key": key, "reason": reason} for _, key, reason in bad],
        **results,
    }
    write_metrics(run, name, metrics)
    written = ["metrics.json", table_file.name, figure_file.name]
    if role == "test" and not of_checkpoint:
        if is_trained(run.folder, run.config.optim.epochs):
            write_record(run, metrics)
            written.append("record.json")
        else:
            print("this run has not been trained to its end: no record.json is written for it")
    print(metrics["protocol"])
    for weights, summary in results.items():
        shown = f"mAP (plain) {summary['mAP']:.4f}  CF1 {summary['CF1']:.4f}  OF1 {summary['OF1']:.4f}"
        shown += f"  ReaL accuracy {summary['real_accuracy']:.4f}" if "real_accuracy" in summary else ""
        mark = "*" if weights == chosen else " "
        print(f"{weights:>4} {mark}  {shown}  ({summary['num_skipped_classes']} classes without positives)")
    print(f"written to {run.folder}: {', '.join(written)}")
    return metrics


if __name__ == "__main__":
    run_command(main)
