"""The penalty sum_t alpha_t sum_i Omega_ti (theta_i - A_ti)^2 + alpha_0 r: its value and its gradient.

Of float32 parameters the value reads 12 bytes each, a new gradient moves 16, adding to a gradient 20.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mas_ext.kernels.backends import launch, scratch_for
from mas_ext.kernels.dtypes import compute_dtype, finite
from mas_ext.kernels.flat_state import STATE, State
from mas_ext.kernels.order import in_order
from mas_ext.kernels.registry import operator

# What the compiled kernel does with the gradient.
_NO_GRADIENT, _WRITE, _ADD = 0, 1, 2


def _value(theta: Sequence[Tensor], state: State) -> Tensor:
    value = state.alpha[0] * state.remainder
    for i, x in enumerate(theta):
        for alpha, (omega, anchor) in zip(state.alpha, state.rows(i, x), strict=True):
            distance = x.to(omega.dtype) - anchor
            value = value + alpha * ((omega * distance).double() * distance.double()).sum()
    return value.to(compute_dtype(state.anchor.dtype))


def gradients(
    theta: Sequence[Tensor], state: State, grad_output: Tensor | float = 1.0
) -> Iterator[Tensor]:
    """grad_output * sum_t 2 alpha_t Omega_t (theta - A_t), tensor by tensor, in plain PyTorch."""
    for i, x in enumerate(theta):
        gradient = torch.zeros_like(x, dtype=compute_dtype(x.dtype))
        for alpha, (omega, anchor) in zip(state.alpha, state.rows(i, x), strict=True):
            pull = omega * (x.to(omega.dtype) - anchor)
            gradient += finite(2 * alpha * grad_output, pull.dtype) * pull
        yield gradient


def _launch(theta: Sequence[Tensor], grad: Sequence[Tensor], mode: int, state: State) -> Tensor:
    """The value; with the gradient added, if it is asked for."""
    scratch = scratch_for(theta)
    value = torch.empty((), dtype=compute_dtype(theta[0].dtype), device=theta[0].device)
    launch("penalty", theta, theta, grad, mode, state, None, scratch, value)
    return value


def _value_shape(theta: Sequence[Tensor], state: State) -> Tensor:
    return state.alpha.new_empty((), dtype=compute_dtype(theta[0].dtype))


def refuse_double_backward(ctx: Any, *grads: Any) -> None:
    """Raise: the gradient is a constant of the graph."""
    raise NotImplementedError(
        "the penalty's gradient can't be differentiated again: call backward without create_graph"
    )


@operator(
    f"(Tensor[] theta, {STATE}, Tensor grad_output) -> Tensor[]",
    shapes=lambda theta, state, _: [torch.empty_like(t) for t in theta],
    backward=refuse_double_backward,
)
def penalty_gradient(theta: Sequence[Tensor], state: State, grad_output: Tensor) -> list[Tensor]:
    """grad_output * sum_t 2 alpha_t Omega_t (theta - A_t) in new tensors like theta."""
    upstream = grad_output.double()
    grad = [torch.empty_like(t) for t in theta]
    if state.native:
        launch("penalty", theta, theta, grad, _WRITE, state, upstream, None, None)
        return grad
    found = gradients(theta, state, upstream)
    return [g.copy_(new) for g, new in zip(grad, found, strict=True)]


def keep_for_backward(ctx: Any, theta: Sequence[Tensor], state: State) -> None:
    """Save what the gradient is computed from."""
    ctx.offsets, ctx.native = state.offsets, state.native
    ctx.save_for_backward(state.omega, state.anchor, state.alpha, state.remainder, *theta)


def kept_for_backward(ctx: Any) -> tuple[list[Tensor], State]:
    """The theta and state that were saved."""
    omega, anchor, alpha, remainder, *theta = ctx.saved_tensors
    return theta, State(ctx.offsets, omega, anchor, alpha, remainder, ctx.native)


class _Penalty(torch.autograd.Function):
    """The penalty of eager code: by autograd's own Function, which costs less than an operator's lists."""

    @staticmethod
    def forward(ctx: Any, state: State, *theta: Tensor) -> Tensor:
        keep_for_backward(ctx, theta, state)
        return penalty(theta, state)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return None, *penalty_gradient(*kept_for_backward(ctx), grad_output)


def _differentiable(theta: Sequence[Tensor], state: State) -> Tensor:
    found: Tensor = _Penalty.apply(state, *theta)  # type: ignore[no-untyped-call]
    return found


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    theta, *state = inputs
    keep_for_backward(ctx, theta, State(*state))


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    grad = penalty_gradient(*kept_for_backward(ctx), grad_output)
    return grad, *[None] * len(State._fields)


@operator(
    f"(Tensor[] theta, {STATE}) -> Tensor",
    shapes=_value_shape,
    keep=_keep,
    backward=_backward,
    differentiable=_differentiable,
)
def penalty(theta: Sequence[Tensor], state: State) -> Tensor:
    """sum_t alpha_t sum_i Omega_ti (theta_i - A_ti)^2 + alpha_0 r, summed in float64; differentiable by theta.

    Returns a 0-dim tensor, float64 for float64 parameters, else float32.
    """
    if not state.native:
        return _value(theta, state)
    return _launch(theta, [], _NO_GRADIENT, state)


@operator(
    f"(Tensor[] theta, Tensor(a!)[] grad, {STATE}) -> Tensor",
    shapes=lambda theta, _, state: _value_shape(theta, state),
)
def add_grad_(theta: Sequence[Tensor], grad: Sequence[Tensor], state: State) -> Tensor:
    """grad += sum_t 2 alpha_t Omega_t (theta - A_t); returns the value."""
    if not state.native:
        value = _value(theta, state)
        _add(grad, gradients(theta, state))
        return value
    value = in_order(theta, [], [grad], lambda g: _launch(theta, g, _ADD, state))
    torch.autograd.graph.increment_version(grad)
    return value


@operator(f"(Tensor[] theta, Tensor(a!)[] grad, {STATE}) -> ()")
def add_grad_alone_(theta: Sequence[Tensor], grad: Sequence[Tensor], state: State) -> None:
    """grad += sum_t 2 alpha_t Omega_t (theta - A_t), where nobody reads the value."""
    if not state.native:
        _add(grad, gradients(theta, state))
        return
    launched = partial(launch, "penalty", theta, theta)
    in_order(theta, [], [grad], lambda g: launched(g, _ADD, state, None, None, None))
    torch.autograd.graph.increment_version(grad)


def _add(grad: Sequence[Tensor], gradients: Iterator[Tensor]) -> None:
    for g, added in zip(grad, gradients, strict=True):
        g.copy_(g.to(added.dtype) + added)
