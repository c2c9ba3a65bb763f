"""What a run writes while it trains: metrics.csv, TensorBoard events, and one console line an epoch.

metrics.csv is long-format (step, epoch, name, value) and holds nothing that depends on the clock, so two runs of the same
config are equal byte for byte; times go to TensorBoard and the console.
"""

import csv
import io
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mlvision.errors import InputError, check_fields

_HEADER = "step,epoch,name,value\n"
# Facts of a validation that are the same each time: no curves.
_CONSTANT = {"threshold", "num_images", "num_classes", "num_skipped_classes", "num_unknown"}


@dataclass(frozen=True)
class LogConfig:
    every_steps: Annotated[
        int, "steps from one line of training loss and rates in metrics.csv to the next; fewer in short runs"
    ] = 50
    tensorboard: Annotated[bool, "write TensorBoard events"] = True
    cam_images: Annotated[int, "validation images whose CAM grids go to TensorBoard after each epoch; 0: none"] = 0

    def __post_init__(self) -> None:
        rules = (
            ("every_steps", self.every_steps >= 1, "at least 1"),
            ("cam_images", 0 <= self.cam_images <= 1000, "0 to 1000"),
        )
        check_fields(self, "log.", rules)

    def steps_between(self, total_steps: int) -> int:
        """Steps from one log step to the next in a run of so many: a curve has 20 points, or one of each step."""
        return min(self.every_steps, max(1, total_steps // 20))


class RunLog:
    """The writers of one run folder; `position` and `cut` let a resumed run go on as if never interrupted.

    A run that is not resumed starts with empty files, whatever one that never reached its first checkpoint left there.

    Raises:
        InputError: a run to resume has lost its metrics.csv.
    """

    def __init__(self, folder: Path, tensorboard: bool, resume: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._use_tensorboard = tensorboard
        self._writer = None
        self._purge_step: int | None = None
        path = folder / "metrics.csv"
        if resume and not path.is_file():
            raise InputError(f"{path}: not there, but the checkpoint to go on from was saved with it")
        self._csv = open(path, "ab" if resume else "wb")
        if not resume:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            self._csv.write(_HEADER.encode())

    def position(self) -> int:
        """Bytes of metrics.csv that are safely on disk: what a checkpoint remembers; TensorBoard's events go there too."""
        self._csv.flush()
        os.fsync(self._csv.fileno())
        if self._writer is not None:
            self._writer.flush()
        return self._csv.tell()

    def cut(self, position: int, step: int) -> None:
        """Drop what an interrupted run wrote after its checkpoint at `step`.

        Raises:
            InputError: metrics.csv is shorter than the checkpoint remembers.
        """
        path = self.folder / "metrics.csv"
        if self._csv.tell() < position:
            raise InputError(
                f"{path}: {self._csv.tell()} bytes, but the checkpoint was saved at {position}; it was cut"
            )
        self._csv.truncate(position)
        self._csv.seek(position)
        self._purge_step = step + 1

    @property
    def tensorboard(self):
        """The SummaryWriter, or None where switched off; callbacks may write to it."""
        if self._use_tensorboard and self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._purge_step)
        return self._writer

    def metrics(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Write values that are a function of the config alone."""
        rows = io.StringIO()
        csv.writer(rows, lineterminator="\n").writerows([step, epoch, name, repr(v)] for name, v in values.items())
        self._csv.write(rows.getvalue().encode())
        self._csv.flush()
        self.timings(step, values)

    def timings(self, step: int, values: dict[str, float]) -> None:
        """Write values that depend on the machine: to TensorBoard only."""
        if self.tensorboard is not None:
            for name, value in values.items():
                if name.rpartition("/")[2] not in _CONSTANT:
                    self.tensorboard.add_scalar(name, value, step)

    def line(self, text: str) -> None:
        """Print one line for people, at once."""
        print(text, file=sys.stdout, flush=True)

    def close(self) -> None:
        self._csv.close()
        if self._writer is not None:
            self._writer.close()


class SilentLog(RunLog):
    """What ranks above 0 write to: nothing."""

    tensorboard = None  # pyright: ignore[reportAssignmentType]

    def __init__(self):
        pass

    def position(self) -> int:
        return 0

    def cut(self, position: int, step: int) -> None:
        pass

    def metrics(self, step: int, epoch: int, values: dict[str, float]) -> None:
        pass

    def timings(self, step: int, values: dict[str, float]) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
