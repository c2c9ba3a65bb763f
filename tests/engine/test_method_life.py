"""Every method of METHODS, and a toy for each thing that can change while a method trains, besides weights: equal in one
process and in two, bit for bit after a resume."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from engine import ranks
from engine.ranks import Case
from engine.test_distributed import PLAIN, metric_rows, run_cases
from engine.test_resume import assert_equal_state
from engine.toys import TOYS
from factories import build_method, head_of, small_classifier, write_label_maps
from torch.nn.parallel import DistributedDataParallel

from mlvision import load_run
from mlvision.commands import eval as eval_script
from mlvision.commands import train as train_script
from mlvision.config import Config
from mlvision.engine import distributed
from mlvision.engine.checkpoint import load_checkpoint
from mlvision.engine.fit import BEST, LAST, begin_epoch
from mlvision.engine.trainer import Trainer
from mlvision.errors import InputError
from mlvision.methods import METHODS
from mlvision.options import parse_options
from mlvision.runs.build import build_run
from mlvision.types import EpochPlan

ALL = [*METHODS, *TOYS]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module", autouse=True)
def toys():
    """The toy methods, for the tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in TOYS.items():
            patch.setitem(METHODS, name, config)
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        yield


@pytest.fixture(scope="module")
def arguments(scenes_root, tmp_path_factory):
    """Of a run of each method, without its folder, by name."""
    folder = tmp_path_factory.mktemp("arguments")
    (folder / "plain.yaml").write_text(PLAIN)
    common = [f"{folder}/plain.yaml", f"data.root={scenes_root}", "device=cpu", "threads=1", "log.tensorboard=false"]
    run = build_run(parse_options(Config, common, prog="", description=""))
    torch.save(run.method.classifier.state_dict(), folder / "teacher.pt")
    write_label_maps(common, folder / "maps")
    own = {"toy_teacher": [f"method.teacher={folder}/teacher.pt"], "toy_counter": ["optim.accumulate=2"]}
    of_runs = {}
    for name in ALL:
        head = "linear" if name in TOYS else head_of(name)
        of_runs[name] = [*common, "optim.epochs=2", f"method.name={name}", f"head.name={head}", *own.get(name, [])]
        if name not in TOYS and build_method(METHODS[name](), small_classifier(head, 2)).needs_label_map:
            of_runs[name].append(f"label_maps={folder}/maps")
        if head == "text":
            of_runs[name].append("head.text.encoder=learned")
    return of_runs


@pytest.fixture(scope="module")
def folder(arguments, tmp_path_factory):
    """Runs of each method: NAME_alone in one process, NAME in two; NAME_stopped of toys in two and resumed."""
    folder = tmp_path_factory.mktemp("toys")
    for name, of_run in arguments.items():
        train_script.main([*of_run, f"out={folder}/{name}_alone"])
    cases = [Case("train", [*of_run, f"out={folder}/{name}"]) for name, of_run in arguments.items()]
    for name in TOYS:
        cases += [
            Case("train", [*arguments[name], f"out={folder}/{name}_stopped"], "TERM", 1, 7),
            Case("train", [*arguments[name], f"out={folder}/{name}_stopped", "resume=auto"]),
        ]
    for case, outcomes in zip(cases, run_cases(cases, folder / "launch"), strict=True):
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
        assert ("stopped by SIGTERM at step 7" in outcomes[0].stdout) == bool(case.fault)
    return folder


@pytest.mark.parametrize("name", ALL)
def test_two_processes_equal_one(folder, name):
    one, two = (load_checkpoint(folder / run / LAST) for run in (f"{name}_alone", name))
    assert one["method"].keys() == two["method"].keys()
    for weights in ("method", "ema"):
        for key, tensor in one[weights].items():
            torch.testing.assert_close(two[weights][key], tensor, rtol=0, atol=1e-5, msg=f"{weights} {key}")
    for key, tensor in one["helpers"].get("teacher", {}).items():
        torch.testing.assert_close(two["helpers"]["teacher"][key], tensor, rtol=0, atol=1e-5, msg=key)
    logged = [metric_rows(folder / run) for run in (f"{name}_alone", name)]
    for (step, what, value), other in zip(*logged, strict=True):
        assert other[:2] == (step, what)
        if what.startswith("train/"):
            assert other[2] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", TOYS)
