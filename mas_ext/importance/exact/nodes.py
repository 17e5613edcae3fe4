"""Nodes of autograd's graph that note uses of parameters on the way back (tracing.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mas_ext.importance.exact.gradient_forms import Rows, Use
from mas_ext.importance.exact.layers import Fold, Layer, bias_use


class Slot(NamedTuple):
    """A parameter, or a part of one: a tensor that holds some of its elements (a slice, a view).

    A part is cut off from autograd's graph, so that what is used of it can be told from the rest; `origin` is
    what it was cut from, computed from the tensor of the slot `whole`.
    """

    name: str
    tensor: Tensor
    origin: Tensor | None = None
    whole: Slot | None = None


class Spot(NamedTuple):
    """A use of a parameter that will be noted: the how manieth of its uses, and where the samples are."""

    slot: Slot
    number: int
    fold: Fold


class Notebook(Protocol):
    """What takes the uses: a tape."""

    def note(self, spot: Spot, use: Use) -> None:
        """Take one."""

    def witnessed(self, spots: Sequence[Spot | None], grad: Tensor) -> Tensor | None:
        """The gradient to go on with; None where uses are to be noted."""


class LayerNode(torch.autograd.Function):
    """A layer whose backward notes per-sample gradients in place of forming parameter gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Notebook,
        layer: Layer,
        spots: Sequence[Spot | None],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        y = layer.forward(x, weight, bias)
        ctx.tape, ctx.layer, ctx.spots, ctx.input_dtype = tape, layer, spots, x.dtype
        # Under autocast the layer computed with a rounded x.
        rounded = x.is_floating_point() and y.dtype.itemsize < x.dtype.itemsize
        if spots[0] is None:  # its values are not needed: the model may change them in place
            x = x.new_empty(()).expand(x.shape)
        ctx.save_for_backward(x.to(y.dtype) if rounded else x, weight)
        # Autograd forbids changes in place of what is a view, as some layers' results are inside.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # checkpointed parts run again here, seen by the tape
        # What follows is ours, and need not go through the tape. Tensors with a __torch_function__ of their own
        # that means something differ from a sample alone, and take the generic way.
        with torch._C.DisableTorchFunction():
            weight_spot, bias_spot = ctx.spots
            seen = ctx.tape.witnessed(ctx.spots, grad)
            if seen is None and weight_spot is not None:
                ctx.tape.note(weight_spot, ctx.layer.weight_use(grad, x, weight_spot.fold))
            if seen is None and bias_spot is not None:
                use = bias_use(ctx.layer, grad, bias_spot.slot.tensor, bias_spot.fold)
                ctx.tape.note(bias_spot, use)
            grad = grad if seen is None else seen
            gradient = None
            if ctx.needs_input_grad[3]:
                gradient = ctx.layer.input_gradient(grad, x, weight).to(ctx.input_dtype)
        return None, None, None, gradient, None, None


class SpreadNode(torch.autograd.Function):
    """A parameter broadcast to the activations' shape."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Notebook,
        spot: Spot,
        p: Tensor,
        shape: tuple[int, ...],
        y_shape: tuple[int, ...],
    ) -> Tensor:
        ctx.tape, ctx.spot, ctx.shape = tape, spot, shape
        return p.detach().view(shape).expand(y_shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        with torch._C.DisableTorchFunction():
            if ctx.tape.witnessed([ctx.spot], grad) is None:
                g = ctx.spot.fold.spread_over(grad, ctx.shape)
                ctx.tape.note(ctx.spot, Rows(g.reshape(-1, *ctx.spot.slot.tensor.shape)))
        return None, None, None, None, None


# What uses of parameters put between a model's own nodes.
NODES = (LayerNode, SpreadNode)
