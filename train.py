"""Train a multi-label classifier.

python train.py configs/scenes_efficientnet_lite0_baseline.yaml optim.lr=3e-4 seed=1
python train.py configs/scenes_efficientnet_lite0_baseline.yaml resume=auto
"""

from mlvision.config import Config, parse_options, run_command
from mlvision.engine.callbacks import ProgressBar
from mlvision.engine.fit import fit
from mlvision.run import build_callbacks, build_run, choose_folder, note_resumption, start_folder


def main(argv: list[str]) -> None:
    config = parse_options(Config, argv, prog="python train.py", description="Train a multi-label classifier.")
    run = build_run(config)
    folder, resume = choose_folder(run.config)
    watching = build_callbacks(run)  # reads images: before anything is written
    if resume:
        note_resumption(run, folder)
    else:
        start_folder(run, folder)
    for split, key, reason in run.bad_images:
        print(f"left out of {split}: {key} ({reason})")
    print(
        f"{'resuming' if resume else 'training'} {folder}: {len(run.train)} train and {len(run.val)} val images, "
        f"{len(run.train.classes)} classes, {run.config.device} {run.config.precision}, threads={run.config.threads}\n"
        f"validation: {run.val.protocol}; {run.config.view.eval_side} px"
    )
    state = fit(
        run.method,
        run.train_loader,
        run.val_loader,
        run_dir=folder,
        classes=run.train.classes,
        keys=[record.key for record in run.train.records],
        data_hashes=run.data_hashes,
        precision=run.precision,
        optim=run.config.optim,
        ema=run.config.ema,
        checkpoint=run.config.checkpoint,
        log=run.config.log,
        resume=resume,
        callbacks=[ProgressBar(), *watching],
    )
    if state.epoch == run.config.optim.epochs:
        print(f"done; python eval.py {folder} reads the test split")


if __name__ == "__main__":
    run_command(main)
