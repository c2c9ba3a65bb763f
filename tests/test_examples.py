"""The examples in the docstrings, run as they stand."""

import doctest
import importlib
from pathlib import Path

import pytest

import mlvision

ROOT = Path(mlvision.__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "mlvision").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_show(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted
    assert not results.failed
