"""Every part of a run's tables can be chosen by its name, is saved and read again, and is described in the help."""

import re

import pytest

from mlvision.config import Config
from mlvision.data import DATASETS
from mlvision.evaluators import EVALUATORS
from mlvision.losses import LOSSES
from mlvision.methods import METHODS
from mlvision.models import HEADS
from mlvision.options import build_options, describe_options, to_plain

TABLES = {"data": DATASETS, "head": HEADS, "method": METHODS, "method.loss": LOSSES, "evaluators": EVALUATORS}
every_part = pytest.mark.parametrize(("key", "name"), [(key, name) for key in TABLES for name in TABLES[key]])


@every_part
def test_it_is_chosen_by_its_name_and_read_again(key, name):
    names = ",".join(dict.fromkeys(("multilabel", name)))  # without which no checkpoint could be chosen
    config = build_options(Config, {}, overrides=[f"{key}=[{names}]" if key == "evaluators" else f"{key}={name}"])
    chosen = config
    for part in key.split("."):
        chosen = getattr(chosen, part)
    assert (chosen[-1] if key == "evaluators" else chosen) == TABLES[key][name]()
    assert build_options(Config, to_plain(config)) == config


@every_part
def test_it_is_described(key, name):
    where = "evaluators.0" if key == "evaluators" else key
    assert re.search(rf"with {re.escape(where)}\.name={name}: \w", describe_options(Config))
