"""How far a run is, on stderr: a bar on a terminal, elsewhere one line per task."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from mas_ext.training.run import Epoch


class ProgressBar:
    """Counts the epochs of trainings, which all learn the same tasks, one training after another."""

    def __init__(self, epochs: Sequence[int], trainings: int) -> None:
        """epochs: of each task; trainings: how many there are."""
        self._epochs, self._total = epochs, trainings * sum(epochs)
        self._title, self._start, self._now, self._learned = "", 0, 0, 0
        self._began = time.perf_counter()
        # Without smoothing, the time left is by the mean of all epochs: those of some methods are slow.
        self._bar = tqdm(
            total=self._total, unit="epoch", smoothing=0, disable=not sys.stderr.isatty()
        )

    def begin(self, title: str) -> None:
        """A training begins."""
        self._title, self._start = title, self._now
        self._bar.set_description(title)

    def epoch(self, news: Epoch) -> None:
        """An epoch of it is over."""
        task = f"task {news.task + 1}/{len(self._epochs)}"
        self._bar.set_description(
            f"{self._title}, {task}, epoch {news.epoch}/{self._epochs[news.task]}", refresh=False
        )
        if news.validation is not None:
            self._bar.set_postfix_str(
                f"validation accuracy {100 * news.validation:.1f} %", refresh=False
            )
        self._learned += 1
        self._move(sum(self._epochs[: news.task]) + news.epoch)

    def task(self, task: int, accuracy: float) -> None:
        """A task of it is over, with this mean accuracy on the tasks so far."""
        found = f"accuracy {100 * accuracy:.1f} %"
        self._bar.set_postfix_str(found, refresh=False)
        self._move(sum(self._epochs[: task + 1]))
        if self._bar.disable:
            self.say(
                f"{self._title}: task {task + 1}/{len(self._epochs)}, {found}, {self._left()} left"
            )

    def end(self) -> None:
        """It is over, at whatever epoch."""
        self._move(sum(self._epochs))

    def say(self, line: str) -> None:
        """Write a line that stays."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _move(self, epochs: int) -> None:
        """Move to so many epochs of the training; those that were learned before took no time."""
        before, self._now = self._now, self._start + epochs
        self._bar.initial = self._now - self._learned
        self._bar.n += self._now - before
        self._bar.refresh()

    def _left(self) -> str:
        each = (time.perf_counter() - self._began) / max(self._learned, 1)
        return str(tqdm.format_interval(each * (self._total - self._now)))
