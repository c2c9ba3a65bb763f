"""metrics.json and record.json: what eval.py measured, for the run folder and for the tables of results."""

from pathlib import Path
from typing import Any

from mlvision.errors import InputError
from mlvision.files import read_written, write_json
from mlvision.options import to_plain
from mlvision.runs.load import LoadedRun
from mlvision.versions import upgrade


def write_record(run: LoadedRun, metrics: dict[str, Any]) -> None:
    """Write record.json: the small file that stands for a finished run in docs/results/ and makes its tables."""
    environment = read_written(run.folder / "environment.json")
    record = {
        "name": run.config.name,
        "config": to_plain(run.config),
        "metrics": metrics,
        "classes": len(run.classes),
        "parameters": sum(p.numel() for p in run.method.parameters()),
        "environment": environment,
    }
    write_json(run.folder / "record.json", record)


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote, here or in an older version: its options have the names of this one.

    Raises:
        InputError: the file is missing, damaged, no record, of a newer version, or cannot be upgraded.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such record; eval.py writes it")
    record = read_written(path)
    if not isinstance(record.get("config"), dict):
        raise InputError(f"{path}: not a record of eval.py (it has no config)")
    return record | {"config": upgrade(record["config"], str(path))}


def write_metrics(run: LoadedRun, role: str, metrics: dict[str, Any]) -> None:
    """Put one split's metrics into the run's metrics.json, beside those of other splits."""
    path = run.folder / "metrics.json"
    known = read_written(path) if path.is_file() else {}
    write_json(path, known | {role: metrics})
