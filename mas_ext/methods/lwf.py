"""Learning without Forgetting: the model as it was teaches the model that learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_ext._arguments import check_choice, check_count, check_factor, check_positive
from mas_ext.distillation import frozen_copy, softened
from mas_ext.methods.method import Method, Training, is_cross_entropy
from mas_ext.models import MultiHead


@dataclass(eq=False)
class LwF(Method):
    """Task loss + lam sum_o KD_o (Li & Hoiem, Learning without Forgetting, ECCV 2016 and TPAMI 2018).

    The teacher is the model as it was before the task, in eval mode. With p' its probabilities for an old task
    o and p the model's, on the samples of the new task,

        KD_o = -mean over samples sum_c q'_c log q_c,   q_c = p_c^(1/T) / sum_j p_j^(1/T)

    and q' likewise, which for p = softmax(z) is softmax(z / T): not multiplied by T^2. For outputs that are no
    logits, KD_o is the mean squared distance from the teacher's. Old tasks are the old heads in the
    task-incremental setting, the one head in the domain-incremental, and in the class-incremental the columns
    of all old heads together. The task loss is always over the new task's outputs alone, as in the paper: a
    cross entropy over all columns would have the old ones unlearned, faster than they are taught.

    A new head is first trained alone, by the task loss, with all else frozen (dropout off, BatchNorm on its
    running statistics): the paper's warm-up, which there goes on until it converges.

    Args:
        lam: the paper's lambda_o, 1 in most of its experiments.
        temperature: the paper's T, 2.
        warm_up: epochs in which only the new head is trained, from the second task on.
        distance: from the teacher's outputs, "softmax" (the formula above) or "squared"; None: "softmax" where
            the task loss is the cross entropy.

    Raises:
        ValueError: an argument that can't be used.
    """

    lam: float = 1.0
    temperature: float = 2.0
    warm_up: int = 1
    distance: Literal["softmax", "squared"] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_factor(self.lam, "lam")
        check_positive(self.temperature, "temperature")
        check_count(self.warm_up, "warm_up", least=0)
        check_choice("distance", self.distance, ("softmax", "squared", None))
        self.teacher: MultiHead | None = None

    def begin_task(self, training: Training) -> None:
        if training.resumed:
            return
        if training.task == 0:
            self.teacher = None
        elif training.setting == "domain":
            self.teacher = _teacher(training.model, heads=1)
        else:
            self.teacher = _teacher(training.model, heads=training.task)
            self._train_new_head(training)

    def _train_new_head(self, training: Training) -> None:
        model = training.model
        parameters = list(model.heads[training.task].parameters())
        optimizer = training.make_optimizer(parameters)
        model.eval()
        for _ in range(self.warm_up):
            for features, y in features_of(training):
                loss = training.new_task_loss(model.classify(features, training.head), y)
                optimizer.zero_grad()
                loss.backward(inputs=parameters)
                optimizer.step()
        model.train()

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        features = training.model.backbone(x)
        logits = training.model.classify(features, training.head)
        loss = training.new_task_loss(logits, y)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            taught = self.teacher.backbone(x)
        return loss + self.forgetting(training, features, logits, taught)

    def forgetting(
        self, training: Training, features: Tensor, logits: Tensor, taught: Tensor
    ) -> Tensor:
        """The term added to the task loss, 0-dim.

        Args:
            features: of the model, (N, width).
            logits: of the head in training.
            taught: features of the teacher, (N, width).
        """
        assert self.teacher is not None
        heads = range(training.task) if training.setting == "task" else [training.head]
        total = logits.new_zeros(())
        for head in heads:
            target = self.teacher.classify(taught, head)
            old = logits if head == training.head else training.model.classify(features, head)
            # Of all columns side by side, the first are those of the teacher.
            total = total + self._distance(training, old[:, : target.shape[1]], target)
        return self.lam * total

    def _distance(self, training: Training, outputs: Tensor, target: Tensor) -> Tensor:
        by_loss = "softmax" if is_cross_entropy(training.task_loss) else "squared"
        if (self.distance or by_loss) == "squared":
            return F.mse_loss(outputs, target)
        return softened(outputs, target, self.temperature)

    def state_dict(self) -> dict[str, Any]:
        if self.teacher is None:
            return {}
        return {"heads": len(self.teacher.heads), "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        self.teacher = None
        if "teacher" in state:
            self.teacher = _teacher(model, state["heads"])
            self.teacher.load_state_dict(state["teacher"])


@torch.no_grad()
def features_of(training: Training, samples: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The training data as `Training.batches` gives them, with the backbone's features, (N, width), for x."""
    for x, y in training.batches(samples):
        yield training.model.backbone(x), y


def _teacher(model: MultiHead, heads: int) -> MultiHead:
    """A frozen copy of the model, with its first heads only, for evaluation."""
    teacher = frozen_copy(model)
    del teacher.heads[heads:]
    return teacher
