"""The kernels in plain PyTorch: the specification of the compiled ones, and the fallback.

Shapes, for every function: `theta` is a list of dense tensors; tensor i of n_i elements owns the elements
[offsets[i], offsets[i] + n_i) of each row of the flat state, in its own memory order. `omega` and
`anchor` have shape (rows, total), one row per task kept apart (one row in all when tasks are merged),
`alpha` shape (rows,) in float64, `remainder` is a float64 scalar. An `omega` of dtype uint8 holds codes, see
`decode`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LARGEST_PULL = 1e30


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the arithmetic on a parameter of `dtype` is done."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def part(flat: Tensor, row: int, offset: int, like: Tensor) -> Tensor:
    """The part of one row that belongs to a tensor, as a view with that tensor's shape and strides."""
    start = flat.storage_offset() + row * flat.stride(0) + offset
    return flat.as_strided(like.shape, like.stride(), start)


def decode(code: Tensor) -> Tensor:
    """What 8 bits mean, as float32: 0, or (1 + m / 8) 2^(e - 15) with 5 bits of e above 3 of m."""
    bits = (code.to(torch.int32) << _CUT) + _LOWEST
    return torch.where(code == 0, torch.zeros_like(bits), bits).view(torch.float32)


def encode(x: Tensor) -> Tensor:
    """The codes nearest to x >= 0; what is too large, or NaN, is the largest."""
    half = torch.full_like(x, 1 << (_CUT - 1), dtype=torch.int64)
    return _coded(x, half, torch.full_like(x, 0.5, dtype=torch.float32))


LARGEST_CODED = 1.875 * 2.0**16
_CUT = 20  # bits of a float32 that a code lacks
_LOWEST = 112 << 23  # the float32 2^-15, which would be code 0
_LEAST = 1.125 * 2.0**-15


def _coded(x: Tensor, added: Tensor, share: Tensor) -> Tensor:
    """Codes of x, rounded up by adding to the bits to cut off; below the least by a share of that."""
    low = x.float()
    bits = low.contiguous().view(torch.int32).to(torch.int64)
    code = ((bits - _LOWEST + added) >> _CUT).clamp(0, 255)
    return torch.where(low < _LEAST, share * _LEAST < low, code).to(torch.uint8)


def _values(omega: Tensor, dtype: torch.dtype) -> Tensor:
    return (decode(omega) if omega.dtype == torch.uint8 else omega).to(dtype)


def _factor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A scalar as `dtype`, kept finite so that a huge lam times a zero pull is zero and not NaN."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def _pulls(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For each tensor and row: Omega (theta - A), and theta - A."""
    for x, offset in zip(theta, offsets, strict=True):
        dtype = compute_dtype(x.dtype)
        rows = []
        for row in range(omega.shape[0]):
            distance = x.to(dtype) - part(anchor, row, offset, x)
            w = _values(part(omega, row, offset, x), dtype)
            rows.append((w * distance, distance))
        yield rows


def _value(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
) -> Tensor:
    value = alpha[0] * remainder
    for rows in _pulls(theta, offsets, omega, anchor):
        for row, (half, distance) in enumerate(rows):
            value = value + alpha[row] * (half.double() * distance.double()).sum()
    return value.to(compute_dtype(anchor.dtype))


def _gradients(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    grad_output: Tensor | float,
) -> Iterator[Tensor]:
    for rows in _pulls(theta, offsets, omega, anchor):
        gradient = torch.zeros_like(rows[0][0])
        for row, (half, _) in enumerate(rows):
            gradient += _factor(2 * alpha[row] * grad_output, half.dtype) * half
        yield gradient


def penalty(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
) -> Tensor:
    """sum_t alpha_t sum_i Omega_ti (theta_i - A_ti)^2 + alpha_0 remainder, summed in float64.

    Returns a 0-dim tensor, float64 for float64 parameters, else float32.
    """
    return _value(theta, offsets, omega, anchor, alpha, remainder)


