"""Every script with options that nobody means: one line that says what is wrong, or work as asked; no traceback, no hang, no
file left behind."""

import dataclasses
import random
import types
import typing
from pathlib import Path

import pytest
import torch
from faults import soon

from mlvision.commands import benchmark, explain, make_label_maps, predict, prepare_data, results_table, sweep
from mlvision.commands import eval as eval_script
from mlvision.commands import train as train_script
from mlvision.config import Config
from mlvision.data.check import CheckOptions
from mlvision.errors import InputError
from mlvision.explain import CONTROLS, EXPLAINERS
from mlvision.options import Selectable, parse_options

CASES = 20  # of each script
FEWER = {"compare": 6, "prototypes": 6}  # each of these takes seconds
DEVNULL = "/dev/null/x"
NUMBERS = ("0", "1", "-1", "1.5", "nan", "inf", "1e308", "1e999", "", "x", "true", "null", "[1]", "{a: 1}", "9" * 4301)
ODD = {
    str: ("", "x", "no", "..", "../up", DEVNULL, "a**b", "a\0b", "caf\udce9", "a\nb", "{x}", "[a]", "x" * 5000, "[" * 999),
    int: (*NUMBERS, "2", "99999999", "3000000000", str(2**63), str(2**64), "-99999999"),
    float: (*NUMBERS, "0.5", "1e-308", "-inf", "2"),
    bool: ("true", "false", "2", "x", "", "[true]", "{}"),
    None: ("[]", "{}", "[[]]", "[null]", "[nan]", "[-1]", "[1,2]", "[x]", "x", "", "{a: 1}", "{a: {b: 1}}", "[a", "[" * 999),
}  # fmt: skip
WORKS = ("num_workers", "workers", "prefetch")  # processes take their time to start: no case is to have any


