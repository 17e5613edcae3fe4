"""Joint training: the upper bound, which keeps the data of all tasks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_ext.methods.method import Method, Training


class Joint(Method):
    """Cross entropy on the samples of all tasks so far, mixed, going on from the model of the task before.

    In the task-incremental setting a sample's softmax is over the classes of its own task.
    """

    joint = True

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        """See Method.loss; y are positions among the outputs of all heads."""
        logits = training.logits(x)
        if training.setting == "task":
            outputs = torch.tensor(training.model.outputs)
            head = torch.arange(len(outputs)).repeat_interleave(outputs).to(y.device)
            logits = logits.masked_fill(head != head[y][:, None], -torch.inf)
        return F.cross_entropy(logits, y)
