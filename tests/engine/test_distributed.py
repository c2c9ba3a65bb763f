"""Two processes, as torchrun starts them: they equal one, they agree about every error, and they come back after a kill."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from engine.ranks import Case, Outcome
from engine.test_resume import assert_equal_state
from factories import write_label_maps
from torch import nn

from mlvision.commands import eval as eval_script
from mlvision.commands import train as train_script
from mlvision.config import Config
from mlvision.data.samplers import shuffled
from mlvision.engine import distributed
from mlvision.engine.checkpoint import load_checkpoint
from mlvision.engine.fit import BEST, LAST
from mlvision.engine.guard import NonFiniteError
from mlvision.options import parse_options
from mlvision.runs.splits import read_training_manifests

# Half a minute on two idle cores; two processes on busy ones wait for each other.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
RANKS = Path(__file__).with_name("ranks.py")
SMOKE = str(ROOT / "configs/smoke/scenes_test_resnet_baseline.yaml")
# Without batch statistics, and without randomness that depends on how a batch is divided.
PLAIN = """
data: {name: coco, images: images}
view: {size: 48, scale: [0.5, 1.0]}
loader: {batch_size: 16, eval_batch_size: 4, num_workers: 0}
model: {name: test_vit}
optim: {name: sgd, lr: 0.05, epochs: 1}
ema: {decay: 0.99}
log: {every_steps: 2}
"""


def torchrun(script, *arguments, launcher=()):
    """The running command; two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *launcher]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_cases(cases: list[Case], folder: Path, launcher=()) -> list[list[Outcome]]:
    """Of each case, what each rank made of it."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    process = torchrun(RANKS, folder / "cases.json", folder, launcher=launcher)
    try:
        output = process.communicate(timeout=800)
    finally:
        process.kill()
    assert process.returncode == 0, output
    of_ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return [[Outcome(**outcome) for outcome in outcomes] for outcomes in zip(*of_ranks, strict=True)]


# Damaged data: each is what a function of the data's folder leaves.


def edit(root, split, change):
    path = root / f"annotations/instances_{split}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def malformed(root):
    os.truncate(root / "annotations/instances_train.json", 500)


def unknown_category(root):
    edit(root, "train", lambda document: document["annotations"][3].update(category_id=999))


def empty_split(root):
    edit(root, "train", lambda document: document.update(images=[], annotations=[]))


def shared_image(root):
    edit(root, "test", lambda document: document["images"][0].update(file_name="train/000000.jpg"))


def other_classes(root):
    for split in ("train", "test"):
        edit(root, split, lambda document: document["categories"][2].update(name="zebra"))


def torn_image(root):
    """One that rank 1 alone meets, in the third step of the first epoch."""
    config = parse_options(Config, [SMOKE, f"data.root={root}"], prog="", description="")
    train, _, _ = read_training_manifests(config)
    size = config.loader.batch_size
    record = train.records[shuffled(train, config.seed)(0)[2 * size + size // 2 + 1]]
    os.truncate(record.path, 400)
    return Path(record.path).name


def another_label(root):
    edit(
        root, "train", lambda document: document["annotations"][0].update(category_id=document["categories"][-1]["id"])
    )


def fewer_images(root):
    gone = json.loads((root / "annotations/instances_train.json").read_text())["images"][-1]["id"]

    def drop(document):
        document["images"].pop()
        document["annotations"] = [each for each in document["annotations"] if each["image_id"] != gone]

    edit(root, "train", drop)


QUICK = ["optim.epochs=2", "loader.num_workers=0", "loader.eval_batch_size=4"]
BAD_DATA = {
    "malformed": (malformed, "instances_train.json"),
    "unknown_category": (unknown_category, "999"),
    "empty_split": (empty_split, "instances_train.json"),
    "shared_image": (shared_image, "train/000000.jpg"),
    "no_annotations": (lambda root: (root / "annotations/instances_test.json").unlink(), "instances_test.json"),
    "no_image": (lambda root: (root / "images/train/000003.jpg").unlink(), "000003.jpg"),
    "no_root": (shutil.rmtree, "no_root"),
}
BAD_OPTIONS = {
    "optim.lrr=1": "optim.lrr: no such option",
    "optim.epochs=many": "optim.epochs: expected whole number",
    "loader.batch_size=1000": "loader.batch_size: expected at most",
    "loader.batch_size=15": "loader.batch_size: 15 images cannot be divided over 2 ranks",
    "device=cuda": "device: 'cuda' was asked for, but torch sees no GPU",
    "ddp.sync_bn=true": "ddp.sync_bn: torch computes batch statistics over several processes on GPUs only",
    "checkpoint.select=map": "checkpoint.select: no metric 'map'",
}
# What rank 1 alone reads, or is told.
UNLIKE = {
    "another_label": (another_label, "records of split train"),
    "fewer_images": (fewer_images, "records of split train"),
    "other_classes": (other_classes, "classes: "),
    "optim.lr=0.5": (None, "optim.lr: 0.001 on rank 0, but 0.5 on rank 1; expected the same command for every process"),
}
BAD_RUNS = {
    "truncated": (lambda run: os.truncate(run / LAST, 5000), "last.pt: the file is damaged, or was cut short"),
    "foreign": (
        lambda run: torch.save({"weights": torch.ones(2)}, run / LAST),
        "last.pt: expected 'mlvision checkpoint",
    ),
    "cut_log": (lambda run: os.truncate(run / "metrics.csv", 100), "metrics.csv: 100 bytes, but the checkpoint"),
}


@pytest.fixture(scope="module")
def together(scenes_root, tmp_path_factory):
    """Everything that one launch of two processes can show: (outcomes by name, folder of runs, argument makers)."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "plain.yaml").write_text(PLAIN)
    common = [f"data.root={scenes_root}", "device=cpu", "threads=1", "log.tensorboard=false"]
    smoke, plain = [SMOKE, *common, *QUICK], [f"{folder}/plain.yaml", *common]
    write_label_maps(plain, folder / "maps")

    alone = {
        "vit": [*plain, "optim.epochs=2", "optim.clip_norm=1"],
        "convnext": [*plain, "model.name=test_convnext", "head.name=csra"],
        "relabel": [*plain, "method.name=relabel", f"label_maps={folder}/maps"],
    }
    for name, arguments in alone.items():
        train_script.main([*arguments, f"out={folder}/{name}_alone"])
    shutil.copytree(folder / "vit_alone", folder / "vit_judged")
    eval_script.main([f"{folder}/vit_alone"])

    cases = {name: Case("train", [*arguments, f"out={folder}/{name}"]) for name, arguments in alone.items()}
    cases["eval"] = Case("eval", [f"{folder}/vit_judged"])
    # Dropout, batch statistics, averaged weights, half-full windows of the log.
    cases["undisturbed"] = Case("train", [*smoke, f"out={folder}/undisturbed"])
    cases["stopped"] = Case("train", [*smoke, f"out={folder}/stopped"], "TERM", 1, 7)
    cases["resumed"] = Case("train", [*smoke, f"out={folder}/stopped", "resume=auto"])
    watched = ["optim.epochs=1", "log.cam_images=2", "log.tensorboard=true"]
    cases["watched"] = Case("train", [*smoke, *watched, f"out={folder}/watched"])
    cases["nan"] = Case("train", [*smoke, f"out={folder}/nan"], "nan", 1, 8)
    cases["predict"] = Case(f"{ROOT}/tools/predict.py", ["runs/none", f"out={folder}/refused/predictions.csv"])
    for option in BAD_OPTIONS:
        cases[option] = Case("train", [*smoke, option, f"out={folder}/refused/option"])
    for name, (damage, _) in BAD_DATA.items():
        shutil.copytree(scenes_root, folder / name)
        damage(folder / name)
        cases[name] = Case("train", [*plain, f"data.root={folder / name}", f"out={folder}/refused/{name}"])
    for name, (damage, _) in UNLIKE.items():
        if damage:
            shutil.copytree(scenes_root, folder / name)
            damage(folder / name)
        only = [f"data.root={folder / name}" if damage else name]
        cases[name] = Case("train", [*smoke, f"out={folder}/refused/{name}"], rank=1, only=only)
    shutil.copytree(scenes_root, folder / "torn")
    torn_image(folder / "torn")
    torn = [*smoke, f"data.root={folder}/torn", "loader.num_workers=1"]
    cases["torn"] = Case("train", [*torn, f"out={folder}/torn_run"])
    cases["skip"] = Case("train", [*torn, "data.on_bad_image=skip", "optim.epochs=1", f"out={folder}/skip_run"])
    shutil.copytree(scenes_root, folder / "zebra")
    other_classes(folder / "zebra")
    cases["eval_zebra"] = Case("eval", [f"{folder}/vit_judged", f"data.root={folder}/zebra"])
    for name, (damage, _) in BAD_RUNS.items():
        shutil.copytree(folder / "vit_alone", folder / name)
        damage(folder / name)
        cases[name] = Case("train", [*alone["vit"], f"out={folder / name}", "resume=auto"])
    outcomes = run_cases(list(cases.values()), folder / "launch")
    return dict(zip(cases, outcomes, strict=True)), folder


