"""`local`: l-MAS, the Hebbian variant: every layer by itself, from a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_ext.importance.evaluation import Evaluate, Labelled
from mas_ext.importance.exact.driver import Exact
from mas_ext.importance.exact.gradient_forms import PerSample, like_total, total_of
from mas_ext.importance.exact.layers import Broadcast
from mas_ext.importance.exact.nodes import Meeting
from mas_ext.importance.exact.sample_layout import SampleLayout
from mas_ext.importance.exact.tracing import Tape
from mas_ext.importance.gradients import Totals, zeros
from mas_ext.kernels.backends import Backend
from mas_ext.parameters.names import StandIn

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
        proof = self._exact.known(tape, batch)
        if tape.samples == 1:
            layouts: Sequence[SampleLayout | None] = [SampleLayout(1, "leading")] * len(
                tape.meetings
            )
        elif proof is not None:
            layouts = proof.layouts
        else:  # where samples lie is found out on the way, in this batch or for good
            lockstep = evaluate.lockstep
            with nullcontext() if lockstep is None else lockstep.uncounted():
                self._exact(evaluate, batch, theta)
            assert self._exact.last is not None
            layouts = self._exact.last.layouts
            tape, values = self._run(evaluate, batch, theta)
        forms = tape.finish(layouts)
        outside = sorted(tape.unhandled | self._exact.fallback.keys())
        # Numbers that are not finite prove nothing of uses; they are refused for that, later.
        if outside and values.isfinite().all():
            raise ValueError(
                f'importance of {", ".join(outside)}: "local" is that of layers, and the model uses this '
                "in another way; exclude it, or choose another method"
            )
        if evaluate.lockstep is None:
            return zeros(theta) | tape.totals(forms), values
        # Sums over ranks are taken where a backward pass leaves the units, of whatever it is.
        output = evaluate.lockstep.forward(evaluate.stand_in)
        evaluate.lockstep.backward(
            output.sum(),
            take=lambda unit: tape.totals({n: forms.pop(n) for n in {*unit} & {*forms}}),
        )
        return {}, values

    def _run(
        self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]
    ) -> tuple[_LocalTape, Tensor]:
        tape = self._exact.tape(evaluate, batch, theta, _LocalTape)
        assert isinstance(tape, _LocalTape)
        with tape:
            values = evaluate(batch)[1].detach()
        return tape, values


class _Pending(NamedTuple):
    """A layer's output whose next operation is not known yet."""

    y: Tensor
    x: Tensor
    meeting: Meeting


class _LocalTape(Tape):
    """Finds gradients on the way forward, where a ReLU may still come: the gradient of |y|^2 is 2 y."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pending: dict[int, _Pending] = {}
        # By meeting: the gradient of its output, and its input.
        self._settled: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def apply(self, meeting: Meeting, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer, its input held constant."""
        y = meeting.layer.forward(x, weight, bias)
        no_output = isinstance(meeting.layer, Broadcast) or isinstance(weight, StandIn)
        if no_output or meeting.layer.recurs or meeting.is_derived:
            self.unhandled |= meeting.names
        else:
            self._pending[id(y)] = _Pending(y, x, meeting)
        return y

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self._settle_inputs(func, args)
        return super().call(func, args, kwargs)

    @torch.no_grad()
    def _settle_inputs(self, func: Callable[..., Any], args: Sequence[Any]) -> None:
        """Settle the layers whose outputs a function takes: it shows whether a ReLU is next."""
        for t in args:
            if id(t) in self._pending:
                self._settle(self._pending.pop(id(t)), after_relu=func in _RELU)
        if self.writes(func) and args:  # inputs are about to change
            for key, pending in self._pending.items():
                if pending.x is args[0]:
                    self._pending[key] = pending._replace(x=pending.x.clone())

    def _settle(self, pending: _Pending, after_relu: bool) -> None:
        y = F.relu(pending.y) if after_relu else pending.y
        self._settled[id(pending.meeting)] = 2 * y, pending.x

    @torch.no_grad()
    def finish(self, layouts: Sequence[SampleLayout | None]) -> dict[str, list[PerSample]]:
        """The gradients by name, once the model has run."""
        for pending in self._pending.values():
            self._settle(pending, after_relu=False)
        gradients: dict[str, list[PerSample]] = {}
        for meeting, layout in zip(self.meetings, layouts, strict=True):
            if id(meeting) not in self._settled or layout is None:
                continue
            grad, x = self._settled.pop(id(meeting))
            for source, form in meeting.gradients(grad, x, layout):
                (name,) = source.names
                gradients.setdefault(name, []).append(form)
        return gradients

    @torch.no_grad()
    def totals(self, gradients: Mapping[str, list[PerSample]]) -> Totals:
        """Their sums over samples."""
        return {
            name: total_of(forms, like_total(self.theta[name]), self.square, self.native)
            for name, forms in gradients.items()
        }
