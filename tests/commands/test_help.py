"""`--help` of every command, and what it may not wait for."""

import subprocess
import sys

import pytest

from mlvision.commands import COMMANDS, _choose

ALL = """
import contextlib, importlib, io, sys
from mlvision.commands import COMMANDS, _choose
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


def test_what_is_no_command_of_the_package_is_refused_with_those_that_are():
    done = subprocess.run([sys.executable, "-m", "mlvision", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: expected a command ({', '.join(COMMANDS)}), got 'trian'\n"


def test_the_help_of_the_package_lists_its_commands(capsys):
    with pytest.raises(SystemExit):
        _choose(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: mlvision COMMAND")
    assert [line.split()[0] for line in lines[2 : 2 + len(COMMANDS)]] == list(COMMANDS)
