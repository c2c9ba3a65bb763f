"""The folder of a run: which one it gets, what is written there before training starts, and what a resume must find."""

import contextlib
import csv
import dataclasses
import glob
import io
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from mlvision.config import Config, config_difference, load_config
from mlvision.data.images import file_sizes
from mlvision.engine.checkpoint import load_checkpoint
from mlvision.engine.fit import LAST
from mlvision.engine.lock import LOCK, locked
from mlvision.errors import InputError, shown
from mlvision.files import read_written, whole_file, write_json
from mlvision.label_maps.store import LabelMapStore
from mlvision.models import HEADS
from mlvision.options import save_options
from mlvision.runs.build import Run
from mlvision.runs.environment import describe_environment
from mlvision.text_files import read_text

STATISTICS = "statistics.json"
_IMAGE_COLUMNS = ("split", "key", "bytes")  # of images.csv
_ASSET_FILES = {file for config in HEADS.values() for file in config.asset_files}
_WRITTEN_FIRST = {LOCK, "images.csv", "bad_images.csv", STATISTICS, "environment.json", *_ASSET_FILES, "config.yaml"}


@contextlib.contextmanager
def claim_folder(config: Config) -> Iterator[tuple[Path, bool]]:
    """As `choose_folder`, and no other process gets that folder while the context lasts.

    Raises:
        InputError: as `choose_folder`; or another process trains there.
    """
    folder, _ = choose_folder(config)
    with locked(folder):
        # Again, now that nobody else changes what is there.
        yield choose_folder(dataclasses.replace(config, out=str(folder)))


def choose_folder(config: Config) -> tuple[Path, bool]:
    """The run folder of a resolved config, and whether a run in it is to be continued; writes nothing.

    Raises:
        InputError: the folder holds a run and `resume` is not auto, or it holds a run of another config.
    """
    if config.out:
        folder = Path(config.out)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"out: {folder} is a file, expected a folder")
        if not (folder / "config.yaml").is_file():
            files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            foreign = [name for name in files if name.removesuffix(".partial") not in _WRITTEN_FIRST]
            if foreign:
                raise InputError(
                    f"out: {folder} holds no run but other files ({sorted(foreign)[0]}); give a new folder"
                )
            return folder, False
        if not config.resume:
            raise InputError(f"out: {folder} already holds a run; resume=auto continues it, another out= starts anew")
        difference = config_difference(load_config(folder / "config.yaml"), config)
        if difference:
            raise InputError(f"out: {folder} holds a run of another config: {difference}")
        return folder, (folder / LAST).is_file()
    name = config.name or "run"
    if config.resume:
        for path in sorted(Path("runs").glob(f"{glob.escape(name)}-*/config.yaml"), key=os.path.getmtime, reverse=True):
            if (path.parent / LAST).is_file() and _is_same(path, config):
                return path.parent, True
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, number = Path("runs") / f"{name}-{stamp}", 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{stamp}-{number}", number + 1
    return folder, False


def _is_same(path: Path, config: Config) -> bool:
    """Whether the run with the config at `path` computes the same; one that cannot be read any more does not."""
    try:
        saved = load_config(path)
        if config_difference(saved, config):
            return False
        if saved.label_maps == config.label_maps:
            return True
        maps = read_written(path.with_name("environment.json")).get("label_maps")
        return LabelMapStore.open(config.label_maps).meta.to_json() == maps
    except InputError:
        return False


def start_folder(run: Run, folder: Path) -> None:
    """Make a new run's folder: config.yaml, environment.json, images.csv (which image trained and which validated, and the
    bytes of its file), statistics.json (of the training labels), bad_images.csv where images were skipped, and the files
    that the head was built from."""
    folder.mkdir(parents=True, exist_ok=True)
    if run.bad_images:
        with whole_file(folder / "bad_images.csv", newline="") as file:
            csv.writer(file).writerows([("split", "key", "reason"), *run.bad_images])
    with whole_file(folder / "images.csv", newline="") as file:
        csv.writer(file).writerows([_IMAGE_COLUMNS, *_image_rows(run)])
    write_json(folder / STATISTICS, dataclasses.asdict(run.statistics))
    environment = describe_environment(run.precision.device)
    if run.label_maps:
        environment["label_maps"] = run.label_maps.meta.to_json()
    write_json(folder / "environment.json", environment)
    run.method.classifier.head.save_assets(folder, run.train.classes)
    save_options(run.config, folder / "config.yaml")  # last: its presence says that a run is here


def note_resumption(run: Run, folder: Path) -> None:
    """Add this machine and code to environment.json: a run may go on with others than it began with, not on other images.

    Raises:
        InputError: files of images have other sizes than when the run began, or the run's own files are damaged.
    """
    sizes = {(split, key): size for split, key, size in read_images(str(folder / "images.csv"))}
    changed = [key for split, key, size in _image_rows(run) if sizes.get((split, key), size) not in (size, None)]
    if changed:
        raise InputError(
            f"{folder}: {len(changed):,} image files have other sizes than when the run began, the first is {changed[0]}; "
            "restore them, or start a new run"
        )
    environment = read_written(folder / "environment.json")
    resumed = environment.get("resumed", [])
    if not isinstance(resumed, list):
        raise InputError(f"{folder / 'environment.json'}: 'resumed' is no list, as it was written; the file is damaged")
    write_json(
        folder / "environment.json", environment | {"resumed": [*resumed, describe_environment(run.precision.device)]}
    )


def _image_rows(run: Run) -> Iterator[tuple[str, str, int | None]]:
    """The rows of images.csv."""
    for role, manifest in (("train", run.train), ("val", run.val)):
        for key, size in zip(manifest.keys, file_sizes(manifest), strict=True):
            yield role, key, size


def read_images(path: str) -> list[tuple[str, str, int | None]]:
    """The rows of a run's images.csv; there is no run without one. Runs of earlier versions have no column of bytes."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        header, *rows = list(reader) or [[]]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error
    if tuple(header) not in (_IMAGE_COLUMNS, _IMAGE_COLUMNS[:2]):
        raise InputError(f"{path}: expected the columns split and key, got {shown(header)}")
    images = []
    for number, row in enumerate(rows, start=2):
        split, key, size = (*row, "", "", "")[:3]
        is_size = not size or (size.isascii() and size.isdigit() and len(size) < 20)
        if len(row) != len(header) or split not in ("train", "val") or not is_size:
            raise InputError(f"{path}, row {number}: expected train or val and a key, got {shown(row)}")
        images.append((split, key, int(size) if size else None))
    return images


def is_trained(folder: Path, config: Config) -> bool:
    """Whether the run in `folder` has come to its end; false where its last checkpoint is not there to say so."""
    if not (folder / LAST).is_file():
        return False
    saved = load_checkpoint(folder / LAST)
    return config.checkpoint.ends(saved["epoch"], config.optim.epochs, saved.get("best_epoch", 0))
