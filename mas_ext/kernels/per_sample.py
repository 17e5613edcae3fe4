"""Exact per-sample importance of one use of a weight: omega += sum_b abs(M_b), or its square.

M_b, the weight's gradient of sample b, never reaches memory where the kernel is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mas_ext.kernels.backends import launch
from mas_ext.kernels.registry import operator

# A small omega is no work for a whole machine: the batch is then split, and each part summed into a
# tensor of its own. Splits depend on shapes alone, so that the number of threads changes no bit.
_ELEMENTS_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 22}
# Fewer in a part are not worth its tensor: samples on a CPU, samples times positions on a GPU.
_SAMPLES_A_SPLIT = 4
_POSITIONS_A_SPLIT = 256


class _Seen(NamedTuple):
    """A table of rows that was looked at, as it was then."""

    version: int
    address: int
    least: int
    greatest: int


_seen = WeakTensorKeyDictionary()


def _range(rows: Tensor) -> tuple[int, int]:
    """The least and the greatest row; kept, because looking waits for the device."""
    if rows.numel() == 0:
        return 0, -1
    if rows.is_inference():  # has no version that would tell of a change
        least, greatest = rows.aminmax()
        return int(least), int(greatest)
    seen: _Seen | None = _seen.get(rows)
    if seen is None or (seen.version, seen.address) != (rows._version, rows.data_ptr()):
        least, greatest = rows.aminmax()
        seen = _Seen(rows._version, rows.data_ptr(), int(least), int(greatest))
        _seen[rows] = seen
    return seen.least, seen.greatest


def _splits(device: str, size: int, batch: int, positions: int) -> int:
    wanted = -(-_ELEMENTS_AT_ONCE[device] // size)
    if device == "cuda":
        return max(1, min(wanted, batch, batch * positions // _POSITIONS_A_SPLIT))
    return max(1, min(wanted, batch // _SAMPLES_A_SPLIT))


# Temporary tensors of the plain version, in bytes, unless a single sample needs more.
_TEMPORARY = 64 << 20


def _plain(omega: Tensor, grad: Tensor, input: Tensor, rows: Tensor | None, square: bool) -> None:
    groups, outputs, taps, channels = omega.shape
    batch, positions = grad.shape[:2]
    if positions == 1 and rows is None:  # |g^T x| = |g|^T |x|: one product of matrices
        g, x = (t[:, 0].to(omega.dtype) for t in (grad, input))
        g, x = (t.square() if square else t.abs() for t in (g, x))
        g, x = g.view(batch, groups, outputs), x.view(batch, groups, channels)
        omega[:, :, 0].baddbmm_(g.permute(1, 2, 0), x.transpose(0, 1))
        return
    # The operands take memory twice: gathered, and as bmm wants them.
    operands = positions * groups * (outputs + taps * channels) + input[:1].numel()
    size = (2 * operands + 2 * omega.numel()) * omega.element_size()
    step = max(1, _TEMPORARY // max(size, 1))
    for start in range(0, batch, step):
        g = grad[start : start + step].to(omega.dtype)
        x = input[start : start + step].to(omega.dtype)
        if rows is not None:
            x = torch.cat([x, x.new_zeros(len(x), 1, x.shape[2])], 1)
            x = x.index_select(1, rows.remainder(x.shape[1]).flatten())
        g = g.reshape(len(g), positions, groups, outputs)
        x = x.reshape(len(x), taps, positions, groups, channels)
        m = torch.einsum("bpgo,btpgc->bgotc", g, x)
        omega += (m.square_() if square else m.abs_()).sum(0)


@operator(
    "(Tensor(a!) omega, Tensor grad, Tensor input, Tensor? rows, bool square, bool native) -> ()"
)
def per_sample_(
    omega: Tensor, grad: Tensor, input: Tensor, rows: Tensor | None, square: bool, native: bool
) -> None:
    """One use of a weight by B samples: omega += sum_b abs(M_b), or of its square, M_b the gradient of b.

    M_b[g, o, t, c] = sum_p grad[b, p, g * outputs + o] * input[b, rows[t, p], g * channels + c], where a
    row of -1 counts as zeros, and position p sees row p if `rows` is None (with one tap). omega: (groups,
    outputs, taps, channels), float64 for float64 operands, else float32; grad: (B, P, groups * outputs);
    input: (B, R, groups * channels); rows: (taps, P).

    A table of rows is looked at once: keep it, rather than a new one for each call.
    """
    if not native:
        _plain(omega, grad, input, rows, square)
        return
    batch, positions = grad.shape[:2]
    one_position = positions == 1 and rows is None
    if one_position and grad.device.type == "cuda":
        _plain(omega, grad, input, rows, square)  # one product of matrices
        return
    size = omega.numel()
    splits = 1 if one_position or size == 0 else _splits(grad.device.type, size, batch, positions)
    partial = omega.new_zeros(splits * size if splits > 1 else 0)
    # On a CPU the kernel itself looks at the table.
    seen = _range(rows) if rows is not None and rows.is_cuda else (0, -1)
    launch("per_sample", [grad], omega, grad, input, rows, seen, partial, splits, square)
    torch.autograd.graph.increment_version(omega)
