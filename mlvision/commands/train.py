"""Train a multi-label classifier.

python train.py configs/scenes_efficientnet_lite0_baseline.yaml optim.lr=3e-4 seed=1
python train.py configs/scenes_efficientnet_lite0_baseline.yaml resume=auto
torchrun --nproc-per-node 8 train.py configs/scenes_efficientnet_lite0_baseline.yaml
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from mlvision.config import Config, parse_run_options
from mlvision.engine.callbacks import Callback, ProgressBar
from mlvision.engine.distributed import on_every_rank, on_main, world_size
from mlvision.engine.fit import fit
from mlvision.engine.trainer import Trainer
from mlvision.errors import listed
from mlvision.runs.build import Run, build_callbacks, build_run
from mlvision.runs.folder import claim_folder, note_resumption, start_folder


def main(argv: list[str]) -> int:
    """The exit code: 130 when Ctrl-C ended training, which is saved then, else 0."""
    run, watching = on_every_rank(lambda: prepare(argv))
    with ExitStack() as stack:
        folder, resume = on_main(lambda: open_folder(run, stack))
        config = run.config
        trainer = Trainer(
            run.method,
            config.optim,
            run.precision,
            steps_per_epoch=len(run.train_loader),
            images_per_step=config.loader.batch_size,
            keys=run.train.keys,
            ema=config.ema,
            log=config.log,
        )
        fit(
            trainer,
            run.train_loader,
            run.eval_loaders,
            run.measure,
            run_dir=folder,
            identity=run.identity,
            checkpoint=config.checkpoint,
            seed=config.seed,
            tensorboard=config.log.tensorboard,
            resume=resume,
            callbacks=[ProgressBar(), *watching],
        )
    if trainer.epoch == config.optim.epochs:
        print(f"done; python eval.py {folder} reads the test split")
    return 130 if trainer.stopped_by == "SIGINT" else 0


def prepare(argv: list[str]) -> tuple[Run, Sequence[Callback]]:
    """The run and what watches it; whatever is wrong with them is found before anything is written."""
    config = parse_run_options(Config, argv, prog="python train.py", description="Train a multi-label classifier.")
    run = build_run(config)
    return run, build_callbacks(run)


def open_folder(run: Run, stack: ExitStack) -> tuple[Path, bool]:
    """The run's folder, made or found, and whether a run in it goes on; it is this run's until `stack` is left."""
    folder, resume = stack.enter_context(claim_folder(run.config))
    if resume:
        note_resumption(run, folder)
    else:
        start_folder(run, folder)
        if run.config.resume:
            print("resume=auto: no checkpoint of this run to go on from; a new one begins")
    for split, key, reason in run.bad_images:
        print(f"left out of {split}: {key} ({reason})")
    print(
        f"{'resuming' if resume else 'training'} {folder}: {len(run.train)} train and {len(run.val)} val images, "
        f"{len(run.train.classes)} classes, {run.config.device} {run.config.precision}, threads={run.config.threads}"
        f"{f', {world_size()} processes' if world_size() > 1 else ''}\n"
        f"training: {run.train.protocol}\n"
        f"validation: {run.val.protocol}; {run.config.view.eval_side} px"
    )
    for line in left_out(run):
        print(line)
    return folder, resume


def left_out(run: Run) -> Iterator[str]:
    """What of the training images an epoch does not see, and what their labels do not show, in words."""
    batches = run.train_loader.batches
    num_dropped = batches.num_images % batches.batch_size
    if num_dropped:
        yield (
            f"note: each epoch drops {num_dropped} of {batches.num_images:,} images (incomplete last batch of "
            f"{batches.batch_size}); which ones varies by epoch"
        )
    absent = [name for name, number in zip(run.train.classes, run.statistics.positives, strict=True) if not number]
    if absent:
        yield f"note: no training image shows {len(absent)} of the classes: {listed(absent, most=10)}"
    num_empty = int((run.train.labels_per_image() == 0).sum())
    if run.config.data.edits and num_empty:
        yield f"note: no class is known to be present in {num_empty:,} of {len(run.train):,} training images"
