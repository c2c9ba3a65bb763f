"""The options of a run: which change results, which evaluation heeds, and what older versions saved."""

import json
from pathlib import Path

import pytest
import yaml

from mlvision.config import Config, config_difference, load_config, parse_run_options, saved_config
from mlvision.errors import InputError
from mlvision.options import EVALUATION, INERT, flatten, marked, parse_options, save_options, to_plain
from mlvision.runs.records import read_record
from mlvision.versions import CONFIG_VERSION, STEPS, upgrade

ROOT = Path(__file__).parents[1]
RECORDS = sorted(path for path in (ROOT / "docs/results").glob("*/*.json") if path.parent.name != "explainers")


def parse(*argv):
    return parse_run_options(Config, list(argv), prog="", description="")


def test_every_mark_of_a_whole_group_holds_for_its_options():
    inert = flatten(Config()).keys() - flatten(Config(), without=INERT).keys()
    assert inert == {
        *(
            "name",
            "out",
            "resume",
            "label_maps",
            "data.root",
            "data.check_files",
            "loader.num_workers",
            "loader.prefetch",
        ),
        *("checkpoint.every_steps", "log.every_steps", "log.tensorboard", "log.cam_images"),
    }
    assert set(marked(Config, EVALUATION)) == {
        *("device", "precision", "threads", "data", "model", "head", "method", "view.size", "view.eval_size"),
        *("view.eval_resize", "view.crop_pct", "view.interpolation"),
        *("loader.eval_batch_size", "loader.num_workers", "loader.prefetch"),
    }


@pytest.mark.parametrize(
    "argument",
    [
        *("out=x", "name=x", "resume=auto", "data.root=x", "data.check_files=false", "loader.num_workers=0"),
        *("loader.prefetch=5", "log.every_steps=3", "log.tensorboard=false", "log.cam_images=4", "label_maps=x"),
        *("checkpoint.every_steps=7", "device=auto"),
    ],
)
def test_what_changes_no_result_is_no_difference(argument):
    assert config_difference(Config(), parse(argument)) == ""


@pytest.mark.parametrize(
    ("argument", "difference"),
    [
        ("seed=1", "seed is 0 there, 1 was asked for"),
        ("data.train=x", "data.train is 'train' there, 'x' was asked for"),
        ("loader.eval_batch_size=7", "loader.eval_batch_size is 128 there, 7 was asked for"),
        ("head=csra", "head.name is 'linear' there, 'csra' was asked for"),
        ("optim.lr_scales.head=3", "optim.lr_scales is {} there, {'head': 3.0} was asked for"),
        ("threads=1", "threads is 0 there, 1 was asked for"),
        ("device=cuda:0", "device is 'auto' there, 'cuda' was asked for"),
    ],
)
def test_what_changes_results_is_a_difference(argument, difference):
    assert config_difference(Config(), parse(argument)) == difference


def test_a_saved_config_says_its_version(tmp_path):
    save_options(Config(), tmp_path / "config.yaml")
    assert f"config_version: {CONFIG_VERSION}\n" in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml") == Config()
    assert parse(str(tmp_path / "config.yaml")) == Config(name="")


def test_a_config_that_was_saved_before_there_were_evaluators(tmp_path):
    values = to_plain(Config())
    del values["evaluators"]
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    assert load_config(tmp_path / "config.yaml") == Config()


def as_version_1(config):
    """What the first version would have saved."""
    old = to_plain(config) | {"bootstrap": 100}
    del old["config_version"], old["data"]["val_labels"]
    edits = old["data"].pop("edits")
    old["data"] |= {"known_labels": edits[0]["share"], "known_seed": edits[0]["seed"]} if edits else {"known_labels": 1}
    old["data"]["split"] = "val"
    loss = old["method"].pop("loss", None)
    if loss:
        options = {"gamma_neg": 4.0, "gamma_pos": 0.0, "clip": 0.05}
        if config.method.name == "baseline":
            options |= {"gamma": 2.0, "k": 0, "alpha": 2.0}
        old["method"] |= {**options, **loss, "loss": loss["name"], "name": config.method.name}
    return old


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["data.edits=[{name: known_labels, share: 0.3, seed: 5}]", "data.val_labels=full"],
        ["method.loss=asl", "method.loss.gamma_neg=3", "method.loss.clip=0"],
        ["method.loss=soft_top_k", "method.loss.k=2", "method.loss.alpha=0.5"],
        ["method.loss=focal", "method.loss.gamma=1", "method.smoothing=0.1"],
        ["method=patchct", "method.loss.gamma_neg=3", "method.alpha=0.3"],
        ["method=patchct", "method.loss=bce", "method.alpha=0.3"],
        ["method=relabel", "method.loss=asl", "method.loss.gamma_pos=1"],
        ["method=token_labeling", "method.mix=0.5"],
    ],
    ids=" ".join,
)
def test_a_config_of_the_first_version_is_upgraded(options, tmp_path):
    config = parse("seed=3", "head=csra", "data=csv", *options)
    old = as_version_1(config)
    before = json.dumps(old)
    assert saved_config(old, "old.yaml") == config
    assert json.dumps(old) == before
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))  # whose values are what they are written as
    assert load_config(tmp_path / "config.yaml") == config
    assert saved_config({}, "old.yaml") == Config()
    assert upgrade(to_plain(config), "new.yaml") == to_plain(config)
    assert len(STEPS) == CONFIG_VERSION - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"config_version: {CONFIG_VERSION + 1}", f"its config_version {CONFIG_VERSION + 1} is of a newer mlvision"),
        ("config_version: 0", "config_version: expected a number from 1 to"),
        ("config_version: x", "config_version: expected a number from 1 to"),
        (f"config_version: {'9' * 5000}", "config_version: expected a number from 1 to"),
        ("config_version: [1]", "config_version: expected a number from 1 to"),
        ("data: x", "cannot be upgraded from config_version 1"),
        ("config_version: 3\ndata: {known_labels: some}", "cannot be upgraded from config_version 3"),
    ],
)
def test_what_cannot_be_upgraded_is_one_line(content, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content + "\n")
    with pytest.raises(InputError, match=f"config.yaml: .*{message}") as raised:
        load_config(path)
    assert len(str(raised.value)) < 400
    if content != "data: x":  # as options of a new run, that is the name of a reader
        with pytest.raises(InputError, match=f"config.yaml: .*{message}"):
            parse(str(path))


def test_options_of_another_version_are_refused_elsewhere():
    with pytest.raises(InputError, match=f"config_version: expected {CONFIG_VERSION}, whose names"):
        parse_options(Config, ["config_version=1"], prog="", description="")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_committed_record_has_todays_options(path):
    content = json.loads(path.read_text())
    assert read_record(path) == content
    saved_config(content["config"], str(path))


@pytest.mark.parametrize(
    "config", [None, "x", {"config_version": CONFIG_VERSION + 1}, {"config_version": 1, "data": 3}]
)
def test_a_record_that_cannot_be_upgraded_is_named(config, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"config": config}))
    with pytest.raises(InputError, match=r"^\S*record.json: "):
        read_record(path)
