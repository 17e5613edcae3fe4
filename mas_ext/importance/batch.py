"""`batch`: |gradient of a whole batch's objective|, the approximation that the field's code uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Values = Callable[[Any, int], Tensor]
Add = Callable[[Sequence[Tensor | None]], None]


def add_batch(
    values: Values, batch: Any, samples: int, theta: Sequence[Tensor], add: Add
) -> Tensor:
    """sum over outputs of abs(sum over the batch of d values / d theta): one backward pass an output.

    Positive and negative samples cancel. Returns the sum of |values| over the batch.
    """
    per_sample = values(batch, samples)
    outputs = per_sample.shape[1]
    if not per_sample.requires_grad:
        raise ValueError(
            "output: got one that depends on no parameter, expected a differentiable one"
        )
    for k in range(outputs):
        add(
            torch.autograd.grad(
                per_sample[:, k].sum(), theta, retain_graph=k + 1 < outputs, allow_unused=True
            )
        )
    return per_sample.detach().abs().sum(dtype=torch.float64)
