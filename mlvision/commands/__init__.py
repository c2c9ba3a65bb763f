"""What the scripts do: `python train.py ...`, `python tools/<command>.py ...`, and `mlvision <command> ...` for all."""

import importlib
import sys
from typing import NoReturn

from mlvision.commands.cli import run_command
from mlvision.errors import InputError, shown
from mlvision.options import print_help

COMMANDS = {
    "train": "train a classifier",
    "eval": "evaluate a trained run on one split",
    "predict": "label images",
    "explain": "explain decisions, compare explainers, find prototypes",
    "make_label_maps": "make label maps with a teacher, import published ones, judge them",
    "prepare_data": "check a data set; draw the scenes of the demo",
    "sweep": "run a grid of experiments",
    "results_table": "tables of the records of finished runs",
    "benchmark": "times of ours against those of peers",
}
_OF_SEVERAL_PROCESSES = ("train", "eval", "make_label_maps")


def run(name: str) -> NoReturn:
    """Run a command with the arguments of this process, and exit with its code."""
    # By name, so that none waits for the imports of the others.
    command = importlib.import_module(f"mlvision.commands.{name}")
    run_command(command.main, several_processes=name in _OF_SEVERAL_PROCESSES)


def main() -> NoReturn:
    """`mlvision COMMAND [arguments]`."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        name = sys.argv.pop(1)
        sys.argv[0] = f"mlvision {name}"
        run(name)
    run_command(_choose)


def _choose(argv: list[str]) -> None:
    print_help(argv, _usage, needed=True)
    raise InputError(f"expected a command ({', '.join(COMMANDS)}), got {shown(argv[0])}")


def _usage() -> str:
    commands = "\n".join(f"  {name:16}{what}" for name, what in COMMANDS.items())
    return f"usage: mlvision COMMAND ...\n\n{commands}\n\n`mlvision COMMAND --help` lists the options of a command."
