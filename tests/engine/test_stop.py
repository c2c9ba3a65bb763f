import os
import signal
import threading
import time

import pytest

from mlvision.engine.stop import StopSignal

BOTH = [signal.SIGTERM, signal.SIGINT]


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_noted_and_ends_the_batches(number, capfd):
    before = [signal.getsignal(each) for each in BOTH]
    stop, taken = StopSignal(), []
    with stop.noted():
        assert not stop()
        for batch in stop.ends(range(1, 10)):
            taken.append(batch)
            if batch == 3:
                send(number)
    assert taken == [1, 2, 3]
    assert stop()
    assert stop.name == number.name
    assert capfd.readouterr().err.startswith(f"{number.name}: saving after this step or validation")
    assert [signal.getsignal(each) for each in BOTH] == before


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_ends_the_wait_for_a_batch_that_never_comes(number):
    def never():
        threading.Timer(0.05, send, [number]).start()
        yield 1
        try:
            time.sleep(250)
        except Exception:  # as a reader of images has it
            yield "swallowed"

    stop = StopSignal()
    with stop.noted():
        assert list(stop.ends(never())) == [1]
    assert stop.name == number.name


def test_all_batches_come_when_no_signal_does():
    stop = StopSignal()
    with stop.noted():
        assert list(stop.ends(range(1, 4))) == [1, 2, 3]
    assert stop.name == ""


def test_a_second_ctrl_c_interrupts_at_once_and_a_second_sigterm_does_not(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stop = StopSignal()
    with stop.noted():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.name == "SIGINT"
    stop = StopSignal()
    with stop.noted():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert stop.name == "SIGTERM"


def test_torchrun_repeats_the_terminals_ctrl_c(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop = StopSignal()
    with stop.noted():
        send(signal.SIGINT)
        send(signal.SIGINT)
    assert stop.name == "SIGINT"


def test_outside_the_main_thread_nothing_is_installed():
    before, taken, stop = signal.getsignal(signal.SIGTERM), [], StopSignal()

    def train():
        with stop.noted():
            taken.extend([*stop.ends([1, 2]), signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert taken == [1, 2, before]
