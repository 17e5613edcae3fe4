"""The operators of a penalty whose state lies in the CPU's memory: block after block of it comes to the device.

Same arguments as in kernels/ops.py, but omega and anchor lie on the CPU, in pinned memory where the parameters
are on a GPU. Two buffers take turns: while the kernels work on one block of the state, a stream of its own
fetches the next, and the host waits for neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from mas_ext.kernels import ops

# Elements of a block, a multiple of the state's alignment: 64 MiB in two buffers of float32 omega and anchor.
BLOCK = 1 << 22


class _Piece(NamedTuple):
    """Elements [begin, end) of a tensor in its memory order, whose state starts at `offset`."""

    tensor: int
    begin: int
    end: int
    offset: int


class _Block(NamedTuple):
    """Some pieces with their state: views of a buffer, and where in them each piece's part starts."""

    pieces: list[_Piece]
    offsets: list[int]
    omega: Tensor
    anchor: Tensor

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The pieces of these tensors, as flat views."""
        return [
            t.as_strided((p.end - p.begin,), (1,), t.storage_offset() + p.begin)
            for p in self.pieces
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


class _Beside:
    """A stream beside the current one; on a CPU there is only one order of things."""

    def __init__(self, device: torch.device) -> None:
        self._streams = (
            (torch.cuda.current_stream(device), torch.cuda.Stream(device))
            if device.type == "cuda"
            else None
        )

    def after_current(self) -> AbstractContextManager[Any]:
        """What is done within comes after what the current stream was given so far."""
        if self._streams is None:
            return nullcontext()
        current, beside = self._streams
        beside.wait_stream(current)
        return torch.cuda.stream(beside)

    def join(self) -> None:
        """What the current stream is given from now on comes after what was done beside it."""
        if self._streams is not None:
            current, beside = self._streams
            current.wait_stream(beside)


def _blocks(
    theta: Sequence[Tensor], offsets: Sequence[int], omega: Tensor, anchor: Tensor
) -> Iterator[_Block]:
    """Every block when it has come, while the next one is on its way."""
    cut = _cut(theta, offsets)
    if not cut:
        return
    device = theta[0].device
    width = max(pieces[-1].offset - pieces[0].offset + _size(pieces[-1]) for pieces in cut)
    buffers = [
        [torch.empty(len(flat), width, dtype=flat.dtype, device=device) for flat in (omega, anchor)]
        for _ in cut[:2]
    ]
    beside = _Beside(device)

    def fetch(k: int) -> None:
        start, stop = cut[k][0].offset, cut[k][-1].offset + _size(cut[k][-1])
        with beside.after_current():
            for buffer, flat in zip(buffers[k % 2], (omega, anchor), strict=True):
                for to, row in zip(buffer, flat, strict=True):
                    to[: stop - start].copy_(row[start:stop], non_blocking=True)

    fetch(0)
    try:
        for k, pieces in enumerate(cut):
            beside.join()
            if k + 1 < len(cut):
                fetch(k + 1)
            start = pieces[0].offset
            yield _Block(pieces, [p.offset - start for p in pieces], *buffers[k % 2])
    finally:
        beside.join()  # buffers are given back to the current stream


def _size(piece: _Piece) -> int:
    return piece.end - piece.begin


def _total(
    values: Sequence[Tensor], alpha: Tensor, remainder: Tensor, dtype: torch.dtype
) -> Tensor:
    total = alpha[0] * remainder
    for value in values:
        total = total + value.double()
    return total.to(dtype)


class _Penalty(torch.autograd.Function):
    """The value, and its gradient by theta."""

    @staticmethod
    def forward(
        ctx: Any,
        offsets: Sequence[int],
        omega: Tensor,
        anchor: Tensor,
        alpha: Tensor,
        remainder: Tensor,
        native: bool,
        *theta: Tensor,
    ) -> Tensor:
        """sum_t alpha_t sum_i Omega_ti (theta_i - A_ti)^2 + alpha_0 remainder."""
        ctx.offsets, ctx.native = offsets, native
        ctx.save_for_backward(omega, anchor, alpha, remainder, *theta)
        nothing = torch.zeros_like(remainder)
        values = [
            ops.penalty(b.of(theta), b.offsets, b.omega, b.anchor, alpha, nothing, native)
            for b in _blocks(theta, offsets, omega, anchor)
        ]
        return _total(values, alpha, remainder, anchor.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """grad_output times its gradient."""
        if torch.is_grad_enabled():  # create_graph
            ops._refuse_double_backward(ctx)
        omega, anchor, alpha, remainder, *theta = ctx.saved_tensors
        grad = [torch.zeros_like(t) for t in theta]
        upstream = alpha * grad_output.double()
        add_grad_(theta, grad, ctx.offsets, omega, anchor, upstream, remainder, ctx.native)
        return (*[None] * 6, *grad)


@_disable_dynamo
def penalty(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
    native: bool,
) -> Tensor:
    """As ops.penalty, differentiable once; torch.compile leaves its graph for it."""
    value: Tensor = _Penalty.apply(  # type: ignore[no-untyped-call]
        offsets, omega, anchor, alpha, remainder, native, *theta
    )
    return value


@_disable_dynamo
def add_grad_(
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
    native: bool,
) -> Tensor:
    """As ops.add_grad_."""
    aligned = _like(grad, theta)
    nothing = torch.zeros_like(remainder)
    values = [
        ops.add_grad_(
            b.of(theta), b.of(aligned), b.offsets, b.omega, b.anchor, alpha, nothing, native
        )
        for b in _blocks(theta, offsets, omega, anchor)
    ]
    for g, a in zip(grad, aligned, strict=True):
        if g is not a:
            g.copy_(a)
    return _total(values, alpha, remainder, anchor.dtype)


@_disable_dynamo
def proximal_(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    second_moment: Sequence[Tensor],
    eta: float,
    correction: float,
    eps: float,
    native: bool,
) -> None:
    """As ops.proximal_."""
    moments = _like(second_moment, theta) if second_moment else []
    for b in _blocks(theta, offsets, omega, anchor):
        v = b.of(moments) if moments else []
        ops.proximal_(
            b.of(theta), b.offsets, b.omega, b.anchor, alpha, v, eta, correction, eps, native
        )


def _like(tensors: Sequence[Tensor], theta: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, or copies of those whose memory order is not that of their parameter."""
    return [
        t if t.stride() == x.stride() else torch.empty_like(x, dtype=t.dtype).copy_(t)
        for t, x in zip(tensors, theta, strict=True)
    ]
