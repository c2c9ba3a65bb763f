import errno
import json
import os
import random
import shutil
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest

from mlvision.commands import eval as eval_script
from mlvision.commands import results_table, sweep
from mlvision.commands import train as train_script
from mlvision.errors import InputError

ROOT = Path(__file__).parents[2]
SMOKE = "configs/smoke/scenes_test_resnet_baseline.yaml"


def write_grid(folder: Path, root: Path) -> Path:
    """The file of a grid of two rates and two seeds, which writes below its own folder."""
    path = folder / "mini.yaml"
    path.write_text(
        f"experiments:\n- {{config: {SMOKE}, label: rates, grid: {{optim.lr: [0.001, 0.01]}}}}\n"
        f"overrides: [data.root={root}, device=cpu, threads=1, optim.epochs=1, log.tensorboard=false]\n"
        f"seeds: [0, 1]\nruns: {folder}/runs\nrecords: {folder}/records/mini\n"
    )
    return path


@pytest.fixture
def grid(scenes_root, tmp_path):
    return write_grid(tmp_path, scenes_root)


@pytest.fixture(scope="module")
def records_of_seed_0(scenes_root, tmp_path_factory):
    """What a sweep over the grid leaves in its folder of records: the first of its runs in processes of their own."""
    folder = tmp_path_factory.mktemp("swept")
    in_processes, mains = sweep.Scripts.succeeds, {"train": train_script.main, "eval": eval_script.main}
    started = []

    def succeeds(scripts, name, *arguments):
        started.append(name)
        if len(started) <= 2:
            return in_processes(scripts, name, *arguments)
        mains[name](list(arguments))
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.Scripts, "succeeds", succeeds)
        sweep.main([str(write_grid(folder, scenes_root)), "seeds=[0]"])
    assert started == ["train", "eval"] * 2
    return folder / "records"


@pytest.fixture
def records(records_of_seed_0, tmp_path):
    """A copy of them, where the test's own grid looks for its records."""
    shutil.copytree(records_of_seed_0, tmp_path / "records")
    return sorted((tmp_path / "records/mini").iterdir())


def test_a_grid_is_run_once_and_becomes_a_table(grid, records, tmp_path, monkeypatch, capsys):
    assert [r.name for r in records] == ["rates-optim.lr=0.001-seed0.json", "rates-optim.lr=0.01-seed0.json"]
    assert [json.loads(r.read_text())["config"]["optim"]["lr"] for r in records] == [0.001, 0.01]

    calls = []
    monkeypatch.setattr(sweep, "train_and_evaluate", lambda run, *_: calls.append(run.label) or False)
    with pytest.raises(InputError, match="2 of 2 runs failed"):
        sweep.main([str(grid)])
    assert calls == ["rates-optim.lr=0.001-seed1", "rates-optim.lr=0.01-seed1"]  # the finished ones are skipped

    for record in records:  # a second seed, made up, to see the spread
        other = json.loads(record.read_text())
        other["config"]["seed"] = 1
        other["metrics"]["ema"]["mAP"] += 0.1
        record.with_name(record.name.replace("seed0", "seed1")).write_text(json.dumps(other))
    out = tmp_path / "results.md"
    results_table.main([f"records={tmp_path}/records", f"out={out}", "readme="])
    first = json.loads(records[0].read_text())["metrics"]["ema"]["mAP"]
    values = [first, first + 0.1]
    row = next(line for line in out.read_text().splitlines() if line.startswith("| rates-optim.lr=0.001 |"))
    assert f"| {statistics.mean(values):.4f} +- {statistics.stdev(values):.4f} |" in row
    assert "| 2 |" in row


