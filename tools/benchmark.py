"""Measure ours against peers; --help lists the options. The code: mlvision/commands/benchmark.py."""

from mlvision.commands import run

if __name__ == "__main__":
    run("benchmark")
