"""Run a grid of experiments: configs x overrides x seeds, each trained and evaluated once, resumable.

python tools/sweep.py configs/grids/first_path.yaml
python tools/sweep.py configs/grids/first_path.yaml dry_run=true

A run whose record is there already is skipped; one that was interrupted goes on from its checkpoint. SIGTERM and Ctrl-C have
the runs under way save, and end with them.
"""

import contextlib
import ctypes
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from mlvision.config import Config, config_difference, parse_run_options, saved_config
from mlvision.errors import InputError, check_fields
from mlvision.files import check_out_folder, is_file_name, whole_file
from mlvision.label_maps.store import LabelMapStore
from mlvision.options import parse_options
from mlvision.runs.folder import is_trained
from mlvision.runs.records import read_record

PROGRAM = (sys.executable, "-m", "mlvision")
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclass(frozen=True)
class Experiment:
    """One entry of a grid file's `experiments`."""

    config: Annotated[str, "path of its YAML"] = ""
    label: Annotated[str, "what its runs are called; empty: as the YAML's file"] = ""
    overrides: Annotated[list[str], "key=value"] = field(default_factory=list)
    grid: Annotated[dict[str, list[str]], "key -> values; all combinations are run"] = field(default_factory=dict)
    seeds: Annotated[list[int] | None, "instead of the grid's"] = None


@dataclass(frozen=True)
class SweepOptions:
    """A grid file holds these, and `experiments` is its heart."""

    name: Annotated[str, "name of the grid; empty: the YAML's file name"] = ""
    experiments: Annotated[
        list[Experiment],
        "each: `config` (path), and if wanted `label`, `overrides` (list), `grid` (key: values; all combinations), `seeds`",
    ] = field(default_factory=list)
    overrides: Annotated[list[str], "key=value for every run"] = field(default_factory=list)
    seeds: Annotated[list[int], "each experiment is run once with each seed"] = field(default_factory=lambda: [0, 1, 2])
    runs: Annotated[str, "folder for the run folders; empty: runs/<name>"] = ""
    records: Annotated[str, "folder for the records of finished runs; empty: docs/results/<name>"] = ""
    bounds: Annotated[list[str], "labels of two experiments between which the results measure the closed gap"] = field(
        default_factory=list
    )
    remarks: Annotated[list[str], "what a reader has to know of the figures; stands below their table"] = field(
        default_factory=list
    )
    jobs: Annotated[int, "runs at once; on a shared CPU, give each fewer threads"] = 1
    dry_run: Annotated[bool, "print what would be run, and its state, without running it"] = False

    def __post_init__(self) -> None:
        rules = (
            ("name", is_file_name(self.name), "a name for a folder, without / and other than . and .."),
            ("seeds", bool(self.seeds), "one or more seeds"),
            ("jobs", 1 <= self.jobs <= 1000, "1 to 1000"),
        )
        check_fields(self, "", rules)


@dataclass(frozen=True)
class Planned:
    """One run: a label that names it within the grid, and the arguments of train.py."""

    label: str
    arguments: tuple[str, ...]


def main(argv: list[str]) -> int:
    """The exit code: 128 and the number of the signal that stopped the sweep, else 0."""
    options = parse_options(SweepOptions, argv, prog="python tools/sweep.py", description=__doc__)
    runs = check_out_folder(options.runs or f"runs/{options.name}", "runs")
    records = check_out_folder(options.records or f"docs/results/{options.name}", "records")
    planned = plan(options)
    for run in planned:  # every config is checked before the first run starts
        parse_run_options(Config, list(run.arguments), prog="train.py", description="")
    finished = [is_finished(records / f"{run.label}.json", run) for run in planned]
    for run, done in zip(planned, finished, strict=True):
        print(f"{'finished' if done else 'to run':>8}  {run.label}", flush=True)
    if all(finished):
        print(f"every run has its record in {records}; records=<another folder> runs them again")
    if options.dry_run:
        return 0
    waiting = [run for run, done in zip(planned, finished, strict=True) if not done]

    scripts = Scripts()

    def finish(run: Planned) -> bool:
        if not train_and_evaluate(run, runs / run.label, scripts):
            return False
        keep_record(runs / run.label / "record.json", records / f"{run.label}.json")
        return True

    with scripts.ended_by_signals(), ThreadPoolExecutor(options.jobs) as pool:
        succeeded = list(pool.map(finish, waiting))
    failed = [run.label for run, done in zip(waiting, succeeded, strict=True) if not done]
    if scripts.ended_by:
        name = signal.Signals(scripts.ended_by).name
        print(f"stopped by {name} with {len(failed)} of {len(waiting)} runs to do; the same command goes on")
        return 128 + scripts.ended_by
    if failed:
        raise InputError(f"{len(failed)} of {len(waiting)} runs failed: {', '.join(failed)}; their messages are above")
    return 0


