"""`local`: l-MAS, the Hebbian variant: every layer for itself, in a forward pass alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_ext.importance.exact.driver import Exact
from mas_ext.importance.exact.layers import Layer, bias_use
from mas_ext.importance.exact.nodes import Spot
from mas_ext.importance.exact.rules import RULES
from mas_ext.importance.exact.tracing import Tape
from mas_ext.importance.single_samples import Evaluate, Totals, zeros
from mas_ext.kernels import backends
from mas_ext.kernels.backends import Backend

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


class Local:
    """sum over samples of abs(d |y|^2 / d theta), where y is the output of the layer that theta belongs to.

    y is taken after ReLU where that is the next operation on it; the layer's input is held constant. Linear
    layer: 2 abs(y_i x_j) summed over samples (Aljundi et al. 2018, on the connection to Hebbian learning).
    """

    def __init__(self, backend: Backend) -> None:
        """backend: see kernels.backends.serves."""
        self.backend = backend
        self._exact = Exact(backend)

    def __call__(
        self, evaluate: Evaluate, batch: Any, samples: int, theta: Mapping[str, Tensor]
    ) -> tuple[Totals, Tensor]:
        """The sums by name, and the objectives of the model's output."""
        tape, values = self._run(evaluate, batch, samples, theta)
        if samples > 1 and not self._exact.knows(tape, batch):
            self._exact(evaluate, batch, samples, theta)
            tape, values = self._run(evaluate, batch, samples, theta)
        outside = sorted(tape.misfits | self._exact.generic)
        # What is not finite is no proof of a misfit; it is refused for that, later.
        if outside and values.isfinite().all():
            raise ValueError(
                f'importance of {", ".join(outside)}: "local" is that of layers, and the model uses this '
                "in another way; exclude it, or choose another method"
            )
        return zeros(theta) | tape.finish(), values

    def _run(
        self, evaluate: Evaluate, batch: Any, samples: int, theta: Mapping[str, Tensor]
    ) -> tuple[_LocalTape, Tensor]:
        serves = backends.serves(next(iter(theta.values())).device, self.backend)
        layouts = self._exact.layouts(theta)
        tape = _LocalTape(theta, layouts, samples, RULES, False, serves)
        with tape:
            values = evaluate(batch, samples)[1].detach()
        return tape, values


class _Pending(NamedTuple):
    """A layer's output whose next operation is not known yet."""

    y: Tensor
    x: Tensor
    layer: Layer
    spots: Sequence[Spot | None]
    bias: Tensor | None


class _LocalTape(Tape):
    """Notes uses on the way forward, where more may come until the end: the gradient of |y|^2 is 2 y."""

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
        spots: Sequence[Spot | None],
    ) -> Tensor:
        """The layer, its input held constant."""
        y = layer.forward(x, weight, bias)
        self._pending[id(y)] = _Pending(y, x, layer, spots, bias)
        return y

    def _spread(
        self, spot: Spot, p: Tensor, shape: Sequence[int], y_shape: Sequence[int]
    ) -> Tensor:
        self.misfits.add(spot.slot.name)
        return super()._spread(spot, p, shape, y_shape)

    @torch.no_grad()
    def before(self, func: Callable[..., Any], args: Sequence[Any]) -> None:
        """What a function does to outputs shows whether they count as they are."""
        for t in args:
            if id(t) in self._pending:
                self._settle(self._pending.pop(id(t)), after_relu=func in _RELU)
        if func.__name__.endswith("_") and args:  # in place: inputs are about to change
            for key in [key for key, pending in self._pending.items() if pending.x is args[0]]:
                self._settle(self._pending.pop(key), after_relu=False)

    def _settle(self, pending: _Pending, after_relu: bool) -> None:
        y, x, layer, (weight_spot, bias_spot), bias = pending
        grad = 2 * (F.relu(y) if after_relu else y)
        if weight_spot is not None:
            self.note(weight_spot, layer.weight_use(grad, x, weight_spot.fold))
        if bias_spot is not None and bias is not None:
            self.note(bias_spot, bias_use(layer, grad, bias, bias_spot.fold))

    @torch.no_grad()
    def finish(self) -> Totals:
        """The totals, once the model has run."""
        for pending in self._pending.values():
            self._settle(pending, after_relu=False)
        return self.collect()
