"""Predict the labels of every image in a folder and write a CSV.

python tools/predict.py runs/<name> images=folder out=predictions.csv
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch

from mlvision.config import describe_options, parse_options, run_command
from mlvision.data.folder import folder_manifest
from mlvision.data.images import drop_unreadable
from mlvision.data.limits import MAX_PIXELS
from mlvision.data.loader import LoaderConfig, eval_loader
from mlvision.errors import InputError
from mlvision.run import add_classes, check_images, load_run
from mlvision.types import reaches


@dataclass(frozen=True)
class PredictOptions:
    images: Annotated[str, "folder whose images are predicted, sub-folders included"] = ""
    out: Annotated[str, "CSV to write"] = "predictions.csv"
    extra_labels: Annotated[
        list[str], "names of classes that the model was not trained on; a head that compares with names can take them"
    ] = field(default_factory=list)
    threshold: Annotated[float, "a class is a label where its score is at least this"] = 0.5
    weights: Annotated[str, "raw, ema, or auto: ema where the run has them"] = "auto"
    device: Annotated[str, "auto (GPU where there is one), cpu, cuda or cuda:<number>"] = "auto"
    on_bad_image: Annotated[str, "error: stop at a file that cannot be decoded; skip: leave it out and say so"] = (
        "error"
    )
    max_pixels: Annotated[int, "width times height that an image may have, looked up before it is decoded"] = MAX_PIXELS
    batch_size: Annotated[int, "images a batch"] = 64
    num_workers: Annotated[int, "processes that read images; 0: the main one"] = 2


def main(argv: list[str]) -> None:
    if not argv or {"-h", "--help"} & set(argv):
        print(f"usage: python tools/predict.py RUN [key=value ...]\n\n{__doc__}\n{describe_options(PredictOptions)}")
        return
    path, *rest = argv
    options = parse_options(PredictOptions, rest, prog="python tools/predict.py", description=__doc__)
    if options.on_bad_image not in ("error", "skip"):
        raise InputError(f"on_bad_image: expected error or skip, got '{options.on_bad_image}'")
    out = Path(options.out)
    if not out.parent.is_dir():
        raise InputError(f"out: the folder {out.parent} does not exist")
    run = load_run(path, device=options.device, weights=options.weights)
    if options.extra_labels:
        run = add_classes(run, options.extra_labels)
    if not options.images:
        raise InputError("images: expected a folder, got nothing")
    manifest = folder_manifest(Path(options.images), run.classes, options.max_pixels)
    print(manifest.protocol)
    check_images(run.config.model.in_chans, manifest)
    if options.on_bad_image == "skip":
        manifest, bad = drop_unreadable(manifest, options.num_workers)
        for key, reason in bad:
            print(f"left out: {key} ({reason})")
    loader = eval_loader(
        manifest, run.view, LoaderConfig(eval_batch_size=options.batch_size, num_workers=options.num_workers)
    )

    # Written batch by batch into a partial file, so memory stays flat and a failure leaves no half table.
    partial = out.with_name(out.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="") as file, torch.inference_mode():
            writer = csv.writer(file)
            writer.writerow(["image", "labels", *run.classes])
            for batch in loader:
                with run.precision.autocast():
                    logits = run.method.predict(batch.images.to(run.precision.device))
                scores = run.method.scores(logits.float()).cpu()
                predicted = reaches(scores, options.threshold).tolist()
                for row, found, decisions in zip(batch.index.tolist(), scores.tolist(), predicted, strict=True):
                    labels = [name for name, decision in zip(run.classes, decisions, strict=True) if decision]
                    writer.writerow([manifest.records[row].key, ";".join(labels), *(f"{s:.6f}" for s in found)])
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{len(manifest)} images, {len(run.classes)} classes: {out}")


if __name__ == "__main__":
    run_command(main)