def bare(hint):
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def options_of(cls: type, prefix: str = "", needs: tuple[str, ...] = ()):
    """(key, type, arguments without which the script has no such option) of each option."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        kind = bare(hint)
        if isinstance(kind, type) and issubclass(kind, Selectable):
            for choice, chosen in kind.choices.items():
                yield from options_of(chosen, f"{prefix}{name}.", (*needs, f"{prefix}{name}.name={choice}"))
        elif dataclasses.is_dataclass(kind):
            yield f"{prefix}{name}", None, needs
            yield from options_of(kind, f"{prefix}{name}.", needs)
        else:
            if isinstance(kind, types.UnionType):
                kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
            yield f"{prefix}{name}", kind if kind in ODD else None, needs


def odd_arguments(cls: type):
    """Every option with every value that is odd for its type."""
    for key, kind, needs in options_of(cls):
        for value in ODD[kind]:
            if key.rpartition(".")[2] in WORKS and value in ("1", "2"):
                continue
            yield [*needs, f"{key}={value}"]


OPTIONS = {
    "train": Config,
    "predict": predict.PredictOptions,
    "explain": explain.ExplainOptions,
    "compare": explain.CompareOptions,
    "prototypes": explain.PrototypeOptions,
    "make": make_label_maps.LabelMapOptions,
    "import": make_label_maps.ImportOptions,
    "report": make_label_maps.ReportOptions,
    "check": CheckOptions,
    "scenes": prepare_data.ScenesOptions,
    "sweep": sweep.SweepOptions,
    "results_table": results_table.TableOptions,
    "benchmark": benchmark.BenchmarkOptions,
}


def shorten(arguments):
    return [ascii(argument)[:120] for argument in arguments]


def refused(main, arguments) -> bool:
    """Whether a script ends in one line that names what is wrong, as `run_command` prints it."""
    with soon(shorten(arguments)):
        try:
            main(arguments)
        except (InputError, OSError, SystemExit):
            return True
        except AssertionError:
            raise
        except BaseException as error:
            raise AssertionError(f"a traceback: {shorten(arguments)}") from error
    return False


@pytest.mark.slow
@pytest.mark.parametrize("script", OPTIONS)
def test_options_are_read_or_refused(script):
    cls, noise = OPTIONS[script], random.Random(script)
    cases = list(odd_arguments(cls))
    for arguments in noise.sample(cases, min(4 * CASES, len(cases))):
        refused(lambda given: parse_options(cls, given, prog="", description=""), arguments)


def numeric_options():
    """(class, option) of every option that holds numbers, of scripts and explainers."""
    classes = {dataclass for cls in OPTIONS.values() for dataclass in nested(cls)}
    classes |= {cls for cls in (*EXPLAINERS.values(), *CONTROLS.values()) if dataclasses.is_dataclass(cls)}
    for cls in sorted(classes, key=lambda cls: cls.__name__):
        for name, hint in typing.get_type_hints(cls).items():
            if float in (hint, *typing.get_args(hint)) or int in (hint, *typing.get_args(hint)):
                yield cls, name, hint


def nested(cls: type):
    yield cls
    for hint in typing.get_type_hints(cls, include_extras=True).values():
        kind = bare(hint)
        if isinstance(kind, type) and issubclass(kind, Selectable):
            yield from (dataclass for choice in kind.choices.values() for dataclass in nested(choice))
        elif dataclasses.is_dataclass(kind):
            yield from nested(kind)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 2**63])
def test_every_number_is_finite_and_bounded(number):
    """Also of options that a program gives, not a command line."""
    for cls, name, hint in numeric_options():
        if type(number) not in (hint, *typing.get_args(hint)):
            continue
        holder = typing.get_origin(hint)
        value = {"a": number} if holder is dict else holder([number, number]) if holder in (list, tuple) else number
        with pytest.raises(InputError, match=rf"{name}.*: expected "):
            cls(**{name: value})


@pytest.fixture(scope="session")
def trained(scenes_root, tmp_path_factory):
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_script.main([*small(scenes_root), f"out={folder}"])
    return folder


def small(root: Path) -> list[str]:
    config = Path(__file__).parents[1] / "configs" / "smoke" / "scenes_test_resnet_baseline.yaml"
    return [
        *(str(config), f"data.root={root}", "device=cpu", "threads=1", "log.tensorboard=false", "optim.epochs=1"),
        *("loader.num_workers=0", "view.size=32", "checkpoint.every_steps=0"),
    ]


def one_epoch(*parts, **arguments):
    arguments["optim"] = dataclasses.replace(arguments["optim"], epochs=1)
    return fit(*parts, **arguments)


fit = train_script.fit


def whole_scripts(root: Path, run: Path, maps: Path, folder: Path):
    """main, the arguments before the odd ones, and the options of each script."""
    quick = ["device=cpu", "threads=1", "num_workers=0"]
    images = f"images={root}/images/test"
    grid = folder.parent / "grid.yaml"
    grid.write_text(f"experiments:\n- {{config: {small(root)[0]}}}\nrecords: {folder}/records\n")
    few = ["num_images=3", *quick, "measures.steps=5", "measures.sensitivity_samples=1"]
    none = ["sensitivity_images=0", "sanity_images=0"]
    data = [*small(root)[:2], *quick, f"out={folder}/maps"]
    return {
        "train": (train_script.main, [*small(root), f"out={folder}/run"], Config),
        "eval": (eval_script.main, [str(run), "device=cpu"], Config),
        "predict": (predict.main, [str(run), images, f"out={folder}/p.csv", "device=cpu", "num_workers=0"], None),
        "explain": (explain.main, [str(run), f"out={folder}/e", "labels=ground_truth", *few], None),
        "compare": (explain.main, ["compare", str(run), f"out={folder}/c", "methods=[grad_cam]", *few, *none], None),
        "prototypes": (explain.main, ["prototypes", str(run), f"out={folder}/p", "num_images=3", *quick], None),
        "make": (make_label_maps.main, [*data, f"teacher=[{run}]"], None),
        "import": (make_label_maps.main, ["import", str(folder), small(root)[0], f"data.root={root}", "axes=hw"], None),
        "report": (make_label_maps.main, ["report", str(maps), *data[:-1], "crops=1", f"out={folder}"], None),
        "check": (prepare_data.main, ["check", *small(root)[:2], f"out={folder}/check", "num_workers=0"], None),
        "scenes": (
            prepare_data.main,
            ["scenes", f"out={folder}/s", "train_images=2", "test_images=2", "image_size=32", "num_workers=0"],
            None,
        ),
        "sweep": (sweep.main, [str(grid), "dry_run=true"], None),
        "results_table": (results_table.main, [f"records={folder}", f"out={folder}/results.md"], None),
    }


@pytest.fixture(scope="session")
def maps(trained, scenes_root, tmp_path_factory):
    """Label maps of the training images."""
    folder = tmp_path_factory.mktemp("maps") / "maps"
    more = [f"teacher=[{trained}]", f"out={folder}", "num_workers=0", "device=cpu", "threads=1"]
    make_label_maps.main([*small(scenes_root)[:2], *more])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("script", [*[script for script in OPTIONS if script != "benchmark"], "eval"])
def test_scripts_do_as_asked_or_say_what_is_wrong(script, scenes_root, trained, maps, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "fit", one_epoch)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "work"
    main, before, options = whole_scripts(scenes_root, trained, maps, folder)[script]
    noise = random.Random(script)
    cases = list(odd_arguments(options or OPTIONS[script]))
    for number, case in enumerate(noise.sample(cases, min(FEWER.get(script, CASES), len(cases)))):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        arguments = [argument.replace(str(tmp_path / "work"), str(folder)) for argument in before] + case
        if refused(main, arguments):
            left = [path.relative_to(folder) for path in folder.rglob("*")]
            assert left == [], shorten(arguments)
        torch.set_num_threads(1)
        capsys.readouterr()
