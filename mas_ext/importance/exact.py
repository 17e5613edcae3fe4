"""`exact`: the sum of |per-sample gradient|, as MAS defines it, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mas_ext.importance import batches
from mas_ext.importance.batch import Add, Values, add_batch


def add_exact(
    values: Values, batch: Any, samples: int, theta: Sequence[Tensor], add: Add
) -> Tensor:
    """sum over samples of abs(d values / d theta): Aljundi et al. 2018, equation 2.

    Returns the sum of |values| over the batch.
    """
    total = torch.zeros((), dtype=torch.float64)
    for i in range(samples):
        alone = add_batch(values, batches.part(batch, i, i + 1), 1, theta, add)
        total = total.to(alone.device) + alone
    return total
