"""`--help` of every command, and what it may not wait for."""

import subprocess
import sys

import pytest

from mlvision.commands import COMMANDS

ALL = """
import contextlib, importlib, io, sys
from mlvision.commands import COMMANDS
pages = []
for name in COMMANDS:
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        importlib.import_module(f"mlvision.commands.{name}").main(["--help"])
    assert page.getvalue().startswith("usage: "), name
    assert f"{name}.py" in page.getvalue().splitlines()[0], name
heavy = {"captum", "skimage", "matplotlib", "tensorboard", "albumentations", "transformers", "sklearn"}
print(sorted(heavy & sys.modules.keys()))
"""


def test_no_page_of_help_waits_for_a_library_that_only_some_runs_use():
    done = subprocess.run([sys.executable, "-c", ALL], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("trian", 2)])
def test_the_command_of_the_package_names_its_commands(argument, code):
    command = [sys.executable, "-m", "mlvision", argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    shown = done.stderr if code else done.stdout
    assert all(name in shown for name in COMMANDS)
    assert shown.startswith("error: expected a command (" if code else "usage: mlvision COMMAND")
