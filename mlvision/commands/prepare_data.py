"""Prepare and look at data sets.

python tools/prepare_data.py check data.name=coco data.root=coco data.train=train2017 data.test=val2017
python tools/prepare_data.py scenes out=datasets/scenes
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated

from mlvision.config import parse_run_options
from mlvision.data.check import CheckOptions, check_data, format_check, write_check
from mlvision.data.scenes.generator import ScenesConfig, write_scenes
from mlvision.errors import InputError
from mlvision.files import check_out_folder
from mlvision.options import parse_options, print_help


@dataclass(frozen=True)
class ScenesOptions(ScenesConfig):
    """The generator's options and where to write."""

    out: Annotated[str, "folder to write"] = ""


def check(argv: list[str]) -> int:
    """Counts a data set and looks for bad files, duplicates and overlap; 1 where there are such problems."""
    options = parse_run_options(
        CheckOptions, argv, prog="python tools/prepare_data.py check", description=str(check.__doc__)
    )
    folder = check_out_folder(options.out or f"runs/check-{options.data.name}")
    result = check_data(options.data, options.num_workers, options.labels_only)
    write_check(result, folder, options.samples, options.seed)
    print(format_check(result))
    print(f"written: {folder}/check.json, check.csv" + ("" if options.labels_only else ", contact_sheet.png"))
    return 1 if result.problems() else 0


def scenes(argv: list[str]) -> int:
    """Writes the generated data set in COCO's format."""
    options = parse_options(
        ScenesOptions, argv, prog="python tools/prepare_data.py scenes", description=str(scenes.__doc__)
    )
    if not options.out:
        raise InputError("out is not set: give the folder to write, such as out=datasets/scenes")
    generator = ScenesConfig(**{option.name: getattr(options, option.name) for option in fields(ScenesConfig)})
    write_scenes(generator, check_out_folder(options.out))
    print(f"written: {options.out}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {"check": check, "scenes": scenes}


def main(argv: list[str]) -> int:
    """Runs the command that the first argument names."""
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    listed = "\n".join(f"  {name:8}{command.__doc__}" for name, command in COMMANDS.items())
    print_help(
        argv,
        lambda: (
            f"usage: python tools/prepare_data.py COMMAND [config.yaml ...] [key=value ...]\n\n{__doc__}\n{listed}\n\n"
            "`prepare_data.py COMMAND --help` lists the options of a command."
        ),
    )
    raise InputError(f"expected a command ({', '.join(COMMANDS)}), got {argv[0] if argv else 'none'}")
