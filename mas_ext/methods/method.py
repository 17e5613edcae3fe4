"""What a method for learning tasks one after another is: four calls, and the training that they see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mas_ext.models import MultiHead

Setting = Literal["task", "domain", "class"]
SETTINGS = ("task", "domain", "class")


@dataclass
class Training:
    """The training of one task, as its method sees it.

    model: its heads are those of all tasks so far ("task", "class") or the only one ("domain").
    optimizer: new for every task, over all parameters of the model.
    task: number of the task, from 0.
    setting: "task" (task-incremental: a head a task, the task is known when testing), "domain" (one head for
        all tasks) or "class" (all heads side by side, the task has to be told, too).
    head: what is trained now: the head `task`, the head 0, or None for all heads side by side.
    batches: batches(n) reads n samples of the training data, or (None) all of them once, in an order that is
        the same on every call: x (N, ...), y (N,) as positions in `logits(x)`.
    make_optimizer: an optimizer of the same kind for other parameters.
    observing: whether this is one of the last epochs, in which importance is gathered online.
    resumed: whether begin_task goes on inside a task, after load_state_dict, instead of starting one.
    """

    model: MultiHead
    optimizer: Optimizer
    task: int
    setting: Setting
    head: int | None
    batches: Callable[[int | None], Iterable[tuple[Tensor, Tensor]]]
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    observing: bool = False
    resumed: bool = False

    def logits(self, x: Tensor) -> Tensor:
        """What the present task is trained on: x (N, ...) -> (N, classes)."""
        logits: Tensor = self.model(x, self.head)
        return logits

    @property
    def own_parameters(self) -> tuple[str, ...]:
        """fnmatch patterns of parameters that belong to one task alone: nothing needs to hold them."""
        return ("heads.*",) if self.setting == "task" else ()


class Method:
    """Plain cross entropy on one task after another; methods change what they need of it.

    `joint` says that every task is learned together with all tasks before it: their samples are mixed, and
    `Training.head` is None.
    """

    joint = False

    def begin_task(self, training: Training) -> None:
        """Before a task's first step, and again where a run goes on inside it (`training.resumed`).

        Task 0 begins anew: what was kept of an earlier training, maybe of another model, counts no more.
        """

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        """What is minimised: x (N, ...), y (N,) as positions in `training.logits(x)` -> 0-dim."""
        return F.cross_entropy(training.logits(x), y)

    def after_step(self, training: Training, x: Tensor, y: Tensor) -> None:
        """After the optimizer's step on this batch."""

    def end_task(self, training: Training) -> None:
        """After a task's last step; the model is then tested as it is."""

    def options(self) -> dict[str, Any]:
        """What it was made with, by name: a run does not go on with other ones."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that later calls need: dicts, lists and tuples of tensors, numbers and strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        """Take over what `state_dict` gave; the model has its heads and parameters already."""
