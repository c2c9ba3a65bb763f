"""How a process that torchrun started ends: with the code that its work deserves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What an interpreter does at its own end stands for gloo's threads, which abort it there on busy cores: it aborts always.
ENDS = """
import ctypes, os, sys
from mlvision.engine import distributed

libc = ctypes.CDLL(None)
ctypes.pythonapi.Py_AtExit(libc.abort)
for name, end in {"returns": "", "exits": "raise SystemExit(2)", "fails": "1 / 0"}.items():
    child = os.fork()
    if child == 0:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        with distributed.session():
            distributed.gather(lambda: 1)
            print(name, flush=True)
            exec(end)
        sys.exit(99)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def ends():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, env=environment, check=False)


def test_the_end_of_the_interpreter_does_not_change_an_exit_code(ends):
    codes = dict(line.split() for line in ends.stdout.splitlines() if " " in line)
    assert codes == {"returns": "0", "exits": "2", "fails": "1"}, ends.stderr


def test_what_was_printed_is_out_and_an_error_has_its_traceback(ends):
    assert [line for line in ends.stdout.splitlines() if " " not in line] == ["returns", "exits", "fails"]
    assert ends.stderr.count("Traceback") == 1
    assert ends.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
