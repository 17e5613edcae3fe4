"""The node of autograd's graph that reports per-sample gradients of parameters on the way back (tracing.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mas_ext.importance.exact.gradient_forms import PerSample
from mas_ext.importance.exact.layers import Layer
from mas_ext.importance.exact.sample_layout import SampleLayout


class TrackedTensor(NamedTuple):
    """A parameter, or a part of one: a tensor that holds some of its elements (a slice, a view).

    A part is cut off from autograd's graph, so that its uses can be told from the parameter's others; `origin`
    is what it was cut from, computed from the tensor of `whole`.
    """

    name: str
    tensor: Tensor
    origin: Tensor | None = None
    whole: TrackedTensor | None = None


class ParameterUse(NamedTuple):
    """A use of a parameter that will be reported: which of them, and where samples lie."""

    source: TrackedTensor
    number: int
    layout: SampleLayout


class Recorder(Protocol):
    """What nodes report to: a Tape."""

    def record(self, use: ParameterUse, gradients: PerSample) -> None:
        """Take the per-sample gradients of a use."""

    def observed(self, uses: Sequence[ParameterUse | None], grad: Tensor) -> Tensor | None:
        """The gradient to go on with; None where per-sample gradients are to be recorded."""


class LayerNode(torch.autograd.Function):
    """A layer whose backward reports per-sample gradients in place of forming parameter gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Recorder,
        layer: Layer,
        uses: Sequence[ParameterUse | None],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        y = layer.forward(x, weight, bias)
        ctx.tape, ctx.layer, ctx.uses, ctx.input_dtype = tape, layer, uses, x.dtype
        # Under autocast the layer computed with a rounded x.
        rounded = x.is_floating_point() and y.dtype.itemsize < x.dtype.itemsize
        if uses[0] is None:  # its values are not needed: the model may change them in place
            x = x.new_empty(()).expand(x.shape)
        ctx.save_for_backward(x.to(y.dtype) if rounded else x, weight)
        # Autograd forbids changes in place of what is a view, as some layers' results are inside.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # checkpointed parts run again here, seen by the tape
        # What follows is ours, and need not go through the tape. Tensors whose own __torch_function__ changes
        # results differ from single samples, and go to the fallback.
        with torch._C.DisableTorchFunction():
            weight_use, bias_use = ctx.uses
            seen = ctx.tape.observed(ctx.uses, grad)
            if seen is None and weight_use is not None:
                gradients = ctx.layer.weight_gradients(grad, x, weight_use.layout)
                ctx.tape.record(weight_use, gradients)
            if seen is None and bias_use is not None:
                bias = bias_use.source.tensor
                ctx.tape.record(bias_use, ctx.layer.bias_gradients(grad, bias, bias_use.layout))
            grad = grad if seen is None else seen
            gradient = None
            if ctx.needs_input_grad[3]:
                gradient = ctx.layer.input_gradient(grad, x, weight).to(ctx.input_dtype)
        return None, None, None, gradient, None, None
