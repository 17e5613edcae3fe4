"""The flat state of a list of tensors: Omega, anchor and the factors, as all kernels take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mas_ext.kernels.dtypes import compute_dtype, omega_values


class State(NamedTuple):
    """What is known of some tensors, in two flat buffers of shape (rows, total).

    Tensor i of n_i elements owns the elements [offsets[i], offsets[i] + n_i) of each row, in its own memory
    order. There is one row for each task, or one in all when tasks are merged. A state of no rows holds
    nothing: a step without a penalty.

    offsets: where each tensor's elements start; -1 for one without a penalty, in the optimizers' steps only.
    omega: float32, bfloat16, codes of 8 bits (uint8), or float64 beside float64 tensors.
    anchor: float32, or float64 beside float64 tensors; or of the dtype of tensors of 16 bits.
    alpha: shape (rows,), float64: the factor of each row.
    remainder: 0-dim float64: the r that is added to the first row's sum.
    native: whether the compiled kernels do the work, or plain PyTorch.
    """

    offsets: Sequence[int]
    omega: Tensor
    anchor: Tensor
    alpha: Tensor
    remainder: Tensor
    native: bool

    @classmethod
    def empty(cls, count: int, device: torch.device, native: bool) -> State:
        """Without a penalty for any of this many tensors."""
        omega = torch.empty(0, 0, device=device)
        alpha = torch.empty(0, dtype=torch.float64, device=device)
        remainder = torch.empty((), dtype=torch.float64, device=device)
        return cls([-1] * count, omega, omega, alpha, remainder, native)

    def rows(self, i: int, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Omega and anchor of tensor i, row by row, in x's shape and the dtype of its arithmetic."""
        dtype, offset = compute_dtype(x.dtype), self.offsets[i]
        for omega, anchor in zip(self.omega, self.anchor, strict=True):
            yield (
                omega_values(flat_view(omega, offset, x), dtype),
                flat_view(anchor, offset, x).to(dtype),
            )


# A State as the operators' schemas spell it; the second one is written to.
STATE = "int[] offsets, Tensor omega, Tensor anchor, Tensor alpha, Tensor remainder, bool native"
CHANGED_STATE = STATE.replace("Tensor omega", "Tensor(a!) omega").replace(
    "Tensor anchor", "Tensor(b!) anchor"
)


def flat_view(row: Tensor, offset: int, like: Tensor) -> Tensor:
    """The elements of a flat row that belong to a tensor, as a view with its shape and strides."""
    return row.as_strided(like.shape, like.stride(), row.storage_offset() + offset)
