"""One task's importance into the merged state, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mas_ext.kernels.backends import launch, scratch_for
from mas_ext.kernels.dtypes import compute_dtype, finite, omega_values, round_stochastically
from mas_ext.kernels.flat_state import CHANGED_STATE, State, flat_view
from mas_ext.kernels.order import in_order
from mas_ext.kernels.registry import operator


def merge_omega_(
    omega: Tensor,
    importance: Tensor,
    keep: float,
    gain: float,
    entry: int,
    shift: int,
    native: bool,
) -> None:
    """W' = max(0, keep W + gain Omega_t) of one tensor alone.

    omega: a row of a state, or a part of one, of as many elements, which lie in its order.
    importance: dense, and no one else's.
    entry, shift: what rounding is seeded by, as in merge_.
    """
    one = torch.ones(1, dtype=torch.float64, device=omega.device)
    # The kernel leaves the anchor as it is; the importance has that one's size and dtype.
    size = importance.numel()
    anchor = importance.as_strided((1, size), (size, 1))
    state = State([0], omega.view(1, size), anchor, one, one[0], native)
    merge_(state, [importance], [importance], keep, gain, False, entry, shift)


@operator(
    f"({CHANGED_STATE}, Tensor[] theta, Tensor[] importance, float keep, float gain, bool moves_anchor, "
    "int entry, int shift=0) -> Tensor",
    shapes=lambda state, theta, *_: state.omega.new_empty(len(theta), dtype=torch.float64),
)
def merge_(
    state: State,
    theta: Sequence[Tensor],
    importance: Sequence[Tensor],
    keep: float,
    gain: float,
    moves_anchor: bool,
    entry: int,
    shift: int = 0,
) -> Tensor:
    """One task into omega and anchor of a state of one row: W' = max(0, keep W + gain Omega_t).

    Where `moves_anchor`, A' = A + w / W' (theta - A) with w = gain Omega_t, and theta where keep W is 0.
    Returns, for each tensor, what comes to keep times the remainder: sum keep W w / W' (theta - A)^2, 0 where
    the anchor stays, as a float64 tensor of shape (tensors,).
    bfloat16 and uint8 omegas are rounded stochastically by a hash of (shift + index in the row,
    entry).
    """
    if not state.native:
        added = torch.zeros(len(theta), dtype=torch.float64, device=state.omega.device)
        for i, (x, new, offset) in enumerate(zip(theta, importance, state.offsets, strict=True)):
            dtype = compute_dtype(x.dtype)
            w = finite(torch.tensor(gain, dtype=torch.float64, device=x.device), dtype) * new
            omega, anchor = (flat_view(t[0], offset, x) for t in (state.omega, state.anchor))
            kept = torch.tensor(keep, dtype=dtype, device=x.device) * omega_values(omega, dtype)
            total = (kept + w).clamp(min=0)
            if moves_anchor:
                share = torch.where((kept > 0) & (total > 0), w / total, torch.ones_like(w))
                old = anchor.to(dtype)
                distance = x.to(dtype) - old
                pull = kept * share * distance
                added[i] = (pull.double() * distance.double()).sum()
                anchor.copy_(torch.where(kept > 0, old + share * distance, x.to(dtype)))
            index = torch.arange(offset, offset + x.numel(), device=x.device) + shift
            index = flat_view(index, 0, x)
            omega.copy_(round_stochastically(total, omega.dtype, index, entry))
        return added
    scratch = scratch_for(theta)
    # alpha and the remainder are not read; they may lie on another device.
    one = torch.ones(1, dtype=torch.float64, device=scratch.device)
    whole = state._replace(alpha=one, remainder=one[0])
    remainder = torch.empty(len(theta), dtype=torch.float64, device=scratch.device)
    rule = (keep, gain, moves_anchor, entry, shift)
    run = partial(launch, "merge", theta, whole, theta)
    in_order(theta, [importance], [], lambda new: run(new, *rule, scratch, remainder))
    torch.autograd.graph.increment_version([state.omega, state.anchor])
    return remainder
