"""Evaluate a trained run; --help lists the options. The code: mlvision/commands/eval.py."""

from mlvision.commands import run

if __name__ == "__main__":
    run("eval")
