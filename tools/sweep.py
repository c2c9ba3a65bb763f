"""Run a grid of experiments; --help lists the options. The code: mlvision/commands/sweep.py."""

from mlvision.commands import run

if __name__ == "__main__":
    run("sweep")
