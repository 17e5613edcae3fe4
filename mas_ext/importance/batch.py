"""`batch`: the gradient of a whole batch's objective, the approximation that the field's code uses."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mas_ext.importance.evaluation import Evaluate, Labelled
from mas_ext.importance.gradients import (
    Summation,
    Totals,
    accumulate_gradients,
    accumulate_sharded,
    zeros,
)
from mas_ext.kernels.backends import Backend


class Batch:
    """One backward pass per output, in which positive and negative samples cancel.

    With g = sum over the n samples of a batch of d objective / d theta: sum over outputs of abs(g), or, for
    squares, of n (g / n)^2, the square of the batch's mean gradient for each of its samples.
    """

    def __init__(self, backend: Backend, square: bool = False) -> None:
        self._how = Summation(backend, square)

    def __call__(
        self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]
    ) -> tuple[Totals, Tensor]:
        """The sums by name, and the objectives."""
        _, values = evaluate(batch)
        if evaluate.lockstep is not None:
            share = 1 / len(values) if self._how.square else 1.0
            accumulate_sharded(evaluate.lockstep, values, theta, self._how, share)
            return {}, values.detach()
        totals = zeros(theta)
        accumulate_gradients(totals, values, theta, self._how)
        if self._how.square:
            for total in totals.values():
                total /= len(values)
        return totals, values.detach()