def metric_rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["step"], row["name"], float(row["value"])) for row in csv.DictReader(file)]


# Two processes equal one


@pytest.mark.parametrize("name", ["vit", "convnext", "relabel"])
def test_two_processes_train_the_weights_of_one(together, name):
    """convnext: a csra head leaves a norm of timm's head without gradient."""
    outcomes, folder = together
    assert [outcome.code for outcome in outcomes[name]] == [0, 0]
    one, two = (load_checkpoint(folder / run / LAST) for run in (f"{name}_alone", name))
    assert two["step"] == one["step"] == (10 if name == "vit" else 5)
    assert one["method"].keys() == two["method"].keys()
    for weights in ("method", "ema"):
        for key, tensor in one[weights].items():
            torch.testing.assert_close(two[weights][key], tensor, rtol=0, atol=1e-5, msg=f"{weights} {key}")
    logged = [metric_rows(folder / run) for run in (f"{name}_alone", name)]
    for (step, what, value), found in zip(*logged, strict=True):
        assert found[:2] == (step, what)
        if what.startswith("train/"):
            assert found[2] == pytest.approx(value, rel=1e-5)


def test_each_rank_trains_on_its_half_of_every_batch(together):
    outcomes, _ = together
    (first, second) = (outcome.trained for outcome in outcomes["vit"])
    assert len(first) == len(second) == 10 * 8
    for start in (0, 5 * 8):  # of an epoch
        assert len({*first[start : start + 40], *second[start : start + 40]}) == 80


