"""Half-quadratic quantization of a block (Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/), compiled loops.

The sum of |w - w^|^p with p < 1 forgives the few large errors of outliers and so places the grid for the many other
weights. As in section "Half-Quadratic Solver" of the paper an auxiliary error e is alternated with the grid: e is the
proximal step of the lp norm, the grid the least-squares fit to w - e. Our deviations: errors are counted in steps of
the scale, so that beta has one meaning for every block; the scale is fitted as well, not only the zero point; and the
zero point ends as a whole number, since the kernels store it in the bits of a code. That costs HQQ most of its lead:
with zero points of 16 bits it beats the search of `grids`, so it does not.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .grids import Vector, fit_scale, minmax_grid, nearest_code, round_scale

ITERATIONS = 10
LP_NORM = 0.7
"""p of the lp norm, the paper's."""

BETA = 10.0
"""Weight of the quadratic term at the start, and by how much it grows an iteration: the paper's."""
GROWTH = 1.01


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def lp_error(block: Vector, importance: Vector, scale: float, zero: float, max_code: float) -> float:
    """Weighted sum of |error|^p of a block on a grid, in units of the weights."""
    total = 0.0
    for k in range(block.shape[0]):
        value = float(block[k])
        total += (
            float(importance[k]) * abs(value - (nearest_code(value, scale, zero, max_code) - zero) * scale) ** LP_NORM
        )
    return total


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def hqq_grid(block: Vector, importance: Vector, bits: int, symmetric: bool, is_float16: bool) -> tuple[float, float]:
    """Return the (scale, zero) of least lp error that the alternation passes."""
    max_code = float((1 << bits) - 1)
    best, best_zero = minmax_grid(block, bits, symmetric, is_float16)
    least = lp_error(block, importance, best, best_zero, max_code)
    scale, zero, beta = best, best_zero, BETA
    for _ in range(ITERATIONS):
        dot, square, offset, total = 0.0, 0.0, 0.0, 0.0
        for k in range(block.shape[0]):
            steps, weight = float(block[k]) / scale, float(importance[k])
            code = min(max(np.rint(steps + zero), 0.0), max_code) - zero  # here zero need not be a whole number
            error = steps - code
            if error != 0.0:
                kept = max(abs(error) - abs(error) ** (LP_NORM - 1.0) / beta, 0.0)
                steps -= math.copysign(kept, error)
            dot += weight * code * steps
            square += weight * code * code
            offset += weight * (code - steps)
            total += weight
        if square <= 0.0 or dot <= 0.0:
            break
        scale = round_scale(scale * dot / square, is_float16)
        if not symmetric:
            zero = min(max(zero + offset / total, 0.0), max_code)
        beta *= GROWTH
        whole = zero if symmetric else float(np.rint(zero))
        fitted = round_scale(fit_scale(block, importance, scale, whole, max_code), is_float16)
        error = lp_error(block, importance, fitted, whole, max_code)
        if error < least:
            best, best_zero, least = fitted, whole, error
    return best, best_zero
