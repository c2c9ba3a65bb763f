"""Run train.py in a child process, end it with a signal after a delay; the tests of resuming start this file.

python interrupt.py KILL|TERM MOMENTS SEED train-arguments...

A child is interrupted up to MOMENTS times at random moments, each time started again with resume=auto, then left alone until
it is done. Prints the number of interruptions that hit a living child and the exit codes.

Children are forked after the slow imports, so that most of a short delay is training. This process runs no tensor
operation: OpenMP would not survive the fork.
"""

import os
import random
import signal
import sys
import time
import traceback

import mlvision.runs  # noqa: F401  imported here once, for all children
from mlvision.commands.train import main


def run_child(arguments: list[str], end: signal.Signals | None, delay: float) -> tuple[bool, int, float]:
    """(whether the signal hit a living child, exit code or minus the signal, seconds)."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            main(arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    hit = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return hit, os.waitstatus_to_exitcode(status), time.monotonic() - started
        if end is not None and not hit and time.monotonic() - started > delay:
            os.kill(child, end)
            hit = True
        time.sleep(0.002)


def interrupt(end: signal.Signals, moments: int, seed: int, arguments: list[str]) -> None:
    chance = random.Random(seed)
    undisturbed = [*arguments, f"out={value(arguments, 'out')}-undisturbed", "resume=auto"]
    _, code, whole = run_child(undisturbed, None, 0)
    _, _, startup = run_child(undisturbed, None, 0)  # nothing left to train
    hits, codes = 0, [code]
    for _ in range(moments):
        # Around the start-up, plus up to a sixth of the training: the run outlives all its interruptions.
        delay = startup * chance.uniform(0.7, 1.1) + chance.uniform(0, (whole - startup) / 6)
        hit, code, _ = run_child([*arguments, "resume=auto"], end, delay)
        hits += hit
        codes.append(code)
    codes.append(run_child([*arguments, "resume=auto"], None, 0)[1])
    print("hits", hits, "codes", *codes)


def value(arguments: list[str], key: str) -> str:
    return next(a.partition("=")[2] for a in arguments if a.startswith(f"{key}="))


if __name__ == "__main__":
    interrupt(signal.Signals[f"SIG{sys.argv[1]}"], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
