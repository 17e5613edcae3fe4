"""What importance is the sensitivity of: one or several numbers per sample, from the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Objective = Literal["l2", "l1", "vector"] | Callable[[Tensor], Tensor]

NAMES = ("l2", "l1", "vector")


def check_objective(objective: Objective) -> None:
    """Raise a ValueError unless the objective is one of the names or a callable."""
    if not callable(objective) and objective not in NAMES:
        raise ValueError(f"objective: got {objective!r}, expected one of {NAMES} or a callable")


def values(
    output: Tensor, labels: Tensor | None, samples: int, objective: Objective, max_outputs: int
) -> Tensor:
    """The objective per sample, shape (samples, K): K = 1, and the number of outputs for "vector".

    "l2": sum of squared outputs (Aljundi et al. 2018, section 4.1); "l1": sum of absolute outputs;
    "vector": every output by itself; a callable: output -> tensor of shape (samples,). Labels play no part.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"output: got {type(output).__name__}, expected a tensor; pass forward= to choose one"
        )
    if output.dim() == 0 or output.shape[0] != samples:
        raise ValueError(
            f"output: got shape {tuple(output.shape)}, expected {samples} samples in dimension 0"
        )
    if callable(objective):
        result = objective(output)
        if not isinstance(result, Tensor) or result.shape != (samples,):
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"objective: got {got}, expected a tensor of shape ({samples},)")
        return result[:, None]
    flat = output.reshape(samples, -1)
    if flat.dtype.itemsize < 4:
        flat = flat.float()
    if objective == "l2":
        return flat.square().sum(1, keepdim=True)
    if objective == "l1":
        return flat.abs().sum(1, keepdim=True)
    if flat.shape[1] > max_outputs:
        raise ValueError(
            f'objective: "vector" takes one backward pass per output; got {flat.shape[1]} outputs, '
            f"expected at most max_outputs={max_outputs}"
        )
    return flat
