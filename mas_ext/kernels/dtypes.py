"""The dtypes of the kernels: of parameters, of the arithmetic on them, and of omega in 64 to 8 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mas_ext.failures import Diverged

# An omega of dtype uint8 holds the codes of from_codes.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OMEGA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the arithmetic on a parameter of `dtype` is done."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A scalar as `dtype`, kept finite so that a huge lam times a zero pull is zero and not NaN."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


# -- omega in 8 bits -------------------------------------------------------------------------------

_LARGEST = 1.875 * 2.0**16
_CUT = 20  # bits of a float32 that a code lacks
_LOWEST = 112 << 23  # the float32 2^-15, which would be code 0
_LEAST = 1.125 * 2.0**-15


def from_codes(codes: Tensor) -> Tensor:
    """The float32 values of 8-bit codes: 0, or (1 + m / 8) 2^(e - 15) with 5 bits of e above 3 of m."""
    bits = (codes.to(torch.int32) << _CUT) + _LOWEST
    return torch.where(codes == 0, torch.zeros_like(bits), bits).view(torch.float32)


def to_codes(x: Tensor) -> Tensor:
    """The codes nearest to x >= 0; what is too large, or NaN, becomes the largest."""
    half = torch.full_like(x, 1 << (_CUT - 1), dtype=torch.int64)
    return _coded(x, half, torch.full_like(x, 0.5, dtype=torch.float32))


def _coded(x: Tensor, added: Tensor, share: Tensor) -> Tensor:
    """Codes of x, rounded up by adding to the bits to cut off; below the least by a share of that."""
    low = x.float()
    bits = low.contiguous().view(torch.int32).to(torch.int64)
    code = ((bits - _LOWEST + added) >> _CUT).clamp(0, 255)
    return torch.where(low < _LEAST, share * _LEAST < low, code).to(torch.uint8)


def unit_of(largest: float) -> float:
    """The power of two that brings everything up to the largest into the range of 8 bits."""
    # Not so far out that float32 has no such power, or only one of fewer bits.
    if not largest <= _LARGEST * 2.0**100:
        raise Diverged(
            f"importance: got values that make W {largest:.3g}, expected at most "
            f"{_LARGEST * 2.0**100:.3g} with omega_dtype=uint8"
        )
    mantissa, exponent = math.frexp(largest / _LARGEST)
    return 2.0 ** min(max(exponent - (mantissa == 0.5), -100), 100)


def omega_values(omega: Tensor, dtype: torch.dtype) -> Tensor:
    """Omega as numbers of a dtype, whether it is stored as numbers or as codes."""
    return (from_codes(omega) if omega.dtype == torch.uint8 else omega).to(dtype)


# -- stochastic rounding ---------------------------------------------------------------------------


def round_stochastically(x: Tensor, dtype: torch.dtype, index: Tensor, entry: int) -> Tensor:
    """x in the dtype of a stored omega; to bfloat16 or codes rounded up as often as the part cut off is large.

    The random bits are a hash of each element's index and of the entry.
    """
    if dtype == torch.uint8:
        h = _hash(index, entry)
        return _coded(x, h & ((1 << _CUT) - 1), (h >> 8).float() * 2.0**-24)
    if dtype == torch.bfloat16:
        bits = x.float().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        raised = (bits + (_hash(index, entry) & 0xFFFF)) & 0xFFFF0000
        signed = torch.where(raised >= 1 << 31, raised - (1 << 32), raised).to(torch.int32)
        rounded = signed.view(torch.float32).to(torch.bfloat16)
        return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))
    return x.to(dtype)


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
