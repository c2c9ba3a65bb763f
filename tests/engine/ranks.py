"""Run commands one after another in the same processes, as torchrun starts this file; the tests of several processes do so.

ranks.py CASES RESULTS    CASES: a JSON list of Case's fields; RESULTS: a folder for <rank>.json, what each command gave

A launch costs seconds, most of it imports: so one launch runs many commands.
"""

import contextlib
import io
import json
import math
import os
import runpy
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

from toys import TOYS

from mlvision.commands import eval as eval_script
from mlvision.commands import train as train_script
from mlvision.commands.cli import run_command
from mlvision.engine import distributed
from mlvision.engine.callbacks import ProgressBar
from mlvision.methods import METHODS, Baseline
from mlvision.types import StepOutput

MAINS = {"train": train_script.main, "eval": eval_script.main}


@dataclass(frozen=True)
class Case:
    """One command, and what befalls one rank in it.

    Attributes:
        script: a key of MAINS, or the path of a script that is run as it is.
        fault: KILL or TERM: this signal; nan: its loss is not finite.
        rank: that it befalls.
        step: at whose end (KILL, TERM), or in which (nan).
        only: arguments that this rank has besides.
    """

    script: str
    arguments: list[str]
    fault: str = ""
    rank: int = 0
    step: int = 0
    only: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """What one rank made of a command."""

    code: int
    stdout: str
    stderr: str
    trained: list[int] = field(default_factory=list)


def run(case: Case) -> Outcome:
    forward, calls = Baseline.forward, []
    mine = distributed.rank() == case.rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def watched(self: Baseline, batch):
        output = forward(self, batch)
        calls.append(batch.index.tolist())
        spoilt = mine and case.fault == "nan" and len(calls) == case.step
        return StepOutput(output.loss * (math.nan if spoilt else 1.0), output.logs)

    class Fault(ProgressBar):
        def on_step_end(self, trainer):
            super().on_step_end(trainer)
            if mine and case.fault in ("KILL", "TERM") and trainer.steps_done == case.step:
                os.kill(os.getpid(), signal.Signals[f"SIG{case.fault}"])

    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(train_script, "ProgressBar", Fault))
        stack.enter_context(mock.patch.object(Baseline, "forward", watched))
        only = case.only if distributed.rank() == case.rank else []
        stack.enter_context(mock.patch.object(sys, "argv", [case.script, *case.arguments, *only]))
        if distributed.is_main():  # elsewhere the session drops it, as it should
            stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        try:
            if case.script in MAINS:
                run_command(MAINS[case.script], several_processes=True)
            runpy.run_path(case.script, run_name="__main__")
        except SystemExit as end:
            code = end.code
    return Outcome(code, stdout.getvalue(), stderr.getvalue(), [row for rows in calls for row in rows])


def main(cases: Path, results: Path) -> None:
    METHODS.update(TOYS)
    with distributed.session():
        outcomes = [asdict(run(Case(**case))) for case in json.loads(cases.read_text())]
        (results / f"{distributed.rank()}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
