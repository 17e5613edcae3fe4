"""How coarse the numbers of a pass are, and whether two tensors differ by more than that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Precision(NamedTuple):
    """How coarse numbers are.

    tolerance, order: relative errors that rounding may cause in a gradient, when a sample is run in another
    batch, and when the sums of the same pass come in another order. eps: that of one operation. reach: how many
    times a gradient can be doubled and halved.
    """

    tolerance: float
    order: float
    eps: float
    reach: int


PRECISION_OF = {
    torch.float64: Precision(1e-8, 1e-8, torch.finfo(torch.float64).eps, 64),
    torch.float32: Precision(1e-3, 1e-3, torch.finfo(torch.float32).eps, 64),
    torch.float16: Precision(3e-2, 3e-2, torch.finfo(torch.float16).eps, 3),
    torch.bfloat16: Precision(1e-1, 1e-1, torch.finfo(torch.bfloat16).eps, 64),
}
# float32 whose products have factors as coarse as float16. What should be zero is taken for noise no sooner.
TF32 = PRECISION_OF[torch.float32]._replace(tolerance=PRECISION_OF[torch.float16].tolerance)


def lowest_precision(dtypes: Iterable[torch.dtype], on_gpu: bool) -> Precision:
    """The precision of a model that computes in these dtypes."""
    found = max(PRECISION_OF[dtype] for dtype in dtypes if dtype in PRECISION_OF)
    # A GPU's convolutions have TF32 by default, and its products of matrices on request.
    return TF32 if on_gpu and found == PRECISION_OF[torch.float32] else found


def differ(got: Tensor, expected: Tensor, precision: Precision, noise: float = 0.0) -> bool:
    """Whether tensors differ by more than rounding; NaN is a difference.

    noise: a norm that rounding alone may have.
    """
    return not bool((got - expected).norm() <= precision.tolerance * expected.norm() + noise)
