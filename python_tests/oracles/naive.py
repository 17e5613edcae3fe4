"""The penalty's mathematics once more, in NumPy's float64: what the tests compare with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def penalty(theta: Array, omega: Array, anchor: Array, alpha: Array) -> float:
    """sum_t alpha_t sum_i Omega_ti (theta_i - A_ti)^2; omega and anchor: (T, n)."""
    return float(
        sum(a * np.sum(w * (theta - c) ** 2) for a, w, c in zip(alpha, omega, anchor, strict=True))
    )


def gradient(theta: Array, omega: Array, anchor: Array, alpha: Array) -> Array:
    """Its derivative by theta."""
    return sum(  # type: ignore[return-value]
        (2 * a * w * (theta - c) for a, w, c in zip(alpha, omega, anchor, strict=True)),
        np.zeros_like(theta),
    )


def proximal(theta: Array, omega: Array, anchor: Array, alpha: Array, eta: Array) -> Array:
    """argmin_x penalty(x) + (x - theta)^2 / (2 eta), by its normal equation."""
    weight = 2 * eta * np.einsum("t,ti->i", alpha, omega)
    pull = 2 * eta * np.einsum("t,ti,ti->i", alpha, omega, anchor)
    return (theta + pull) / (1 + weight)


def per_sample(
    grad: Array, input: Array, rows: NDArray[np.int32], shape: list[int], square: bool
) -> Array:
    """sum_b abs(M_b), or of its square: M_b by one position of one tap of one group after another."""
    groups, outputs, taps, channels = shape
    total = np.zeros(shape)
    for g, x in zip(grad, input, strict=True):
        m = np.zeros(shape)
        for t, p in np.ndindex(taps, len(g)):
            for k in range(groups if rows[t, p] >= 0 else 0):
                left = g[p, k * outputs : (k + 1) * outputs]
                right = x[rows[t, p], k * channels : (k + 1) * channels]
                m[k, :, t] += np.outer(left, right)
        total += m**2 if square else np.abs(m)
    return total
