"""What every step of POSTHOC keeps: its input, its state in JSON, and what it was fitted on."""

import dataclasses
import json
import math

import pytest
import torch
from factories import context

from mlvision.errors import InputError
from mlvision.options import build_options, describe_options, to_plain
from mlvision.posthoc import POSTHOC, FittedOn, PosthocConfig, fit_chain, load_chain
from mlvision.types import Predictions
from mlvision.versions import CONFIG_VERSION

every_step = pytest.mark.parametrize("config", [config() for config in POSTHOC.values()], ids=POSTHOC.keys())
ON = FittedOn("val", "made up; split val", 60, "ema", 7)


@dataclasses.dataclass(frozen=True)
class Options:
    posthoc: list[PosthocConfig] = dataclasses.field(default_factory=list)


def predictions(num_classes=4, seed=0, num_images=60):
    """Scores that know something; a tenth of the labels is unknown, and the last of several classes has no positive."""
    draw = torch.Generator().manual_seed(seed)
    targets = (torch.rand(num_images, num_classes, generator=draw) < 0.4).float()
    logits = torch.randn(num_images, num_classes, generator=draw) + 2 * targets - 2
    targets[torch.rand(targets.shape, generator=draw) < 0.1] = math.nan
    if num_classes > 1:
        targets[:, -1] = targets[:, -1].clamp(max=0)
    return Predictions(logits, targets, torch.arange(num_images), context(num_classes).space)


def equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("logits", "index")) and torch.equal(
        torch.as_tensor(a.thresholds), torch.as_tensor(b.thresholds)
    )


@every_step
@pytest.mark.parametrize("num_classes", [4, 1])
def test_a_step_that_is_read_again_does_the_same(config, num_classes):
    step = config.fit(predictions(num_classes), context(num_classes))
    state = step.state()
    again = config.load(json.loads(json.dumps(state, allow_nan=False)), context(num_classes))
    assert again.state() == state
    assert again.phrase == step.phrase
    others = predictions(num_classes, seed=1)
    assert equal(again.apply(others), step.apply(others))
    assert not equal(step.apply(others), others)


@every_step
def test_predictions_are_left_as_they_are(config):
    given = predictions()
    before = dataclasses.replace(given, logits=given.logits.clone(), targets=given.targets.clone())
    applied = config.fit(given, context(4)).apply(given)
    assert equal(given, before)
    assert torch.equal(given.targets.isnan(), before.targets.isnan())
    assert applied.targets is given.targets
    assert applied.logits.isfinite().all()


@every_step
def test_each_image_is_changed_by_itself(config):
    step, others = config.fit(predictions(), context(4)), predictions(seed=1)
    half = dataclasses.replace(others, logits=others.logits[:9], targets=others.targets[:9], index=others.index[:9])
    assert torch.equal(step.apply(half).logits, step.apply(others).logits[:9])
    none = dataclasses.replace(others, logits=others.logits[:0], targets=others.targets[:0], index=others.index[:0])
    assert step.apply(none).logits.shape == (0, 4)


@every_step
def test_unknown_labels_count_nowhere(config):
    given = predictions()
    other = given.logits.where(~given.targets.isnan(), 5.0)
    fitted = [config.fit(p, context(4)).state() for p in (given, dataclasses.replace(given, logits=other))]
    assert fitted[0] == fitted[1]


@every_step
def test_options_are_read_again_and_listed(config):
    options = build_options(Options, {}, overrides=[f"posthoc=[{config.name}]"])
    assert options.posthoc == [config]
    assert build_options(Options, to_plain(options)) == options
    assert f"with posthoc.0.name={config.name}: " in describe_options(Options)


@every_step
def test_what_no_step_can_be_fitted_on_is_refused(config):
    given = predictions()
    absent = dataclasses.replace(given, targets=given.targets.clamp(max=0))
    with pytest.raises(InputError, match=f"^posthoc.{config.name}: expected "):
        config.fit(absent, context(4))
    with pytest.raises(InputError, match="scores of class 0: 60 of 60 are NaN"):
        config.fit(dataclasses.replace(given, logits=given.logits * math.nan), context(4))


def test_a_chain_is_fitted_on_validation_images_only():
    for role in ("train", "test"):
        with pytest.raises(InputError, match=f"expected predictions of the validation images .* got those of {role}"):
            fit_chain([], predictions(), context(4), dataclasses.replace(ON, role=role))


def written(folder):
    chain = fit_chain([config() for config in POSTHOC.values()], predictions(), context(4), ON)
    chain.save(folder / "posthoc/chain.json")
    return chain, folder / "posthoc/chain.json"


def test_a_chain_is_written_and_read_again(tmp_path):
    chain, path = written(tmp_path)
    again = load_chain(path, context(4))
    assert (again.configs, again.classes, again.fitted_on) == (chain.configs, chain.classes, ON)
    assert equal(again.apply(predictions(seed=1)), chain.apply(predictions(seed=1)))
    assert again.phrase == chain.phrase
    assert again.phrase.endswith("fitted on 60 validation images")
    assert [p.name for p in path.parent.iterdir()] == ["chain.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config_version": CONFIG_VERSION + 1}, "is of a newer mlvision"),
        ({"classes": ["a", "b"]}, r"fitted for other classes \(2 classes, the model has 4\)"),
        ({"classes": None}, "fitted for other classes"),
        ({"fitted_on": {"role": "val"}}, "'fitted_on' is not as it was written; the file is damaged"),
        ({"steps": []}, "'steps' is not as it was written; the file is damaged"),
        ({"steps": [{"options": {"name": "thresholds"}}]}, "'steps' is not as it was written"),
        (
            {"steps": [{"options": {"name": "thresholdz"}, "state": {}}]},
            "steps.0.name: expected one of .* did you mean thresholds?",
        ),
        ({"steps": [{"options": {"name": "thresholds", "gamma": 1}, "state": {}}]}, "steps.0.gamma: no such option"),
        *(
            (
                {"steps": [{"options": {"name": "thresholds"}, "state": {"num_fitted": 1, "thresholds": given}}]},
                "thresholds: expected one between 0 and 1 for each of 4 classes",
            )
            for given in ([0.5] * 3, [0.5, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, math.nan], [0.5, 0.5, 0.5, "0.5"], 0.5)
        ),
    ],
)
def test_a_chain_that_is_damaged_or_of_others_is_refused(tmp_path, changes, message):
    path = written(tmp_path)[1]
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message) as raised:
        load_chain(path, context(4))
    assert str(path) in str(raised.value)


def test_half_a_file_is_refused(tmp_path):
    path = written(tmp_path)[1]
    for content in (path.read_text()[:100], "[]", ""):
        path.write_text(content)
        with pytest.raises(InputError, match="chain.json"):
            load_chain(path, context(4))