def penalty_with_grad(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """The value, and grad_output * sum_t 2 alpha_t Omega_t (theta - A_t) in new tensors like theta."""
    value = _value(theta, offsets, omega, anchor, alpha, remainder)
    gradients = _gradients(theta, offsets, omega, anchor, alpha, grad_output.double())
    return value, [torch.empty_like(x).copy_(g) for x, g in zip(theta, gradients, strict=True)]


def add_grad_(
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
) -> Tensor:
    """grad += sum_t 2 alpha_t Omega_t (theta - A_t); returns the value."""
    value = _value(theta, offsets, omega, anchor, alpha, remainder)
    for g, added in zip(grad, _gradients(theta, offsets, omega, anchor, alpha, 1.0), strict=True):
        g.copy_(g.to(added.dtype) + added)
    return value


def _approach(
    x: Tensor,
    offset: int,
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    eta: float,
    divisor: Tensor | None,
) -> Tensor:
    """x + c / (1 + c) (A - x) with c = 2 eta W / divisor, see proximal_; x has its arithmetic's dtype."""
    largest = alpha.max().clamp(min=0)
    share = torch.where(largest > 0, alpha / largest, torch.zeros_like(alpha))
    strength = _factor(2 * eta * largest, x.dtype)
    weight, distance = torch.zeros_like(x), torch.zeros_like(x)
    for row in range(omega.shape[0]):
        task = share[row].to(x.dtype) * _values(part(omega, row, offset, x), x.dtype)
        weight = weight + task
        step = torch.where(weight > 0, task / weight, torch.zeros_like(weight))
        own = part(anchor, row, offset, x) - x
        distance = own if row == 0 else distance + step * (own - distance)
    if divisor is not None:
        strength = torch.where(strength > 0, strength / divisor, torch.zeros_like(divisor))
    product = strength * weight
    c = torch.where(product < LARGEST_PULL, product, torch.full_like(product, LARGEST_PULL))
    return x + c / (1 + c) * distance


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
) -> None:
    """theta <- theta + c / (1 + c) (A - theta) with c = 2 eta W, clamped at 1e30.

    W = sum_t alpha_t Omega_t and A the W-weighted mean of the anchors. With `second_moment` (v, one
    tensor like each parameter, as Adam keeps it) the step length is eta / (sqrt(v correction) + eps).
    """
    for i, (x, offset) in enumerate(zip(theta, offsets, strict=True)):
        dtype, divisor = compute_dtype(x.dtype), None
        if second_moment:
            v = second_moment[i].to(dtype)
            finite = min(correction, torch.finfo(dtype).max)
            root = (v * torch.tensor(finite, dtype=dtype, device=v.device)).sqrt()
            divisor = root + torch.tensor(eps, dtype=dtype, device=v.device)
        x.copy_(_approach(x.to(dtype), offset, omega, anchor, alpha, eta, divisor))


def accumulate_(omega: Sequence[Tensor], grad: Sequence[Tensor], weight: float) -> None:
    """omega += weight * abs(grad); omega is float64 for a float64 gradient, else float32."""
    for total, g in zip(omega, grad, strict=True):
        total += (
            torch.tensor(weight, dtype=total.dtype, device=total.device) * g.to(total.dtype).abs()
        )