def test_a_changed_grid_is_noticed(grid, tmp_path):
    folder = tmp_path / "records/mini"
    folder.mkdir(parents=True)
    (run, *_) = sweep.plan(sweep.parse_options(sweep.SweepOptions, [str(grid)], prog="", description=""))
    from mlvision.config import Config
    from mlvision.options import parse_options, to_plain

    config = to_plain(parse_options(Config, [*run.arguments, "optim.epochs=7"], prog="", description=""))
    (folder / f"{run.label}.json").write_text(json.dumps({"config": config}))
    with pytest.raises(InputError, match=r"the grid has changed under it: optim.epochs is 7 there, 1 was asked for"):
        sweep.main([str(grid), "dry_run=true"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0]", "experiments: expected a list with at least one experiment"),
        (
            f"experiments: [{{config: {SMOKE}, grd: {{}}}}]",
            r"experiments.0.grd: no such option; did you mean experiments.0.grid\?",
        ),
        ("experiments: [{label: x}]", r"experiments.0.config: expected the path of a YAML, got nothing"),
        (
            f"experiments: [{{config: {SMOKE}, grid: {{optim.lr: {{a: 1}}}}}}]",
            r"experiments.0.grid.optim.lr: expected list of text, got {'a': 1} \(in .*bad.yaml\)",
        ),
        (
            f"experiments: [{{config: {SMOKE}, seeds: x}}]",
            r"experiments.0.seeds\[0\]: expected whole number, got 'x'",
        ),
        (
            f"experiments: [{{config: {SMOKE}, overrides: {{a: b}}}}]",
            r"experiments.0.overrides: expected list of text, got {'a': 'b'}",
        ),
        (f"experiments: [{{config: {SMOKE}}}, {{config: {SMOKE}}}]", "two runs are called"),
        (f"experiments: [{{config: {SMOKE}, overrides: [optim.lrr=1]}}]", "optim.lrr: no such option"),
        (f"experiments: [{{config: {SMOKE}, label: a}}]\nbounds: [a, b]", "bounds: expected the labels of two"),
    ],
)
def test_bad_grids(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        sweep.main([str(path), "dry_run=true"])


def test_every_grid_of_the_repository_is_sound():
    for path in sorted((ROOT / "configs/grids").glob("*.yaml")):
        sweep.main([str(path), "dry_run=true"])


def test_the_committed_pages_are_those_of_the_records():
    text = results_table.render(ROOT / "docs/results", ROOT / "configs/grids")
    assert (ROOT / "docs/results.md").read_text() == text
    readme = (ROOT / "README.md").read_text()
    assert results_table.fill_readme(readme, ROOT / "docs/results", ROOT / "configs/grids") == readme


def test_a_grids_remarks_stand_below_its_table(tmp_path):
    record = ROOT / "docs/results/heads_scenes/csra-seed0.json"
    for grid in ("odd", "plain"):
        (tmp_path / "records" / grid).mkdir(parents=True)
        shutil.copy(record, tmp_path / "records" / grid)
    (tmp_path / "odd.yaml").write_text("remarks: ['Read *twice*.', Short.]\n")
    odd, plain = results_table.render(tmp_path / "records", tmp_path).split("\n## ")[1:]
    last_row = odd.index("| csra |")
    assert last_row < odd.index("- **Remark**: Read *twice*.\n- **Remark**: Short.\n") < odd.index("- Protocol")
    assert "Remark" not in plain
    page = results_table.fill_readme(
        f"{results_table.README_START}\n{results_table.README_END}", tmp_path / "records", tmp_path
    )
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert [row.split()[1] for row in rows] == ["odd\\*", "plain"]
    assert "\n\\* Read with the remarks" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bounds: single_labels\n", "bounds: expected a list, got 'single_labels'"),
        ("remarks: {a: b}\n", "remarks: expected a list, got"),
        ("bounds: [a\n", "malformed YAML"),
    ],
)
def test_a_grids_file_that_holds_something_else_is_named(tmp_path, content, message):
    (tmp_path / "mini.yaml").write_text(content)
    with pytest.raises(InputError, match=f"mini.yaml.*{message}"):
        results_table.options_of(tmp_path, "mini")


def test_unlike_runs_are_not_averaged(records, tmp_path):
    other = json.loads(records[0].read_text())
    other["config"]["seed"] = 1
    other["config"]["optim"]["weight_decay"] = 0.7
    records[0].with_name(records[0].name.replace("seed0", "seed1")).write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"optim.weight_decay.*0.7"):
        results_table.render(tmp_path / "records", tmp_path)


def test_a_foreign_file_among_the_records_is_named(tmp_path):
    (tmp_path / "g").mkdir()
    (tmp_path / "g/x.json").write_text("{}")
    with pytest.raises(InputError, match=r"x.json: not a record of eval.py"):
        results_table.render(tmp_path, tmp_path)