def keep_record(written: Path, kept: Path) -> None:
    """Copy a record, whole or not at all: half of one would stand in the way of the grid."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(kept, "wb") as file:
        file.write(written.read_bytes())


class Scripts:
    """The scripts that run for a sweep, each in a process, and what happens to them when the sweep gets a signal.

    Attributes:
        ended_by: number of the first SIGTERM or SIGINT, after which no script is started; else 0.
    """

    def __init__(self) -> None:
        self.ended_by = 0
        self._running: set[subprocess.Popen[bytes]] = set()
        self._prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    @contextlib.contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Pass SIGTERM on to every script, and Ctrl-C as SIGTERM; training saves then. Who waits for scripts waits on."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are none of its business
            return
        previous = {number: signal.signal(number, self._end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def succeeds(self, name: str, *arguments: str) -> bool:
        """Run a command; False where it fails, or nothing is started any more."""
        if self.ended_by:
            return False
        command = [*PROGRAM, name, *arguments]
        # In a group of its own: a terminal's Ctrl-C reaches it through this process only, which passes it on once.
        with subprocess.Popen(command, process_group=0, preexec_fn=self._end_with_parent) as process:
            self._running.add(process)
            if self.ended_by:  # since the last look
                process.terminate()
            code = process.wait()
            self._running.remove(process)
        return code == 0

    def _end(self, number: int, _frame: object) -> None:
        self.ended_by = self.ended_by or number
        for process in tuple(self._running):
            process.terminate()

    def _end_with_parent(self) -> None:
        """In the new process: SIGTERM comes to it when the sweep is killed, which can pass nothing on then."""
        if self._prctl is not None:
            self._prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def plan(options: SweepOptions) -> list[Planned]:
    """Every run of the grid, in order.

    Raises:
        InputError: an experiment without a config or with an unknown key, or two runs with one label.
    """
    if not options.experiments:
        raise InputError("experiments: expected a list with at least one experiment; give a grid file")
    planned = []
    for number, experiment in enumerate(options.experiments):
        if not experiment.config:
            raise InputError(f"experiments.{number}.config: expected the path of a YAML, got nothing")
        grid = experiment.grid
        for values in itertools.product(*grid.values()):
            varied = [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
            own = [*experiment.overrides, *varied]
            label = "-".join([experiment.label or Path(experiment.config).stem, *varied]).replace("/", "_")
            for seed in options.seeds if experiment.seeds is None else experiment.seeds:
                arguments = (experiment.config, *options.overrides, *own, f"seed={seed}")
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
        content = read_record(record)
        recorded, environment = saved_config(content["config"], str(record)), content.get("environment")
    except InputError as error:
        raise InputError(f"{record}: not a record of this version ({error}); remove it to run it again") from None
    maps = environment.get("label_maps") if isinstance(environment, dict) else None
    asked = parse_run_options(Config, list(run.arguments), prog="train.py", description="")
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


def train_and_evaluate(run: Planned, folder: Path, scripts: Scripts) -> bool:
    """Train and evaluate in processes of their own; False where one fails, or training was stopped before its end."""
    config = parse_run_options(Config, list(run.arguments), prog="train.py", description="")
    trained = scripts.succeeds("train", *run.arguments, f"out={folder}", "resume=auto")
    return trained and is_trained(folder, config) and scripts.succeeds("eval", str(folder))
