"""Run a grid of experiments: configs x overrides x seeds, each trained and evaluated once, resumable.

python tools/sweep.py configs/grids/first_path.yaml
python tools/sweep.py configs/grids/first_path.yaml dry_run=true

A run whose record is there already is skipped; one that was interrupted goes on from its checkpoint.
"""

import itertools
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from mlvision.config import Config, build_options, parse_options, run_command
from mlvision.errors import InputError
from mlvision.labels.store import LabelMapStore
from mlvision.run import config_difference, is_trained, read_written

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class SweepOptions:
    """A grid file holds these, and `experiments` is its heart."""

    name: Annotated[str, "name of the grid; empty: the YAML's file name"] = ""
    experiments: Annotated[
        list[dict[str, Any]],
        "each: `config` (path), and if wanted `label`, `overrides` (list), `grid` (key: values; all combinations), `seeds`",
    ] = field(default_factory=list)
    overrides: Annotated[list[str], "key=value for every run"] = field(default_factory=list)
    seeds: Annotated[list[int], "each experiment is run once with each seed"] = field(default_factory=lambda: [0, 1, 2])
    runs: Annotated[str, "folder for the run folders; empty: runs/<name>"] = ""
    records: Annotated[str, "folder for the records of finished runs; empty: docs/results/<name>"] = ""
    bounds: Annotated[list[str], "labels of two experiments between which the results measure the closed gap"] = field(
        default_factory=list
    )
    jobs: Annotated[int, "runs at once; on a shared CPU, give each fewer threads"] = 1
    dry_run: Annotated[bool, "print what would be run, and its state, without running it"] = False


@dataclass(frozen=True)
class Planned:
    """One run: a label that names it within the grid, and the arguments of train.py."""

    label: str
    arguments: tuple[str, ...]


def main(argv: list[str]) -> None:
    options = parse_options(SweepOptions, argv, prog="python tools/sweep.py", description=__doc__)
    runs = Path(options.runs or f"runs/{options.name}")
    records = Path(options.records or f"docs/results/{options.name}")
    if options.jobs < 1:
        raise InputError(f"jobs: expected at least 1, got {options.jobs}")
    planned = plan(options)
    for run in planned:  # every config is checked before the first run starts
        parse_options(Config, list(run.arguments), prog="train.py", description="")
    finished = [is_finished(records / f"{run.label}.json", run) for run in planned]
    for run, done in zip(planned, finished, strict=True):
        print(f"{'finished' if done else 'to run':>8}  {run.label}", flush=True)
    if all(finished):
        print(f"every run has its record in {records}; records=<another folder> runs them again")
    if options.dry_run:
        return
    waiting = [run for run, done in zip(planned, finished, strict=True) if not done]

    def finish(run: Planned) -> bool:
        if not train_and_evaluate(run, runs / run.label):
            return False
        records.mkdir(parents=True, exist_ok=True)
        shutil.copy(runs / run.label / "record.json", records / f"{run.label}.json")
        return True

    with ThreadPoolExecutor(options.jobs) as pool:
        succeeded = list(pool.map(finish, waiting))
    failed = [run.label for run, done in zip(waiting, succeeded, strict=True) if not done]
    if failed:
        raise InputError(f"{len(failed)} of {len(waiting)} runs failed: {', '.join(failed)}; their messages are above")


def plan(options: SweepOptions) -> list[Planned]:
    """Every run of the grid, in order.

    Raises:
        InputError: an experiment without a config or with an unknown key, or two runs with one label.
    """
    if not options.experiments:
        raise InputError("experiments: expected a list with at least one experiment; give a grid file")
    planned = []
    for number, experiment in enumerate(options.experiments):
        unknown = set(experiment) - {"config", "label", "overrides", "grid", "seeds"}
        if unknown or "config" not in experiment:
            raise InputError(
                f"experiments[{number}]: expected config, and optionally label, overrides, grid and seeds; "
                + (f"got {', '.join(sorted(unknown))}" if unknown else "config is missing")
            )
        for key, kind in (("overrides", list), ("grid", dict), ("seeds", list)):
            if not isinstance(experiment.get(key, kind()), kind):
                raise InputError(f"experiments[{number}].{key}: expected a {kind.__name__}, got {experiment[key]!r}")
        grid = experiment.get("grid", {})
        for key, values in grid.items():
            if not isinstance(values, list):
                raise InputError(f"experiments[{number}].grid.{key}: expected a list of values, got {values!r}")
        for values in itertools.product(*grid.values()):
            varied = [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
            own = [*experiment.get("overrides", []), *varied]
            label = "-".join([experiment.get("label", Path(experiment["config"]).stem), *varied]).replace("/", "_")
            for seed in experiment.get("seeds", options.seeds):
                arguments = (experiment["config"], *options.overrides, *own, f"seed={seed}")
                planned.append(Planned(f"{label}-seed{seed}", arguments))
    labels = [run.label for run in planned]
    missing = set(options.bounds) - {label.rsplit("-seed", 1)[0] for label in labels}
    if missing or len(options.bounds) not in (0, 2):
        raise InputError(f"bounds: expected the labels of two experiments, got {options.bounds}")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise InputError(f"experiments: two runs are called '{twice}'; give one of them a label")
    return planned


def is_finished(record: Path, run: Planned) -> bool:
    """Whether a record of this very run is there.

    Raises:
        InputError: the record is of another config: the grid has changed under it.
    """
    if not record.is_file():
        return False
    try:
        content = read_written(record)
        recorded, maps = build_options(Config, content["config"]), content.get("environment", {}).get("label_maps")
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{record}: not a record of this version ({error}); remove it to run it again") from None
    asked = parse_options(Config, list(run.arguments), prog="train.py", description="")
    # What the grid leaves to the machine is as the machine had it.
    open_choices = {"device": "auto", "precision": "auto", "threads": 0}
    left_open = {name: getattr(recorded, name) for name, auto in open_choices.items() if getattr(asked, name) == auto}
    difference = config_difference(recorded, replace(asked, **left_open))
    if difference:
        raise InputError(f"{record}: the grid has changed under it: {difference}; remove it to run it again")
    if (
        asked.label_maps
        and Path(asked.label_maps).is_dir()
        and LabelMapStore.open(asked.label_maps).meta.to_json() != maps
    ):
        raise InputError(
            f"{record}: made with other label maps than {asked.label_maps} holds; remove it to run it again"
        )
    return True


def train_and_evaluate(run: Planned, folder: Path) -> bool:
    """train.py and eval.py in processes of their own; False where one fails, or training was stopped before its end."""

    def succeeds(script: str, *arguments: str) -> bool:
        return subprocess.run([sys.executable, str(ROOT / script), *arguments], check=False).returncode == 0

    config = parse_options(Config, list(run.arguments), prog="train.py", description="")
    trained = succeeds("train.py", *run.arguments, f"out={folder}", "resume=auto")
    return trained and is_trained(folder, config) and succeeds("eval.py", str(folder))


if __name__ == "__main__":
    run_command(main)
