"""Kernels on the state of a group, wherever it lies: beside the parameters, or in the CPU's memory.

An offloaded state comes to the parameters' device block by block. Two buffers take turns: while a kernel works
on one block of omega and anchor, a stream of its own fetches the next, and the host waits for neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from mas_ext.kernels.dtypes import compute_dtype
from mas_ext.kernels.flat_state import State
from mas_ext.kernels.order import aligned, copy_back
from mas_ext.kernels.penalty import (
    add_grad_alone_,
    keep_for_backward,
    kept_for_backward,
    penalty,
    refuse_double_backward,
)
from mas_ext.state.buffers import Group

# Elements of a block, a multiple of the state's alignment: 64 MiB in two buffers of float32 omega and anchor.
BLOCK = 1 << 22


def group_penalty(group: Group, theta: list[Tensor]) -> Tensor:
    """The penalty of a group's parameters, differentiable by them once."""
    return _offloaded_value(theta, group.state) if group.offloaded else penalty(theta, group.state)


def run_kernel(
    kernel: Callable[..., Any],
    group: Group,
    state: State,
    tensors: Sequence[list[Tensor]],
    *numbers: float,
) -> Any:
    """kernel(*tensors, state, *numbers), in one call or one for each block of the group's state.

    Args:
        kernel: add_grad_, add_grad_alone_ or proximal_.
        group: whose state it is.
        state: the group's, for these parameters.
        tensors: the parameters, or some of them, and lists of tensors like those.
        numbers: the kernel's other arguments.

    Returns:
        The penalty of these parameters, if the kernel computes it.
    """
    if not group.offloaded:
        return kernel(*tensors, state, *numbers)
    return _over_blocks(kernel, state, tensors, *numbers)


# Unlike torch.compiler.disable, this does not import the compiler with the package.
@_disable_dynamo
def _over_blocks(
    kernel: Callable[..., Any], state: State, tensors: Sequence[list[Tensor]], *numbers: float
) -> Tensor:
    """The kernel on every block; returns alpha_0 r and the sum of what it returns."""
    theta = tensors[0]
    strides = [x.stride() for x in theta]
    in_order = [aligned(t, strides) if t else [] for t in tensors]
    total = state.alpha[0] * state.remainder
    for pieces, block in _blocks(theta, state):
        found = kernel(*(_views(t, pieces) if t else [] for t in in_order), block, *numbers)
        total = total if found is None else total + found.double()
    for t, used in zip(tensors, in_order, strict=True):
        copy_back(t, used)
    return total.to(compute_dtype(state.anchor.dtype))


@_disable_dynamo
def _offloaded_value(theta: list[Tensor], state: State) -> Tensor:
    found: Tensor = _OffloadedValue.apply(state, *theta)  # type: ignore[no-untyped-call]
    return found


class _OffloadedValue(torch.autograd.Function):
    """The penalty, and its gradient by theta: the blocks are fetched once more on the way back."""

    @staticmethod
    def forward(ctx: Any, state: State, *theta: Tensor) -> Tensor:
        keep_for_backward(ctx, theta, state)
        return _over_blocks(penalty, state, [[*theta]])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph
            refuse_double_backward(ctx)
        theta, state = kept_for_backward(ctx)
        grad = [torch.zeros_like(t) for t in theta]
        upstream = state._replace(alpha=state.alpha * grad_output.double())
        _over_blocks(add_grad_alone_, upstream, [theta, grad])
        return None, *grad


class _Piece(NamedTuple):
    """Elements [begin, end) of a tensor in its memory order, whose state starts at `offset`."""

    tensor: int
    begin: int
    end: int
    offset: int


def _views(tensors: Sequence[Tensor], pieces: Sequence[_Piece]) -> list[Tensor]:
    """The pieces of these tensors, as flat views."""
    return [
        t.as_strided((p.end - p.begin,), (1,), t.storage_offset() + p.begin)
        for p in pieces
        for t in (tensors[p.tensor],)
    ]


def _cut(theta: Sequence[Tensor], offsets: Sequence[int]) -> list[list[_Piece]]:
    """The tensors in pieces, together as long as their state spans at most a block."""
    blocks: list[list[_Piece]] = []
    full = 0  # where the last block's state ends
    for i in sorted(range(len(theta)), key=offsets.__getitem__):
        begin, count = 0, theta[i].numel()
        while begin < count:
            offset = offsets[i] + begin
            if offset >= full:
                blocks.append([])
                full = offset + BLOCK
            end = min(count, begin + full - offset)
            blocks[-1].append(_Piece(i, begin, end, offset))
            begin = end
    return blocks


def _blocks(theta: Sequence[Tensor], state: State) -> Iterator[tuple[list[_Piece], State]]:
    """Every block when it has come, while the next one is on its way."""
    cut = _cut(theta, state.offsets)
    if not cut:
        return
    device, stored = theta[0].device, (state.omega, state.anchor)
    spans = [(p[0].offset, p[-1].offset + p[-1].end - p[-1].begin) for p in cut]
    width = max(stop - start for start, stop in spans)
    buffers = [
        [torch.empty(len(flat), width, dtype=flat.dtype, device=device) for flat in stored]
        for _ in cut[:2]
    ]
    nothing = torch.zeros_like(state.remainder)
    gpu = device.type == "cuda"  # a CPU does one thing after the other
    current: Any = torch.cuda.current_stream(device) if gpu else None
    side: Any = torch.cuda.Stream(device) if gpu else None

    def fetch(k: int) -> None:
        start, stop = spans[k]
        if gpu:
            side.wait_stream(current)
        with torch.cuda.stream(side) if gpu else nullcontext():
            for buffer, flat in zip(buffers[k % 2], stored, strict=True):
                for to, row in zip(buffer, flat, strict=True):
                    to[: stop - start].copy_(row[start:stop], non_blocking=True)

    def wait() -> None:
        if gpu:
            current.wait_stream(side)

    fetch(0)
    try:
        for k, pieces in enumerate(cut):
            wait()
            if k + 1 < len(cut):
                fetch(k + 1)
            offsets = [p.offset - spans[k][0] for p in pieces]
            omega, anchor = buffers[k % 2]
            yield pieces, State(offsets, omega, anchor, state.alpha, nothing, state.native)
    finally:
        wait()  # buffers are given back to the current stream
