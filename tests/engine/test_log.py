import os
import signal
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlvision.engine.log import LogConfig, RunLog
from mlvision.errors import InputError


def test_a_resumed_log_equals_an_undisturbed_one(tmp_path):
    whole = RunLog(tmp_path / "whole", tensorboard=False)
    for step in (1, 2, 3):
        whole.metrics(step, 0, {"train/loss": 1 / step, "a, quoted": 0.1})
    whole.close()

    first = RunLog(tmp_path / "cut", tensorboard=False)
    first.metrics(1, 0, {"train/loss": 1.0, "a, quoted": 0.1})
    position = first.position()  # a checkpoint is saved here
    first.metrics(2, 0, {"train/loss": 99.0})  # and this row dies with the process
    first.close()
    second = RunLog(tmp_path / "cut", tensorboard=False, resume=True)
    second.cut(position, step=1)
    for step in (2, 3):
        second.metrics(step, 0, {"train/loss": 1 / step, "a, quoted": 0.1})
    second.close()
    assert (tmp_path / "cut" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_a_run_that_starts_over_starts_empty(tmp_path):
    first = RunLog(tmp_path, tensorboard=True)
    first.metrics(1, 0, {"train/loss": 1.0})
    first.close()
    second = RunLog(tmp_path, tensorboard=True)
    second.metrics(1, 0, {"train/loss": 2.0})
    second.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,epoch,name,value\n1,0,train/loss,2.0\n"
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_values_survive_exactly(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.metrics(3, 1, {"x": 0.1 + 0.2})
    log.close()
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "step,epoch,name,value"
    assert row == "3,1,x,0.30000000000000004"
    assert float(row.split(",")[-1]) == 0.1 + 0.2


def test_a_shortened_file_is_refused(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    with pytest.raises(InputError, match=r"metrics.csv: 22 bytes, but the checkpoint was saved at 1000"):
        log.cut(1000, step=5)


def test_a_lost_file_is_refused_and_not_begun_anew(tmp_path):
    with pytest.raises(InputError, match=r"metrics.csv: not there"):
        RunLog(tmp_path, tensorboard=False, resume=True)
    assert not (tmp_path / "metrics.csv").exists()


def test_tensorboard_after_a_kill_shows_each_step_once(tmp_path):
    """What was written after the checkpoint is purged, what was written before it is on the disk though nobody closed."""
    child = os.fork()
    if child == 0:
        try:
            log = RunLog(tmp_path, tensorboard=True)
            for step in range(1, 5):
                log.metrics(step, 0, {"train/loss": 1 / step})
            position = log.position()  # a checkpoint at step 4
            (tmp_path / "position").write_text(str(position))
            for step in range(5, 8):
                log.metrics(step, 0, {"train/loss": 99.0})
            log.position()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    time.sleep(1.1)  # TensorBoard orders the files of a folder by the second in their names
    log = RunLog(tmp_path, tensorboard=True, resume=True)
    log.cut(int((tmp_path / "position").read_text()), step=4)
    for step in range(5, 10):
        log.metrics(step, 0, {"train/loss": 1 / step})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(step, pytest.approx(1 / step)) for step in range(1, 10)]


@pytest.mark.parametrize(
    ("every", "total", "expected"),
    [(50, 10_000, 50), (50, 1000, 50), (50, 400, 20), (50, 90, 4), (50, 39, 1), (50, 12, 1), (1, 12, 1)],
)
def test_a_curve_has_20_points_or_more(every, total, expected):
    between = LogConfig(every_steps=every).steps_between(total)
    assert between == expected
    assert total // between >= min(total, 20)


def test_tensorboard_draws_no_constants(tmp_path):
    log = RunLog(tmp_path, tensorboard=True)
    values = {"val/raw/mAP": 0.5, "val/raw/threshold": 0.5, "val/raw/num_images": 7, "val/raw/loss": 3.0}
    log.metrics(1, 0, values)
    log.close()
    assert sorted(EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]) == [
        "val/raw/loss",
        "val/raw/mAP",
    ]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[2] for row in rows] == list(values)
