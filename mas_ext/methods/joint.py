"""Joint training: the upper bound, which keeps the data of all tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from mas_ext.methods.method import Method, Training, is_cross_entropy


class Joint(Method):
    """The task loss on the samples of all tasks so far, mixed, starting from the model of the task before.

    In the task-incremental setting a sample's softmax is over the classes of its own task; any other loss than
    the cross entropy needs batches of a single task, whose head is `Training.head`.
    """

    joint = True

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        logits = training.logits(x)
        if training.setting == "task" and training.head is None:
            if not is_cross_entropy(training.task_loss):
                raise ValueError(
                    "task_loss: got joint training of several heads with a loss that is no cross entropy, "
                    'expected setting="domain"'
                )
            outputs = torch.tensor(training.model.outputs)
            head = torch.arange(len(outputs)).repeat_interleave(outputs).to(y.device)
            logits = logits.masked_fill(head != head[y][:, None], -torch.inf)
        return training.task_loss(logits, y)
