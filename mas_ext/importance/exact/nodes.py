"""The node of autograd's graph that reports per-sample gradients of parameters on the way back (tracing.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mas_ext.importance.exact.gradient_forms import PerSample
from mas_ext.importance.exact.layers import Layer
from mas_ext.importance.exact.sample_layout import SampleLayout


@dataclass(eq=False)
class GradientSource:
    """A parameter, or a tensor that is derived from parameters: what per-sample gradients are found of.

    names: of the parameters. leaf: the tensor, cut off from autograd's graph if it is derived. meetings: how
    many there are; forms: the gradients from those that were passed on the way back.
    """

    names: frozenset[str]
    tensor: Tensor
    leaf: Tensor
    meetings: int = 0
    forms: list[PerSample] = field(default_factory=list)


@dataclass(eq=False)
class Meeting:
    """A call of a layer in which weight or bias is a source, and x is data.

    optional: the function and the shapes that went in, where none of them was data, so that the call could
    have been left to torch; else None.
    """

    optional: Any
    layer: Layer
    weight: GradientSource | None
    bias: GradientSource | None

    @property
    def names(self) -> frozenset[str]:
        """The parameters behind weight and bias."""
        return frozenset[str]().union(*(source.names for source in self.sources))

    @property
    def sources(self) -> list[GradientSource]:
        """Weight and bias, where they are sources."""
        return [source for source in (self.weight, self.bias) if source is not None]

    @property
    def is_derived(self) -> bool:
        """Whether weight or bias is no parameter itself."""
        return any(source.leaf is not source.tensor for source in self.sources)

    def gradients(
        self, grad: Tensor, x: Tensor, layout: SampleLayout
    ) -> Iterator[tuple[GradientSource, PerSample]]:
        """The per-sample gradients of weight and bias, from the gradient of the layer's result."""
        if self.weight is not None:
            yield self.weight, self.layer.weight_gradients(grad, x, layout)
        if self.bias is not None:
            yield self.bias, self.layer.bias_gradients(grad, self.bias.leaf, layout)


class Recorder(Protocol):
    """What nodes report to: a Tape.

    random: whether the numbers of this backward pass are, so that only which rows are made of which counts.
    """

    random: bool

    def layout_of(self, meeting: Meeting, grad: Tensor) -> SampleLayout | None:
        """Where samples lie in a meeting's result; None where its gradients are not asked for."""

    def seen(self, meeting: Meeting, grad: Tensor) -> Tensor:
        """The gradient of a meeting's result to go on with."""

    def record(self, source: GradientSource, gradients: PerSample) -> None:
        """Take a source's per-sample gradients from one meeting."""


class LayerNode(torch.autograd.Function):
    """A layer whose backward reports per-sample gradients in place of forming parameter gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Recorder,
        meeting: Meeting,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        y = meeting.layer.forward(x, weight, bias)
        ctx.tape, ctx.meeting = tape, meeting
        # Under autocast the layer computed with a rounded x.
        rounded = x.is_floating_point() and y.dtype.itemsize < x.dtype.itemsize
        if (
            meeting.weight is None and not meeting.layer.recurs
        ):  # not needed: the model may change it in place
            x = x.new_empty(()).expand(x.shape)
        more = (bias, y) if meeting.layer.recurs else ()
        ctx.save_for_backward(x.to(y.dtype) if rounded else x, weight, *more)
        # Autograd forbids changes in place of what is a view, as some layers' results are inside.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *more = ctx.saved_tensors  # checkpointed parts run again here, seen by the tape
        tape, meeting = ctx.tape, ctx.meeting
        # What follows is ours, and need not go through the tape. Tensors whose own __torch_function__ changes
        # results differ from single samples, and go to the fallback.
        with torch._C.DisableTorchFunction():
            grad = tape.seen(meeting, grad)
            gradient = None
            if meeting.layer.recurs:
                x, weight, *more = (
                    t if t is None else t.to(grad.dtype) for t in (x, weight, *more)
                )
                if tape.random:
                    grad, gradient = meeting.layer.backward_of_rows(grad, x, weight)
                else:
                    grad, x, gradient = meeting.layer.backward(grad, x, weight, *more)
                tape.seen(meeting, grad)
            elif ctx.needs_input_grad[2]:
                gradient = meeting.layer.input_gradient(grad, x, weight)
            layout = tape.layout_of(meeting, grad)
            if layout is not None:
                for source, gradients in meeting.gradients(grad, x, layout):
                    tape.record(source, gradients)
        return None, None, gradient, None, None  # autograd gives it the dtype of x
