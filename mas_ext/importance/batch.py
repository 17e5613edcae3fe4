"""`batch`: |gradient of a whole batch's objective|, the approximation that the field's code uses."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mas_ext.importance.evaluation import Evaluate, Labelled
from mas_ext.importance.gradients import Summation, Totals, accumulate_gradients, zeros
from mas_ext.kernels.backends import Backend


class Batch:
    """sum over outputs of abs(sum over the batch of d objective / d theta): one backward pass per output.

    Positive and negative samples cancel.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(
        self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]
    ) -> tuple[Totals, Tensor]:
        """The sums by name, and the objectives."""
        _, values = evaluate(batch)
        totals = zeros(theta)
        accumulate_gradients(totals, values, theta, Summation(self.backend))
        return totals, values.detach()
