"""Runs: built from options, kept in a folder, loaded again. What scripts, tools and notebooks stand on."""

from mlvision.runs.build import Run, build_run
from mlvision.runs.load import LoadedRun, add_classes, load_run, read_for

__all__ = ["LoadedRun", "Run", "add_classes", "build_run", "load_run", "read_for"]
