"""`local`: l-MAS, the Hebbian variant: every layer by itself, from a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_ext.importance import batches
from mas_ext.importance.evaluation import Evaluate, Labelled
from mas_ext.importance.exact.driver import Exact
from mas_ext.importance.exact.layers import Layer
from mas_ext.importance.exact.nodes import ParameterUse
from mas_ext.importance.exact.rules import RULES
from mas_ext.importance.exact.tracing import Tape
from mas_ext.importance.gradients import Totals, zeros
from mas_ext.kernels import backends
from mas_ext.kernels.backends import Backend

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


class Local:
    """sum over samples of abs(d |y|^2 / d theta), where y is the output of the layer that theta belongs to.

    y is taken after ReLU where that is the next operation on it; the layer's input is held constant. Linear
    layer: 2 abs(y_i x_j) summed over samples (Aljundi et al. 2018, on the connection to Hebbian learning).
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._exact = Exact(backend)

    def __call__(
        self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]
    ) -> tuple[Totals, Tensor]:
        """The sums by name, and the objectives of the model's output."""
        tape, values = self._run(evaluate, batch, theta)
        if tape.samples > 1 and not self._exact.knows(tape, batch):
            self._exact(evaluate, batch, theta)
            tape, values = self._run(evaluate, batch, theta)
        outside = sorted(tape.unhandled | self._exact.fallback.keys())
        # Numbers that are not finite prove nothing of uses; they are refused for that, later.
        if outside and values.isfinite().all():
            raise ValueError(
                f'importance of {", ".join(outside)}: "local" is that of layers, and the model uses this '
                "in another way; exclude it, or choose another method"
            )
        return zeros(theta) | tape.finish(), values

    def _run(
        self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]
    ) -> tuple[_LocalTape, Tensor]:
        serves = backends.serves(next(iter(theta.values())).device, self.backend)
        layouts = self._exact.layouts(theta)
        tape = _LocalTape(theta, layouts, batches.size(batch), RULES, False, serves)
        with tape:
            values = evaluate(batch)[1].detach()
        return tape, values


class _Pending(NamedTuple):
    """A layer's output whose next operation is not known yet."""

    y: Tensor
    x: Tensor
    layer: Layer
    uses: Sequence[ParameterUse | None]
    bias: Tensor | None


class _LocalTape(Tape):
    """Records gradients on the way forward, where a ReLU may still come: the gradient of |y|^2 is 2 y."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pending: dict[int, _Pending] = {}

    @torch.no_grad()
    def apply(
        self,
        layer: Layer,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        uses: Sequence[ParameterUse | None],
    ) -> Tensor:
        """The layer, its input held constant."""
        y = layer.forward(x, weight, bias)
        self._pending[id(y)] = _Pending(y, x, layer, uses, bias)
        return y

    def _broadcast(
        self, use: ParameterUse, p: Tensor, shape: Sequence[int], y_shape: Sequence[int]
    ) -> Tensor:
        self.unhandled.add(use.source.name)
        return p.view(tuple(shape)).expand(tuple(y_shape))

    @torch.no_grad()
    def before(self, func: Callable[..., Any], args: Sequence[Any]) -> None:
        """Settle the layers whose outputs a function takes: it shows whether a ReLU is next."""
        for t in args:
            if id(t) in self._pending:
                self._settle(self._pending.pop(id(t)), after_relu=func in _RELU)
        if func.__name__.endswith("_") and args:  # in place: inputs are about to change
            for key in [key for key, pending in self._pending.items() if pending.x is args[0]]:
                self._settle(self._pending.pop(key), after_relu=False)

    def _settle(self, pending: _Pending, after_relu: bool) -> None:
        y, x, layer, (weight_use, bias_use), bias = pending
        grad = 2 * (F.relu(y) if after_relu else y)
        if weight_use is not None:
            self.record(weight_use, layer.weight_gradients(grad, x, weight_use.layout))
        if bias_use is not None and bias is not None:
            self.record(bias_use, layer.bias_gradients(grad, bias, bias_use.layout))

    @torch.no_grad()
    def finish(self) -> Totals:
        """The totals, once the model has run."""
        for pending in self._pending.values():
            self._settle(pending, after_relu=False)
        return self.collect()
