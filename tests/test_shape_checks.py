import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STATED = [path for path in sorted((ROOT / "mlvision").rglob("*.py")) if "from jaxtyping import" in path.read_text()]


@pytest.mark.parametrize("path", STATED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shapes_that_are_stated_are_checked_in_the_tests(path):
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    checked = options.partition("--jaxtyping-packages=")[2].split(",")
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert any(module == name or module.startswith(f"{name}.") for name in checked)
