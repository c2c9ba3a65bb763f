from dataclasses import dataclass, replace
from typing import Annotated

import pytest

from mlvision.config import Config, load_options, parse_options, save_options, to_plain
from mlvision.data import DATASETS
from mlvision.errors import InputError

READERS = ", ".join(DATASETS)


def parse(*argv):
    return parse_options(Config, list(argv), prog="train.py", description="Train.")


def test_yaml_then_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {name: csv, root: photos}\noptim:\n  lr: 0.5\n  lr_scales: {head: 10}\nview: {size: 64}\n")
    config = parse(str(path), "optim.lr=3e-4", "optim.lr_scales.backbone=0.1", "data.val=val")
    assert (config.name, config.data.name, config.data.root, config.data.val) == ("mine", "csv", "photos", "val")
    assert config.optim.lr == 3e-4
    assert config.optim.lr_scales == {"head": 10.0, "backbone": 0.1}
    assert config.view.size == 64
    assert parse(str(path), "data.val=val", "data.val=").data.val == ""
    assert config.optim.weight_decay == Config().optim.weight_decay
    with pytest.raises(AttributeError):  # frozen
        config.seed = 3


def test_a_saved_config_reads_back_equal(tmp_path):
    config = parse("data.name=csv", "data.root=a b", "data.splits={train: 0-4, test: 5-9}", "method.loss=asl", "seed=7")
    save_options(config, tmp_path / "config.yaml")
    assert load_options(Config, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optim.lrr=1", "optim.lrr: no such option; did you mean optim.lr? (in the command line)"),
        ("lr=1", "lr: no such option; did you mean optim.lr? (in the command line)"),
        ("optm.lr=1", "optm: no such option; did you mean optim? (in the command line)"),
        ("optim.lr=fast", "optim.lr: expected number, got 'fast' (in the command line)"),
        ("optim.epochs=1.5", "optim.epochs: expected whole number, got 1.5 (in the command line)"),
        ("seed=true", "seed: expected whole number, got True (in the command line)"),
        ("optim=3", "optim: expected a group of options such as optim.<option>, got 3 (in the command line)"),
        ("data.name=coc", f"data.name: expected one of {READERS}, got 'coc'; did you mean coco? (in the command line)"),
        ("data.separator=,", "data.separator: no such option of 'coco': it belongs to 'csv'"),
        ("data.root=${oc.env:HOME}", "data.root: a value may not hold '${'"),
        ("data.root=???", "data.root: a value may not hold '${' or be '???'"),
        ("data.name=[coco]", f"data.name: expected one of {READERS}, got '['coco']'"),
        ("optim.lr_scales.head=abc", "optim.lr_scales: expected dict of text to number, got {'head': 'abc'}"),
        ("optim.lr_scales={head: abc}", "optim.lr_scales: expected dict of text to number, got {'head': 'abc'}"),
        ("view.scale=[0.5]", "view.scale: expected tuple of number to number, got [0.5]"),
        ("view.scale=[a,b]", "view.scale: expected tuple of number to number, got ['a', 'b']"),
        ("optim.epochs=0", "optim.epochs: expected at least 1, got 0"),
        ("--seed", "'--seed': expected a .yaml file or key=value; --help lists the options"),
        ("seed", "'seed': expected a .yaml file or key=value; --help lists the options"),
    ],
)
def test_bad_options_are_named_with_the_nearest_right_one(argument, message):
    with pytest.raises(InputError) as raised:
        parse(argument)
    assert message in str(raised.value)


def test_bad_files_are_named_with_the_line(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("seed: 1\noptim: {lr: 1\n")
    with pytest.raises(InputError, match=r"broken.yaml, line \d: malformed YAML"):
        parse(str(broken))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match=r"list.yaml: expected a mapping"):
        parse(str(tmp_path / "list.yaml"))
    typed = tmp_path / "typed.yaml"
    typed.write_text("optim: {lr: abc}\n")
    with pytest.raises(InputError, match=r"optim.lr: expected number, got 'abc' \(in .*typed.yaml\)"):
        parse(str(typed))
    hidden = tmp_path / "hidden.yaml"
    hidden.write_text("data: {name: csv, ignore_columns: ['${oc.env:HOME}']}\n")
    with pytest.raises(InputError, match=r"data.ignore_columns: a value may not hold"):
        parse(str(hidden))
    with pytest.raises(InputError, match=r"brokn.yaml: no such config file; did you mean .*broken.yaml\?"):
        parse(str(tmp_path / "brokn.yaml"))


def test_help_lists_every_option_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "optim.lr (number, 0.001)" in text
    assert "peak learning rate" in text
    assert "with data.name=csv:" in text
    for group, values in to_plain(Config()).items():
        for key in values if isinstance(values, dict) else []:
            assert f"{group}.{key} (" in text


def test_other_dataclasses_are_read_alike():
    @dataclass(frozen=True)
    class Options:
        out: Annotated[str, "where"] = "x"
        width: Annotated[float | None, "how wide"] = None

    options = parse_options(Options, ["width=2"], prog="p", description="d")
    assert options == replace(Options(), width=2.0)
    with pytest.raises(InputError, match=r"width: expected number or null, got 'a'"):
        parse_options(Options, ["width=a"], prog="p", description="d")