def test_two_processes_resume_bit_for_bit(folder, name):
    whole, stopped = folder / name, folder / f"{name}_stopped"
    assert (stopped / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    for file in (LAST, BEST):
        assert_equal_state(load_checkpoint(stopped / file), load_checkpoint(whole / file))


@pytest.mark.parametrize(("name", "step"), [*((name, 8) for name in ALL), ("toy_planner", 5)])
def test_one_process_resumes_bit_for_bit(folder, arguments, name, step, tmp_path):
    """At the last step of an epoch, and within one."""
    of_run = [*arguments[name], f"out={tmp_path}/run"]
    stopped = ranks.run(Case("train", of_run, "TERM", 0, step))
    assert f"stopped by SIGTERM at step {step}" in stopped.stdout
    assert ranks.run(Case("train", [*of_run, "resume=auto"])).code == 0
    alone = folder / f"{name}_alone"
    assert (tmp_path / "run/metrics.csv").read_bytes() == (alone / "metrics.csv").read_bytes()
    for file in (LAST, BEST):
        resumed, undisturbed = load_checkpoint(tmp_path / "run" / file), load_checkpoint(alone / file)
        for saved in (resumed, undisturbed):  # the type checks of these tests draw from it
            saved.get("rng", {}).pop("python", None)
        assert_equal_state(resumed, undisturbed)


def test_the_teacher_is_in_the_last_checkpoint_only_and_not_needed_afterwards(folder, arguments):
    alone = folder / "toy_teacher_alone"
    last, best = load_checkpoint(alone / LAST), load_checkpoint(alone / BEST)
    assert set(last["helpers"]) == {"teacher"}
    assert "helpers" not in best
    plain = load_checkpoint(folder / "toy_planner_alone" / BEST)
    assert best["method"].keys() == plain["method"].keys() == best["ema"].keys()
    assert (alone / BEST).stat().st_size < 1.05 * (folder / "toy_planner_alone" / BEST).stat().st_size
    (given,) = (argument for argument in arguments["toy_teacher"] if argument.startswith("method.teacher="))
    begun = torch.load(given.partition("=")[2], weights_only=True)
    student = {name.removeprefix("classifier."): value for name, value in last["method"].items()}
    moved = [name for name in begun if not torch.equal(begun[name], last["helpers"]["teacher"][name])]
    assert moved
    for name in moved:  # between where it began and the student, who is ahead
        assert not torch.equal(last["helpers"]["teacher"][name], student[name])
    run = load_run(alone, overrides=["method.teacher=gone.pt"])
    assert run.method.helpers == {}
    assert eval_script.main([str(alone)])["ema"]["mAP"] > 0


def test_the_bank_holds_each_image_that_was_visited(folder):
    """86 training images in 5 batches of 16: an epoch leaves out six, two epochs hardly any."""
    bank = load_checkpoint(folder / "toy_bank" / LAST)["method"]["bank"]
    assert len(bank) == 86
    assert 80 <= int(bank.any(1).sum()) <= 86


def test_the_counter_counts_the_labels_of_all_processes(folder, scenes_root):
    saved = load_checkpoint(folder / "toy_counter" / LAST)
    seen = saved["method"]["seen"]
    assert torch.equal(seen, load_checkpoint(folder / "toy_counter_alone" / LAST)["method"]["seen"])
    assert torch.equal(seen, saved["ema"]["seen"])
    assert seen.sum() > 2 * 80  # more than one label per image


def test_local_state_that_differs_between_processes_is_an_error(arguments, tmp_path):
    case = Case("train", [*arguments["toy_counter"], "method.broken=true", f"out={tmp_path}/run"])
    ((first, second),) = run_cases([case], tmp_path / "launch")
    assert (first.code, second.code) == (2, 2)
    assert "Counter: its local state 'seen' differs between processes; only after_step" in first.stderr
    assert not (tmp_path / "run" / LAST).exists()


def test_a_plan_is_a_part_of_the_checkpoint(folder, arguments, tmp_path):
    of_run = [*arguments["toy_planner"], f"out={tmp_path}/run"]
    ranks.run(Case("train", of_run, "TERM", 0, 8))
    plan = load_checkpoint(tmp_path / "run" / LAST)["plan"]
    assert sorted(plan["order"].tolist()) == list(range(86))
    assert plan["targets"].shape == (86, 20)
    assert plan["extra"]["weight"][[0, -1]].tolist() == [0.5, 1.5]
    assert load_checkpoint(folder / "toy_planner_alone" / LAST)["plan"] is None  # between two epochs


def test_an_order_of_its_own_excludes_loader_sampling(arguments, tmp_path):
    of_run = [*arguments["toy_planner"], "loader.sampling=class_balanced"]
    with pytest.raises(
        InputError, match="loader.sampling: method toy_planner has an order of its own, expected shuffled"
    ):
        build_run(parse_options(Config, of_run, prog="", description=""))


def changed(name, value, order=None):
    """A plan with one field that its annotations, which the tests check, would refuse."""
    plan = EpochPlan(order)
    setattr(plan, name, value)
    return plan


BAD_PLANS = {
    "a row too few": (
        lambda n: EpochPlan(torch.arange(n - 1)),
        r"expected an order of 86 rows, got torch.int64 \[85\]",
    ),
    "no whole numbers": (
        lambda n: changed("order", torch.arange(n).float()),
        "expected an order of 86 rows, got torch.float32",
    ),
    "beyond the images": (lambda n: EpochPlan(torch.arange(n) + 1), "its order has rows beyond the 86 training images"),
    "targets of others": (
        lambda n: EpochPlan(targets=torch.zeros(n, 3)),
        r"expected targets \[86, 20\], got \[86, 3\]",
    ),
    "extra without order": (
        lambda n: EpochPlan(extra={"a": torch.zeros(n)}),
        "expected extra 'a' for each of the 86 rows",
    ),
    "extra of others": (
        lambda n: changed("extra", {"a": torch.zeros(n + 1)}, torch.arange(n)),
        "expected extra 'a' for each of the 86 rows",
    ),
}


@pytest.mark.parametrize(("plan", "message"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_a_plan_that_does_not_fit_is_refused(arguments, plan, message):
    run = build_run(parse_options(Config, arguments["toy_planner"], prog="", description=""))
    with pytest.raises(InputError, match=message):
        run.train_loader.set_position(0, 0, plan(len(run.train)))


def test_an_order_that_was_not_announced_is_refused(arguments, monkeypatch):
    run = build_run(parse_options(Config, arguments["toy_planner"], prog="", description=""))
    monkeypatch.setattr(type(run.method), "has_order", False)
    trainer = Trainer(run.method, run.config.optim, run.precision, steps_per_epoch=5, images_per_step=16, keys=[])
    with pytest.raises(InputError, match="Planner: begin_epoch plans an order, which takes has_order = True"):
        begin_epoch(trainer, run.train_loader, run.eval_loaders, 0)


def test_a_copy_of_a_method_has_no_helpers(arguments):
    method = build_run(parse_options(Config, arguments["toy_teacher"], prog="", description="")).method
    assert set(method.helpers) == {"teacher"}
    assert copy.deepcopy(method).helpers == {}
    assert not any(name.startswith("helpers") for name in method.state_dict())
    method.double().train()
    teacher = method.helpers["teacher"]
    assert next(teacher.parameters()).dtype == torch.float64
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_gradients_are_exchanged_once_per_step(arguments):
    """In the parts of a step but the last, DistributedDataParallel is told to exchange nothing."""
    entered = []
    wrapped = SimpleNamespace(no_sync=lambda: entered.append("no_sync") or nullcontext())
    forward = distributed.Parallel(
        build_run(parse_options(Config, arguments["toy_bank"], prog="", description="")).method
    )
    assert isinstance(forward.backward_of_part(is_last=False), nullcontext)
    forward.wrapped = wrapped
    for number in (1, 2, 3):
        with forward.backward_of_part(is_last=number == 3):
            pass
    assert entered == ["no_sync", "no_sync"]
    assert DistributedDataParallel.no_sync
