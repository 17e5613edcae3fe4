"""Experience replay: a few samples of every task are kept, and learned again with those of the later ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mas_ext._arguments import check_count
from mas_ext.methods.method import Method, Training
from mas_ext.models import MultiHead
from mas_ext.replay import Replay


@dataclass(eq=False)
class ExperienceReplay(Method):
    """Task loss of a batch + that of as many samples of earlier tasks (Robins 1995; Chaudhry et al. 2019).

    Samples of earlier tasks are drawn anew for each step, all equally likely, and go through the network with
    the batch. Of n samples, n_t of them of task t, the loss is sum_t n_t / n loss_t, with loss_t that of the
    head which learned task t.

    Args:
        samples: how many are kept of a task: at random, and as many of every class where targets are classes.
    """

    samples: int = 200

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")
        self.kept: list[tuple[Tensor, Tensor, int | None]] = []

    def begin_task(self, training: Training) -> None:
        if training.task == 0 and not training.resumed:
            self.kept = []

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        if not self.kept:
            return super().loss(training, x, y)
        drawn = self._draw(len(x))
        features = training.model.backbone(torch.cat([x, *(old for old, _, _ in drawn)]))
        own, *others = features.split([len(x), *(len(old) for old, _, _ in drawn)])
        loss = training.task_loss(training.model.classify(own, training.head), y)
        count = sum(len(old) for old, _, _ in drawn)
        for old, (_, target, head) in zip(others, drawn, strict=True):
            again = training.task_loss(training.model.classify(old, head), target)
            loss = loss + len(old) / count * again
        return loss

    def _draw(self, count: int) -> list[tuple[Tensor, Tensor, int | None]]:
        """At most so many samples of all that are kept, by task; none of a task without any."""
        sizes = [len(y) for _, y, _ in self.kept]
        chosen = torch.randperm(sum(sizes))[:count]
        first, drawn = 0, []
        for (x, y, head), size in zip(self.kept, sizes, strict=True):
            index = chosen[(chosen >= first) & (chosen < first + size)].to(y.device) - first
            first += size
            if len(index):
                drawn.append((x[index], y[index], head))
        return drawn

    def end_task(self, training: Training) -> None:
        seed = int(torch.randint(2**62, ()))
        memory: Replay | None = None
        for x, y in training.batches(None):
            if memory is None:
                by_class = None if y.is_floating_point() or y.dim() > 1 else _labels
                memory = Replay(self.samples, by_class, seed)
            memory.add((x, y))
        assert memory is not None  # no task is empty
        self.kept.append((*memory.draw(self.samples), training.head))

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        device = next(model.parameters()).device
        self.kept = [(x.to(device), y.to(device), head) for x, y, head in state["kept"]]


def _labels(batch: tuple[Tensor, Tensor]) -> Tensor:
    return batch[1]