def test_two_processes_measure_what_one_measures(together):
    """11 images of validation, 32 of test, in batches of 4: the ranks' shares differ."""
    outcomes, folder = together
    assert [outcome.code for outcome in outcomes["eval"]] == [0, 0]
    one, two = (json.loads((folder / run / "metrics.json").read_text())["test"] for run in ("vit_alone", "vit_judged"))
    assert two.pop("checkpoint") != one.pop("checkpoint")
    assert one == two
    tables = [(folder / run / "per_class_test.csv").read_bytes() for run in ("vit_alone", "vit_judged")]
    assert tables[0] == tables[1]


def test_validation_is_of_the_weights_and_statistics_that_are_saved(together):
    """Batch statistics are rank 0's: also for the images that rank 1 validates."""
    _, folder = together
    shutil.copytree(folder / "undisturbed", folder / "undisturbed_judged")
    found = eval_script.main([f"{folder}/undisturbed_judged/{LAST}", "split=val"])
    logged = {name: value for step, name, value in metric_rows(folder / "undisturbed") if step == "10"}
    for weights in ("raw", "ema"):
        assert found[weights]["mAP"] == logged[f"val/{weights}/mAP"]


# Randomness, signals, resuming


def test_one_rank_that_is_told_to_stop_stops_all_and_a_resumed_run_equals_an_undisturbed_one(together):
    outcomes, folder = together
    assert [outcome.code for outcome in outcomes["stopped"]] == [0, 0]
    assert "stopped by SIGTERM at step 7; saved" in outcomes["stopped"][0].stdout
    assert [len(outcome.trained) for outcome in outcomes["stopped"]] == [7 * 8, 7 * 8]
    assert [len(outcome.trained) for outcome in outcomes["resumed"]] == [3 * 8, 3 * 8]
    assert (folder / "stopped/metrics.csv").read_bytes() == (folder / "undisturbed/metrics.csv").read_bytes()
    for name in (LAST, BEST):
        assert_equal_state(load_checkpoint(folder / "stopped" / name), load_checkpoint(folder / "undisturbed" / name))


