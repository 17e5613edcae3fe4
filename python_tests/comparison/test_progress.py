"""Progress: a line a task, or a bar on a terminal; what was learned before takes no time."""

import sys
import time

import pytest

from mas_ext.comparison.progress import ProgressBar
from mas_ext.training.run import Epoch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_lines(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressBar([2, 1], trainings=3)
    progress.begin("mas seed 0")
    for epoch in (1, 2):
        clock[0] += 5.0
        progress.epoch(Epoch(0, epoch, 0.1, None))
    progress.task(0, 0.9876)  # 2 of 9 epochs in 10 s
    progress.end()  # stopped early
    progress.begin("joint seed 0")
    progress.end()  # finished in an earlier run
    progress.begin("joint seed 1")
    clock[0] += 2.0
    progress.epoch(Epoch(0, 2, 0.1, 0.5))  # went on after the first epoch
    progress.task(0, 0.5)  # 3 epochs in 12 s, 1 left
    progress.close()
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [
        "mas seed 0: task 1/2, accuracy 98.8 %, 00:35 left",
        "joint seed 1: task 1/2, accuracy 50.0 %, 00:04 left",
    ]


def test_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = ProgressBar([2, 1], trainings=1)
    progress.begin("mas seed 0")
    progress.epoch(Epoch(0, 2, 0.1, 0.756))
    progress.task(0, 0.25)
    progress.say("something")
    progress.close()
    err = capsys.readouterr().err
    assert "mas seed 0, task 1/2, epoch 2/2:  67%" in err
    assert "2/3 [" in err
    assert "accuracy 25.0 %]" in err
    assert "something\n" in err
