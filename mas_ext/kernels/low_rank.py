"""The penalty on low-rank updates of weights: its value and the gradients of the factors.

    E = sum_f scale_f left_f right_f - sum_g scale*_g left*_g right*_g,    value = alpha sum sum_ij W_ij E_ij^2

over weights of shape (m, n), with left (m, r) and right (r, n). With G = 2 alpha W E the gradients are
scale G right^T and scale left^T G. The kernels make E a tile at a time, in some 8 r m n operations and the
bytes of W; nothing of a weight's size is written. (EWC-LoRA, Zheng et al., ICLR 2026, has this penalty with an
m x n temporary for each layer.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_ext.kernels.backends import launch, strips
from mas_ext.kernels.dtypes import compute_dtype, finite, omega_values
from mas_ext.kernels.penalty import refuse_double_backward
from mas_ext.kernels.registry import operator

# What the compiled kernel does with gradients.
_NO_GRADIENT, _WRITE, _ADD = 0, 1, 2
_ROWS = 256  # of a weight, that plain PyTorch has at a time


class UpdateState(NamedTuple):
    """What is known of the updates of some weights. The products left right of one weight follow each other.

    omega: for each weight, shape (m, n): float32, bfloat16, codes of 8 bits (uint8), or float64 beside float64.
    unit: for each weight, the factor of its omega.
    counts: for each weight, how many of the products are its own.
    scale: the factor of each product.
    anchor_left, anchor_right, anchor_counts, anchor_scale: the products of the anchor, alike.
    alpha: 0-dim float64, the factor of all.
    native: whether the compiled kernels do the work, or plain PyTorch.
    """

    omega: Sequence[Tensor]
    unit: Sequence[float]
    counts: Sequence[int]
    scale: Sequence[float]
    anchor_left: Sequence[Tensor]
    anchor_right: Sequence[Tensor]
    anchor_counts: Sequence[int]
    anchor_scale: Sequence[float]
    alpha: Tensor
    native: bool


_STATE = (
    "Tensor[] omega, float[] unit, int[] counts, float[] scale, Tensor[] anchor_left, "
    "Tensor[] anchor_right, int[] anchor_counts, float[] anchor_scale, Tensor alpha, bool native"
)


def _plain(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    left_grad: Sequence[Tensor],
    right_grad: Sequence[Tensor],
    state: UpdateState,
) -> Tensor:
    """The value; gradients are added to those tensors that are not empty."""
    dtype = compute_dtype(left[0].dtype)
    value = torch.zeros((), dtype=torch.float64, device=state.alpha.device)
    start = old = 0
    for w, omega in enumerate(state.omega):
        own = range(start, start + state.counts[w])
        anchor = range(old, old + state.anchor_counts[w])
        start, old = own.stop, anchor.stop
        strength = state.alpha * state.unit[w]
        factor = finite(2 * strength, dtype)
        for row in range(0, len(omega), _ROWS):
            rows = slice(row, row + _ROWS)
            update = omega.new_zeros(omega[rows].shape, dtype=dtype)
            for i in own:
                update += state.scale[i] * (left[i][rows].to(dtype) @ right[i].to(dtype))
            for i in anchor:
                old_left, old_right = state.anchor_left[i][rows], state.anchor_right[i]
                update -= state.anchor_scale[i] * (old_left.to(dtype) @ old_right.to(dtype))
            half = omega_values(omega[rows], dtype) * update
            value = value + strength * (half.double() * update.double()).sum()
            for i in own if left_grad else ():
                pull = state.scale[i] * factor * half
                if left_grad[i].numel():
                    left_grad[i][rows] += pull @ right[i].to(dtype).T
                if right_grad[i].numel():
                    right_grad[i].add_(left[i][rows].to(dtype).T @ pull)
    return value.to(dtype)


def _run(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    left_grad: Sequence[Tensor],
    right_grad: Sequence[Tensor],
    mode: int,
    state: UpdateState,
) -> Tensor:
    """The value, with gradients written or added to those tensors that are not empty."""
    device, dtype = left[0].device, compute_dtype(left[0].dtype)
    scratch = torch.empty(strips(state.omega), dtype=torch.float64, device=device)
    value = torch.empty((), dtype=dtype, device=device)
    factors = (left, right, left_grad, right_grad)
    launch("low_rank", left, *factors, mode, *state[:-1], scratch, value)
    return value


def _like(factors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t, dtype=compute_dtype(t.dtype)) for t in factors]


def _value_shape(left: Sequence[Tensor], right: Sequence[Tensor], *_: Any) -> Tensor:
    return torch.empty((), dtype=compute_dtype(left[0].dtype), device=left[0].device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    left, right, *state = inputs
    ctx.count = len(left)
    ctx.dtypes = [t.dtype for t in (*left, *right)]
    lists = [isinstance(x, (list, tuple)) and all(isinstance(t, Tensor) for t in x) for x in state]
    ctx.rest = [
        [None] * len(x) if of_tensors else None for x, of_tensors in zip(state, lists, strict=True)
    ]
    ctx.save_for_backward(*output[1])


def _backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        refuse_double_backward(ctx)
    scaled = torch._foreach_mul(ctx.saved_tensors, grad_output)
    grads = [g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)]
    return grads[: ctx.count], grads[ctx.count :], *ctx.rest


@operator(
    f"(Tensor[] left, Tensor[] right, {_STATE}) -> (Tensor, Tensor[])",
    shapes=lambda left, right, state: (_value_shape(left, right), _like([*left, *right])),
    keep=_keep,
    backward=_backward,
    state=UpdateState,
)
def low_rank_with_gradients(
    left: Sequence[Tensor], right: Sequence[Tensor], state: UpdateState
) -> tuple[Tensor, list[Tensor]]:
    """The value, differentiable by the factors; and its gradients by the left and then by the right ones.

    Both in one pass, in float64 for float64 factors, else in float32: factors are much smaller than weights, so
    that keeping their gradients is cheaper than making the updates anew in the backward pass.
    """
    grads = _like([*left, *right])
    to_left, to_right = grads[: len(left)], grads[len(left) :]
    if not state.native:
        return _plain(left, right, to_left, to_right, state), grads
    return _run(left, right, to_left, to_right, _WRITE, state), grads


@operator(
    f"(Tensor[] left, Tensor[] right, {_STATE}) -> Tensor", shapes=_value_shape, state=UpdateState
)
def low_rank_value(left: Sequence[Tensor], right: Sequence[Tensor], state: UpdateState) -> Tensor:
    """The value, summed in float64; 0-dim, float64 for float64 factors, else float32."""
    if not state.native:
        return _plain(left, right, [], [], state)
    return _run(left, right, [], [], _NO_GRADIENT, state)


@operator(
    f"(Tensor[] left, Tensor[] right, Tensor(a!)[] left_grad, Tensor(b!)[] right_grad, {_STATE}) -> Tensor",
    shapes=_value_shape,
    state=UpdateState,
)
def low_rank_add_grad_(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    left_grad: Sequence[Tensor],
    right_grad: Sequence[Tensor],
    state: UpdateState,
) -> Tensor:
    """Add the gradients to tensors like the factors, of which an empty one wants none; returns the value."""
    if state.native:
        value = _run(left, right, left_grad, right_grad, _ADD, state)
        torch.autograd.graph.increment_version([*left_grad, *right_grad])
        return value
    to_left, to_right = _like(left_grad), _like(right_grad)
    value = _plain(left, right, to_left, to_right, state)
    for g, added in zip([*left_grad, *right_grad], [*to_left, *to_right], strict=True):
        g.copy_(g.to(added.dtype) + added)
    return value
