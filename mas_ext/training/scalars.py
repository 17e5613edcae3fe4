"""The course of a training as scalars, for TensorBoard, Weights & Biases and others of one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mas_ext.training.run import Epoch, Result


class ScalarWriter(Protocol):
    """What scalars go to, such as a torch.utils.tensorboard.SummaryWriter."""

    def add_scalar(self, name: str, value: float, step: int, /) -> object:
        """Take a value under this name; steps don't fall."""

    def close(self) -> object:
        """Take no more."""


class ScalarCallback:
    """Gives a writer what a Trainer finds; a callback of it.

        writer = torch.utils.tensorboard.SummaryWriter("runs/mas")
        Trainer(model, "mas", epochs=4, callbacks=[ScalarCallback(writer, epochs=4)]).fit(scenario)
        writer.close()

    The step is the number of epochs since the first task began, those that `patience` left out among them.
    After every epoch: "loss", and "validation" where there are validation data. After every task:
    "accuracy/average" over the tasks so far, and "accuracy/task K" of each that was tested, from 0.

    Args:
        writer: add_scalar(name, value, step) is called, and then flush(), where it has one.
        epochs: of the Trainer: for every task, or one number per task.
    """

    def __init__(self, writer: ScalarWriter, epochs: int | Sequence[int]) -> None:
        self.writer, self.epochs = writer, epochs

    def __call__(self, news: Epoch | Result) -> None:
        """Give the writer what has been found since the last call."""
        add = self.writer.add_scalar
        if isinstance(news, Epoch):
            step = self._before(news.task) + news.epoch
            add("loss", news.loss, step)
            if news.validation is not None:
                add("validation", news.validation, step)
        else:
            step, row = self._before(news.tasks), news.accuracy[news.tasks - 1]
            add("accuracy/average", float(row[: news.tasks].mean()), step)
            for k in (~row.isnan()).nonzero()[:, 0].tolist():
                add(f"accuracy/task {k}", float(row[k]), step)
        getattr(self.writer, "flush", lambda: None)()

    def _before(self, task: int) -> int:
        """The number of epochs before this task."""
        return task * self.epochs if isinstance(self.epochs, int) else sum(self.epochs[:task])


class WandbWriter:
    """A run of Weights & Biases as a ScalarWriter: WandbWriter(wandb.init(project="mas"))."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def add_scalar(self, name: str, value: float, step: int, /) -> None:
        """Log the value under this name."""
        self.run.log({name: value}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()