def test_ranks_draw_their_own_random_numbers(together):
    _, folder = together
    saved = load_checkpoint(folder / "undisturbed" / LAST)
    (other,) = saved["other_ranks"]
    assert not torch.equal(saved["rng"]["torch"], other["rng"]["torch"])


def test_a_killed_rank_restarts_the_job_which_ends_as_if_nothing_had_been(together, scenes_root, tmp_path):
    _, folder = together
    smoke = [SMOKE, "device=cpu", "threads=1", "log.tensorboard=false", f"data.root={scenes_root}", *QUICK]
    case = Case("train", [*smoke, f"out={tmp_path}/run", "resume=auto"], "KILL", 1, 8)
    ((first, second),) = run_cases([case], tmp_path / "launch", ["--max-restarts=1"])
    assert (first.code, second.code) == (0, 0)
    assert len(first.trained) == len(second.trained) == 4 * 8  # from step 6 on: for saving step 8 one rank was missing
    assert "resuming" in first.stdout
    assert (tmp_path / "run/metrics.csv").read_bytes() == (folder / "undisturbed/metrics.csv").read_bytes()
    for name in (LAST, BEST):
        assert_equal_state(load_checkpoint(tmp_path / "run" / name), load_checkpoint(folder / "undisturbed" / name))


def test_sigterm_to_torchrun_saves(scenes_root, tmp_path):
    smoke = [SMOKE, "device=cpu", "threads=1", "log.tensorboard=false", f"data.root={scenes_root}", *QUICK]
    process = torchrun("train.py", *smoke, "optim.epochs=10000", f"out={tmp_path}/run")
    try:
        deadline = time.monotonic() + 400
        while not (tmp_path / "run" / LAST).is_file():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=400)
    finally:
        process.kill()
    (line,) = [line for line in stdout.splitlines() if "stopped by SIGTERM" in line]
    assert line.startswith(f"stopped by SIGTERM at step {load_checkpoint(tmp_path / 'run' / LAST)['step']}; saved")
    assert "Traceback" not in stderr.split("torch/distributed")[0]


# Bad input


def one_message(outcomes, message):
    """Exit code 2 on every rank; one line, of rank 0."""
    assert [outcome.code for outcome in outcomes] == [2, 2]
    first, second = (outcome.stderr for outcome in outcomes)
    assert second == ""
    assert first.startswith("error: ")
    assert first.count("\n") == 1
    assert message in first


@pytest.mark.parametrize(
    ("name", "message"),
    [*BAD_OPTIONS.items(), *((name, message) for name, (_, message) in [*BAD_DATA.items(), *UNLIKE.items()])],
)
def test_bad_input_is_said_once_and_leaves_nothing(together, name, message):
    outcomes, folder = together
    if name == "device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    one_message(outcomes[name], message)
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(("name", "message"), [(name, message) for name, (_, message) in BAD_RUNS.items()])
def test_a_damaged_run_is_said_once(together, name, message):
    outcomes, _ = together
    one_message(outcomes[name], message)


