"""The penalty sum_t alpha_t sum_i Omega_ti (theta_i - A_ti)^2 + alpha_0 r: its value and its gradient.

Of float32 parameters the value reads 12 bytes each, value and new gradient move 16, adding to a gradient 20.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mas_ext.kernels.backends import launch
from mas_ext.kernels.checks import (
    Checked,
    check_like,
    check_scalar,
    check_state,
    check_tensors,
    copy_back,
)
from mas_ext.kernels.dtypes import compute_dtype, finite
from mas_ext.kernels.flat_state import STATE, State
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


def _launch(
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    mode: int,
    state: State,
    known: Checked,
    grad_output: Tensor | None = None,
) -> Tensor:
    compiled = check_state(known, state)
    value = torch.empty((), dtype=compute_dtype(known.dtype), device=known.device)
    partial = torch.empty(known.compiled.chunks, dtype=torch.float64, device=known.device)
    upstream = 0 if grad_output is None else grad_output
    outputs = (partial, value, value.dtype)
    launch("penalty", known.device, known.compiled, compiled, theta, grad, mode, upstream, *outputs)
    return value


def _value_shape(theta: Sequence[Tensor], state: State) -> Tensor:
    return state.alpha.new_empty((), dtype=compute_dtype(theta[0].dtype))


def refuse_double_backward(ctx: Any, *grads: Any) -> None:
    """Raise: the gradient is a constant of the graph."""
    raise NotImplementedError(
        "the penalty's gradient can't be differentiated again: call backward without create_graph"
    )


@operator(
    f"(Tensor[] theta, {STATE}, Tensor grad_output) -> (Tensor, Tensor[])",
    shapes=lambda theta, state, _: (
        _value_shape(theta, state),
        [torch.empty_like(t) for t in theta],
    ),
    backward=refuse_double_backward,
)
def penalty_with_grad(
    theta: Sequence[Tensor], state: State, grad_output: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The value, and grad_output * sum_t 2 alpha_t Omega_t (theta - A_t) in new tensors like theta."""
    upstream = grad_output.double()
    if not state.native:
        value = _value(theta, state)
        found = gradients(theta, state, upstream)
        return value, [torch.empty_like(x).copy_(g) for x, g in zip(theta, found, strict=True)]
    known = check_tensors("theta", theta, state.offsets)
    check_scalar("grad_output", upstream, known.device)
    grad = [torch.empty_like(t) for t in theta]
    return _launch(theta, grad, _WRITE, state, known, upstream), grad


def keep_for_backward(ctx: Any, theta: Sequence[Tensor], state: State) -> None:
    """Save what the gradient is computed from."""
    ctx.offsets, ctx.native = state.offsets, state.native
    ctx.save_for_backward(state.omega, state.anchor, state.alpha, state.remainder, *theta)


def kept_for_backward(ctx: Any) -> tuple[list[Tensor], State]:
    """The theta and state that were saved."""
    omega, anchor, alpha, remainder, *theta = ctx.saved_tensors
    return theta, State(ctx.offsets, omega, anchor, alpha, remainder, ctx.native)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    theta, *state = inputs
    keep_for_backward(ctx, theta, State(*state))


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    _, grad = penalty_with_grad(*kept_for_backward(ctx), grad_output)
    return grad, *[None] * len(State._fields)


@operator(
    f"(Tensor[] theta, {STATE}) -> Tensor", shapes=_value_shape, keep=_keep, backward=_backward
)
def penalty(theta: Sequence[Tensor], state: State) -> Tensor:
    """sum_t alpha_t sum_i Omega_ti (theta_i - A_ti)^2 + alpha_0 r, summed in float64; differentiable by theta.

    Returns a 0-dim tensor, float64 for float64 parameters, else float32.
    """
    if not state.native:
        return _value(theta, state)
    known = check_tensors("theta", theta, state.offsets)
    return _launch(theta, [], _NO_GRADIENT, state, known)


@operator(
    f"(Tensor[] theta, Tensor(a!)[] grad, {STATE}) -> Tensor",
    shapes=lambda theta, _, state: _value_shape(theta, state),
)
def add_grad_(theta: Sequence[Tensor], grad: Sequence[Tensor], state: State) -> Tensor:
    """grad += sum_t 2 alpha_t Omega_t (theta - A_t); returns the value."""
    if not state.native:
        value = _value(theta, state)
        for g, added in zip(grad, gradients(theta, state), strict=True):
            g.copy_(g.to(added.dtype) + added)
        return value
    known = check_tensors("theta", theta, state.offsets)
    written = check_like("grad", grad, known, known.dtype)
    value = _launch(theta, written, _ADD, state, known)
    copy_back(grad, written)
    return value
