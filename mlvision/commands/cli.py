"""How a script is run: exit codes, one line for a mistake, logging, and the processes of torchrun."""

import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from mlvision.engine import distributed
from mlvision.errors import InputError, describe_os_error, first_line

_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch has no class of errors for it


def run_command(main: Callable[[list[str]], Any], *, several_processes: bool = False) -> NoReturn:
    """Run a script's `main(argv)`: a user's mistake becomes one line on stderr and exit code 2, never a traceback.

    An integer that `main` returns is the exit code. What the package logs (which weights were loaded, say) goes to stderr.
    Under torchrun, rank 0 prints the errors of all; another rank prints only its own. A script that
    does not share its work among them (`several_processes`) refuses them: each would do all of it and write the same files.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may hold bytes that are no text, which print refuses
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with distributed.session():
        logging.basicConfig(format="%(message)s")
        logging.getLogger("mlvision").setLevel(logging.INFO if distributed.is_main() else logging.CRITICAL)
        alone = several_processes or distributed.world_size() == 1
        raise SystemExit(_run(main if alone else _refuse_several))


def _refuse_several(_argv: list[str]) -> NoReturn:
    error = InputError(f"{Path(sys.argv[0]).name} runs in one process: expected python, not torchrun with several")
    error.on_every_rank = True
    raise error


def _run(main: Callable[[list[str]], Any]) -> int:
    try:
        result = main(sys.argv[1:])
        code = result if isinstance(result, int) else 0
    except InputError as error:
        if distributed.is_main() or not error.on_every_rank:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if not error.on_every_rank:
            raise SystemExit(2) from error  # the others may wait for this rank: torchrun ends them
        distributed.wait_for_all()  # once one process ends, torchrun ends the others: not before rank 0 has spoken
        code = 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {describe_os_error(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY in str(error)):
            raise
        print(f"error: memory ran out; smaller batches or images take less ({first_line(error)})", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        if distributed.is_main():
            print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    return code
