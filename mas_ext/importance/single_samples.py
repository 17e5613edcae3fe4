"""Per-sample importance by running samples alone: the definition, and the way for whatever has no rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mas_ext.importance import batches
from mas_ext.kernels import backends
from mas_ext.kernels.accumulate import accumulate_
from mas_ext.kernels.backends import Backend
from mas_ext.kernels.dtypes import compute_dtype

Totals = dict[str, Tensor]
# The forward pass that a user may give: (model, batch) -> output, samples in dimension 0.
Forward = Callable[[Any, Any], Tensor]
# (output, batch, samples) -> the objectives, shape (samples, K).
Values = Callable[[Tensor, Any, int], Tensor]


Key = TypeVar("Key")


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


PRECISIONS = {
    torch.float64: Precision(1e-8, 1e-8, torch.finfo(torch.float64).eps, 64),
    torch.float32: Precision(1e-3, 1e-3, torch.finfo(torch.float32).eps, 64),
    torch.float16: Precision(3e-2, 3e-2, torch.finfo(torch.float16).eps, 3),
    torch.bfloat16: Precision(1e-1, 1e-1, torch.finfo(torch.bfloat16).eps, 64),
}
# float32 whose products have factors as coarse as float16. What should be zero is taken for noise no sooner.
TF32 = PRECISIONS[torch.float32]._replace(tolerance=PRECISIONS[torch.float16].tolerance)


def lowest_precision(dtypes: Iterable[torch.dtype], on_gpu: bool) -> Precision:
    """The precision of a model that computes in these."""
    found = max(PRECISIONS[dtype] for dtype in dtypes if dtype in PRECISIONS)
    # A GPU's convolutions have TF32 by default, and its products of matrices on request.
    return TF32 if on_gpu and found == PRECISIONS[torch.float32] else found


class Evaluate(NamedTuple):
    """From a batch to the numbers that the importance is the sensitivity of."""

    model: nn.Module
    forward: Forward
    values: Values

    def output(self, batch: Any) -> Tensor:
        """The output."""
        # A model that changes its input would see it changed again on every pass, and so would the caller.
        return self.forward(self.model, batches.copied(batch))

    def __call__(self, batch: Any, samples: int) -> tuple[Tensor, Tensor]:
        """The output, and the objectives of shape (samples, K)."""
        output = self.output(batch)
        return output, self.values(output, batch, samples)


def differ(got: Tensor | None, expected: Tensor, precision: Precision, noise: float = 0.0) -> bool:
    """Whether tensors differ by more than rounding; None stands for zeros, NaN for a difference.

    noise: a norm that rounding alone may have.
    """
    error = expected if got is None else got - expected
    return not bool(error.norm() <= precision.tolerance * expected.norm() + noise)


def gradient(values: Tensor, c: int, theta: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """d sum_k values[k, c] / d theta by key; absent where there is none. To be called for c = 0, 1, ..."""
    if not values.requires_grad:
        raise ValueError(
            "output: got one that depends on no parameter, expected a differentiable one"
        )
    with torch.enable_grad():
        column = values[:, c].sum()
    found = torch.autograd.grad(
        column, [*theta.values()], retain_graph=c + 1 < values.shape[1], allow_unused=True
    )
    dense = (g.to_dense() if g is not None and g.is_sparse else g for g in found)
    return {name: g for name, g in zip(theta, dense, strict=True) if g is not None}


def zeros(theta: Mapping[str, Tensor]) -> Totals:
    """A sum of nothing for every parameter."""
    return {
        name: torch.zeros_like(p, dtype=compute_dtype(p.dtype), requires_grad=False)
        for name, p in theta.items()
    }


def accumulate(totals: Totals, found: Mapping[str, Tensor], square: bool, backend: Backend) -> None:
    """totals += abs(found), or its square, by name."""
    if square:
        for name, g in found.items():
            g = g.to(totals[name].dtype)
            totals[name].addcmul_(g, g)
        return
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for name, g in found.items():
        into, added = kinds.setdefault((g.device, g.dtype), ([], []))
        into.append(totals[name])
        added.append(g)
    for (device, _), (into, added) in kinds.items():
        accumulate_(into, added, 1.0, backends.serves(device, backend))


def accumulate_gradients(
    totals: Totals, values: Tensor, theta: Mapping[str, Tensor], square: bool, backend: Backend
) -> None:
    """totals += abs(d sum_k values[k, c] / d theta), or its square, for every c."""
    for c in range(values.shape[1]):
        # No name for the gradients, which would keep them while the next ones are computed.
        accumulate(totals, gradient(values, c, theta), square, backend)


def one_by_one(
    evaluate: Evaluate,
    batch: Any,
    samples: int,
    theta: Mapping[str, Tensor],
    square: bool,
    backend: Backend,
) -> tuple[Totals, Tensor, Tensor]:
    """sum over samples of abs (or square) of the gradient by name; the outputs; the objectives."""
    totals = zeros(theta)
    outputs, values = [], []
    for k in range(samples):
        output, value = evaluate(batches.part(batch, k, k + 1), 1)
        if theta:
            accumulate_gradients(totals, value, theta, square, backend)
        outputs.append(output.detach())
        values.append(value.detach())
    return totals, torch.cat(outputs), torch.cat(values)