def record(seed, value):
    """What the table uses of a record."""
    measured = {"mAP": value, "CF1": 0.0, "OF1": 0.0}
    config = {"seed": seed, "precision": "fp32", "model": {"name": "net"}, "view": {"size": 8}, "optim": {"epochs": 1}}
    environment = {"commit": "c", "machine": "m"}
    metrics = {"weights": "raw", "raw": measured, "protocol": "p"}
    return {"config": config, "parameters": 1, "metrics": metrics, "environment": environment}


def test_the_closed_gap_is_measured_seed_by_seed(tmp_path, capsys):
    values = {"low": (0.5, 0.6), "student": (0.7, 0.65), "high": (0.9, 0.8)}  # half and a quarter of the gap
    experiments = {name: [record(seed, v) for seed, v in enumerate(pair)] for name, pair in values.items()}
    experiments["student"].append(record(2, 0.1))  # a seed that the bounds lack
    rows = results_table.table(experiments, ["low", "high"]).splitlines()
    assert rows[0].endswith("| gap closed |")
    assert rows[3].endswith(f"| {statistics.mean([0.5, 0.25]):.4f} +- {statistics.stdev([0.5, 0.25]):.4f} |")
    assert rows[2].endswith("|  |")
    for name, runs in experiments.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(runs[0]))
    folders = ",".join(str(tmp_path / name) for name in values)
    results_table.main([f"runs=[{folders}]", "bounds=[low,high]"])
    assert "| 0.5000 |" in capsys.readouterr().out
    with pytest.raises(InputError, match="expected two of low, student, high, got low, top"):
        results_table.main([f"runs=[{folders}]", "bounds=[low,top]"])
    with pytest.raises(InputError, match="no such record"):
        results_table.main([f"runs=[{tmp_path}/nowhere]"])


def test_a_run_that_was_stopped_is_not_evaluated(grid, tmp_path, monkeypatch):
    """SIGTERM saves and exits with 0: the sweep counts it as not finished, and the test split is not read."""
    (run, *_) = sweep.plan(sweep.parse_options(sweep.SweepOptions, [str(grid)], prog="", description=""))
    scripts, started = sweep.Scripts(), []
    monkeypatch.setattr(scripts, "succeeds", lambda name, *_: started.append(name) or True)
    monkeypatch.setattr(sweep, "is_trained", lambda folder, config: False)
    assert not sweep.train_and_evaluate(run, tmp_path / "run", scripts)
    assert started == ["train"]


# Stands for mlvision: says that it runs, and when it is told to end; lasts for minutes otherwise.
SLOW = """
import signal, sys, time
from pathlib import Path
here = Path(__file__).parent
def end(*_):
    with open(here / "ended", "a") as file:
        file.write("x")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
(here / "started").touch()
time.sleep(200)
"""


@pytest.fixture
def slow_training(tmp_path, monkeypatch):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "slow.py").write_text(SLOW)
    monkeypatch.setattr(sweep, "PROGRAM", (sys.executable, str(folder / "slow.py")))
    return folder


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_with_the_sweep(grid, slow_training, capsys, number):
    def send():
        wait_for(slow_training / "started")
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    assert sweep.main([str(grid)]) == 128 + number
    assert (slow_training / "ended").read_text() == "x"  # once, and no other run was started
    said = capsys.readouterr().out
    assert f"stopped by {number.name} with 4 of 4 runs to do; the same command goes on" in said


def test_training_ends_with_a_sweep_that_is_killed(grid, slow_training):
    child = os.fork()
    if child == 0:
        try:
            sweep.main([str(grid)])
        finally:
            os._exit(1)
    wait_for(slow_training / "started")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_for(slow_training / "ended")


def test_a_record_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text("{}")
    kept = tmp_path / "records/grid/run.json"

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlvision.files.os.fsync", full)
        with pytest.raises(InputError, match="run.json: could not be written .No space left on device.; nothing was"):
            sweep.keep_record(tmp_path / "record.json", kept)
    assert not list(kept.parent.iterdir())
    sweep.keep_record(tmp_path / "record.json", kept)
    assert [path.name for path in kept.parent.iterdir()] == ["run.json"]
    assert kept.read_text() == "{}"