def merge_(
    omega: Tensor,
    anchor: Tensor,
    theta: Sequence[Tensor],
    importance: Sequence[Tensor],
    offsets: Sequence[int],
    keep: float,
    gain: float,
    anchor_rule: str,
    entry: int,
) -> Tensor:
    """One task into the merged state (rows = 1): W' = max(0, keep W + gain Omega_t).

    `anchor_rule`: "mean" (keep is 1): A' = A + w / W' (theta - A) with w = gain Omega_t, and theta where
    W is 0; "move": A' = theta; "keep": A' = A. Returns, for each tensor, what the merge adds to the
    remainder: sum W w / W' (theta - A)^2 under "mean", else 0, as a float64 tensor of shape (tensors,).
    bfloat16 and uint8 omegas are rounded stochastically by a hash of (index in the row, entry).
    """
    added = torch.zeros(len(theta), dtype=torch.float64, device=omega.device)
    for i, (x, new, offset) in enumerate(zip(theta, importance, offsets, strict=True)):
        dtype = compute_dtype(x.dtype)
        w = _factor(torch.tensor(gain, dtype=torch.float64, device=x.device), dtype) * new
        old_omega, old_anchor = part(omega, 0, offset, x), part(anchor, 0, offset, x)
        old = _values(old_omega, dtype)
        total = (torch.tensor(keep, dtype=dtype, device=x.device) * old + w).clamp(min=0)
        if anchor_rule == "mean":
            held = old > 0
            share = torch.where(held & (total > 0), w / total, torch.ones_like(w))
            distance = x.to(dtype) - old_anchor
            half = old * share * distance
            added[i] = (half.double() * distance.double()).sum()
            old_anchor.copy_(torch.where(held, old_anchor + share * distance, x.to(dtype)))
        elif anchor_rule == "move":
            old_anchor.copy_(x)
        if omega.dtype in (torch.bfloat16, torch.uint8):
            index = torch.arange(omega.shape[1], device=omega.device)[None]
            h = _hash(part(index, 0, offset, x), entry)
            if omega.dtype == torch.uint8:
                total = _coded(total, h & ((1 << _CUT) - 1), (h >> 8).float() * 2.0**-24)
            else:
                total = _round_stochastically(total, h)
        old_omega.copy_(total)
    return added


# Temporary tensors of per_sample_, in bytes, unless a single sample needs more.
_TEMPORARY = 64 << 20


def per_sample_(
    omega: Tensor, grad: Tensor, input: Tensor, rows: Tensor | None, square: bool
) -> None:
    """One use of a weight by B samples: omega += sum_b abs(M_b), or of its square, M_b the gradient of b.

    M_b[g, o, t, c] = sum_p grad[b, p, g * outputs + o] * input[b, rows[t, p], g * channels + c], where a
    row of -1 counts as zeros, and position p sees row p if `rows` is None (with one tap). omega: (groups,
    outputs, taps, channels), float64 for float64 operands, else float32; grad: (B, P, groups * outputs);
    input: (B, R, groups * channels); rows: (taps, P).
    """
    groups, outputs, taps, channels = omega.shape
    batch, positions = grad.shape[:2]
    if positions == 1 and rows is None:  # |g^T x| = |g|^T |x|: one product of matrices
        g, x = (t[:, 0].to(omega.dtype) for t in (grad, input))
        g, x = (t.square() if square else t.abs() for t in (g, x))
        g, x = g.view(batch, groups, outputs), x.view(batch, groups, channels)
        omega[:, :, 0].baddbmm_(g.permute(1, 2, 0), x.transpose(0, 1))
        return
    # The operands are held twice, as gathered and as bmm wants them.
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


def _hash(index: Tensor, entry: int) -> Tensor:
    """Uniform in 32 bits: the finaliser of MurmurHash3 over both numbers."""
    low32 = 0xFFFFFFFF

    def times(a: Tensor, factor: int) -> Tensor:
        # In two halves: the product of two 32-bit numbers does not fit in a signed 64-bit one.
        return (a * (factor & 0xFFFF) + ((a * (factor >> 16) & 0xFFFF) << 16)) & low32

    h = times(index & low32, 0x9E3779B9) ^ times(index >> 32, 0x85EBCA6B)
    h = h ^ (entry * 0xC2B2AE35 & low32)
    h = times(h ^ (h >> 16), 0x85EBCA6B)
    h = times(h ^ (h >> 13), 0xC2B2AE35)
    return h ^ (h >> 16)


def _round_stochastically(x: Tensor, h: Tensor) -> Tensor:
    """bfloat16, rounded up with the probability of the part cut off."""
    bits = x.float().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    raised = ((bits + (h & 0xFFFF).reshape(bits.shape)) & 0xFFFF0000).to(torch.int64)
    signed = torch.where(raised >= 1 << 31, raised - (1 << 32), raised).to(torch.int32)
    rounded = signed.view(torch.float32).to(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))
