"""The interface of a method for learning tasks one after another, and the training that it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mas_ext.models import MultiHead

Setting = Literal["task", "domain", "class"]
SETTINGS = ("task", "domain", "class")

# (output, target) -> 0-dim: what is minimised on a batch.
TaskLoss = Callable[[Tensor, Tensor], Tensor]


def is_cross_entropy(task_loss: TaskLoss) -> bool:
    """Whether a loss is torch's cross entropy, whatever its options: outputs are then logits of classes."""
    function = getattr(task_loss, "func", task_loss)
    return function is F.cross_entropy or isinstance(function, nn.CrossEntropyLoss)


@dataclass
class Training:
    """The training of one task, as its method sees it.

    Attributes:
        model: has the heads of all tasks so far ("task", "class") or the only one ("domain").
        optimizer: of all parameters of the model; new for every task.
        task: number of the task, from 0.
        setting: "task" (task-incremental: one head per task, and the task is known at test time), "domain" (one
            head for all tasks) or "class" (all heads side by side, and the task has to be told, too).
        head: the one in training: `task`, 0, or None for all heads side by side.
        batches: batches(n) reads n samples of the training data, or (None) all of them once, always in the same
            order: x (N, ...), y (N, ...) as `task_loss` takes it.
        make_optimizer: makes an optimizer of this kind for other parameters.
        observing: whether this is one of the last epochs, in which importance is gathered online.
        resumed: whether begin_task continues a task after load_state_dict instead of starting one.
        task_loss: (output, target) -> 0-dim, the mean over a batch. Targets of the cross entropy are positions
            among the outputs, (N,).
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
    task_loss: TaskLoss = F.cross_entropy

    def logits(self, x: Tensor) -> Tensor:
        """Outputs of the head in training: x (N, ...) -> (N, outputs)."""
        logits: Tensor = self.model(x, self.head)
        return logits

    def new_task_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The task loss of the present task's outputs alone, from `logits(x)` and targets: 0-dim."""
        if self.setting == "class":
            first = sum(self.model.outputs[: self.task])
            logits, y = logits[:, first:], y - first
        return self.task_loss(logits, y)

    @property
    def own_parameters(self) -> tuple[str, ...]:
        """fnmatch patterns of parameters that only one task uses, which need no protection."""
        return ("heads.*",) if self.setting == "task" else ()


@dataclass(eq=False)
class Method:
    """The task loss on one task after another. Methods override what they need.

    A method is a dataclass: its fields are what it is made with. `joint` says that every task is learned
    together with all tasks before it: their samples are mixed, and `Training.head` is None for several heads.
    """

    joint = False

    def begin_task(self, training: Training) -> None:
        """Before a task's first step, and again where a run is resumed inside it (`training.resumed`).

        Task 0 starts afresh: what was kept of an earlier training, maybe of another model, is dropped.
        """

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        """The quantity that is minimised on a batch as `Training.batches` gives it, 0-dim."""
        return training.task_loss(training.logits(x), y)

    def after_step(self, training: Training, x: Tensor, y: Tensor) -> None:
        """After the optimizer's step on this batch."""

    def end_task(self, training: Training) -> None:
        """After a task's last step; the model is then tested as it is."""

    def options(self) -> dict[str, Any]:
        """The fields by name: a run is resumed only with the same values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def state_dict(self) -> dict[str, Any]:
        """All that later calls need: dicts, lists and tuples of tensors, numbers and strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        """Restore what `state_dict` returned; the model has its heads and parameters already."""
