"""Explanations, comparisons of explainers, prototypes; --help lists the options. The code: mlvision/commands/explain.py."""

from mlvision.commands import run

if __name__ == "__main__":
    run("explain")