def test_an_image_that_one_rank_cannot_read_stops_all(together, tmp_path):
    outcomes, folder = together
    one_message(outcomes["torn"], "images/train/")
    assert [len(outcome.trained) for outcome in outcomes["torn"]] == [2 * 8, 2 * 8]
    assert load_checkpoint(folder / "torn_run" / LAST)["step"] == 2


def test_bad_images_can_be_skipped(together):
    outcomes, folder = together
    assert [outcome.code for outcome in outcomes["skip"]] == [0, 0]
    assert outcomes["skip"][0].stdout.count("left out of") == 1
    (row,) = csv.DictReader(open(folder / "skip_run/bad_images.csv", newline=""))
    assert row["key"] in outcomes["torn"][0].stderr


def test_evaluation_on_other_classes_is_said_once(together):
    outcomes, _ = together
    one_message(outcomes["eval_zebra"], "'zebra' in the data")


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_names_its_images(together, scenes_root):
    outcomes, folder = together
    one_message(outcomes["nan"], "step 8: the loss or its gradient is not finite")
    keys = [
        row["key"] for row in csv.DictReader(open(folder / "nan/images.csv", newline="")) if row["split"] == "train"
    ]
    first, second = ([keys[row] for row in outcome.trained[7 * 8 : 8 * 8]] for outcome in outcomes["nan"])
    message = outcomes["nan"][0].stderr
    assert all(key in message for key in second)
    assert not any(key in message for key in first)
    assert load_checkpoint(folder / "nan" / LAST)["step"] == 6


def test_through_torchrun_a_torn_image_is_one_line(scenes_root, tmp_path):
    shutil.copytree(scenes_root, tmp_path / "set")
    name = torn_image(tmp_path / "set")
    process = torchrun("train.py", SMOKE, f"data.root={tmp_path}/set", "device=cpu", "threads=1", f"out={tmp_path}/run")
    try:
        stdout, stderr = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode != 0
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert name in line
    assert "exitcode  : 2" in stderr  # torchrun's own account of the failure
    assert stdout.count("training ") == 1


def test_what_does_not_share_its_work_refuses_several_processes_once(together):
    outcomes, folder = together
    one_message(outcomes["predict"], "predict.py runs in one process: expected python, not torchrun with several")
    assert not (folder / "refused").exists()


# Batch statistics of all ranks


def test_sync_bn_changes_layers_and_keeps_parameters_and_names(monkeypatch):
    from mlvision.models import build_backbone

    backbone = build_backbone("test_efficientnet")
    names, parameters = list(backbone.state_dict()), list(backbone.parameters())
    distributed.sync_batch_norm(backbone, torch.device("cuda"))
    assert list(backbone.state_dict()) == names
    assert all(a is b for a, b in zip(backbone.parameters(), parameters, strict=True))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules())


def test_sync_bn_in_one_process_on_a_cpu_changes_nothing():
    layer = nn.Sequential(nn.BatchNorm2d(3))
    distributed.sync_batch_norm(layer, torch.device("cpu"))
    assert type(layer[0]) is nn.BatchNorm2d


# In a single process


def test_in_one_process_errors_stay_what_they_are():
    def fails():
        raise NonFiniteError("x")

    for call in (distributed.gather, distributed.on_every_rank, distributed.on_main):
        with pytest.raises(NonFiniteError):
            call(fails)
    assert distributed.gather(lambda: 3) == [3]
    with pytest.raises(NonFiniteError):
        list(distributed.InStep((fails() for _ in range(2)), lambda: False))
    steps = distributed.InStep(range(5), iter([False, False, True]).__next__)
    assert list(steps) == [0, 1]
    assert steps.stopped