def test_a_record_of_other_label_maps_is_noticed(tmp_path, monkeypatch):
    from mlvision.config import Config
    from mlvision.options import parse_options, to_plain

    run = sweep.Planned("x-seed0", (SMOKE, "method.name=relabel", f"label_maps={tmp_path}"))
    config = to_plain(parse_options(Config, list(run.arguments), prog="", description=""))
    path = tmp_path / "x-seed0.json"
    path.write_text(json.dumps({"config": config, "environment": {"label_maps": {"teacher": "a"}}}))

    class Store:
        def __init__(self, teacher):
            self.meta = self
            self.teacher = teacher

        def to_json(self):
            return {"teacher": self.teacher}

    monkeypatch.setattr(sweep.LabelMapStore, "open", lambda path: Store("a"))
    assert sweep.is_finished(path, run)
    monkeypatch.setattr(sweep.LabelMapStore, "open", lambda path: Store("b"))
    with pytest.raises(InputError, match="made with other label maps than"):
        sweep.is_finished(path, run)


def test_seeds_of_different_label_maps_are_not_averaged(records, tmp_path):
    first = records[0]
    other = json.loads(first.read_text())
    other["config"]["seed"], other["environment"]["label_maps"] = 1, {"teacher": "b"}
    first.with_name(first.name.replace("seed0", "seed1")).write_text(json.dumps(other))
    with pytest.raises(InputError, match="were trained on different label maps"):
        results_table.render(tmp_path / "records", tmp_path)


RECORD = ROOT / "docs/results/first_path/ucmerced_efficientnet_lite0_baseline-seed0.json"


def changed(path: Path, keys: str, value) -> Path:
    """A committed JSON file with one entry of another value."""
    content = json.loads(RECORD.read_text())
    *way, last = keys.split(".")
    inner = content
    for key in way:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("metrics", []), ("metrics", None), ("metrics.ema", 0.5), ("metrics.ema.mAP", "0.9"), ("metrics.ema.CF1", None),
        ("metrics.weights", "other"), ("metrics.weights", []), ("metrics.protocol", 3), ("parameters", "many"),
        ("parameters", True), ("config", "x"), ("config.seed", [0]), ("config.optim", 3), ("config.optim.epochs", "12"),
        ("config.view", []), ("config.model.name", None), ("environment", "x"), ("environment.commit", 5),
        ("environment.machine", None),
    ],
)  # fmt: skip
def test_records_with_values_of_another_kind_are_one_line(tmp_path, keys, value):
    path = changed(tmp_path / "record.json", keys, value)
    with pytest.raises(InputError, match="record.json: not a record of eval.py"):
        results_table.checked_record(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_files_that_are_no_records_are_one_line(tmp_path, grid, content):
    record = tmp_path / "records/mini/rates-optim.lr=0.001-seed0.json"
    record.parent.mkdir(parents=True)
    record.write_bytes(content)
    for read in (
        lambda: results_table.checked_record(record),
        lambda: results_table.read_comparison(record),
        lambda: sweep.main([str(grid), "dry_run=true"]),
    ):
        with pytest.raises(InputError) as caught:
            read()
        assert str(record) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["record", "comparison"])
def test_damaged_records_are_one_line_or_a_table(tmp_path, kind):
    source = RECORD if kind == "record" else min((ROOT / "docs/results/explainers").glob("*.json"))
    whole, draw, refused = source.read_bytes(), random.Random(0), []
    path = tmp_path / "damaged.json"
    for _ in range(300):
        content, place = bytearray(whole), draw.randrange(len(whole))
        if draw.random() < 0.1:
            del content[place:]
        else:
            content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            if kind == "record":
                results_table.table({"x": [results_table.checked_record(path)]}, [])
            else:
                results_table.alike(results_table.read_comparison(path))
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert all(message.startswith(str(path)) and "\n" not in message for message in refused)


@pytest.mark.parametrize("option", ["runs", "records"])
def test_a_file_in_the_place_of_a_folder_is_noticed_before_training(grid, tmp_path, option):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{option}: {tmp_path / 'file'} is a file; expected a folder"):
        sweep.main([str(grid), f"{option}={tmp_path / 'file'}"])


def test_the_page_does_not_replace_a_link(tmp_path):
    (tmp_path / "page.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(InputError, match=r"out: .*page.md is a link, which would be replaced"):
        results_table.main([f"records={ROOT / 'docs/results'}", f"out={tmp_path / 'page.md'}", "readme="])
