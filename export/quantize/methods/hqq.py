"""Fit each block's grid by an lp norm, p = 0.7, robust to outliers (half-quadratic quantization).

Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/, section "Half-Quadratic Solver". The sum of |w - w^|^p with
p < 1 penalizes the few large errors of outliers little, so the grid fits the many other weights. An auxiliary error e
alternates with the grid: e is the proximal step of the lp norm, the grid the least-squares fit to w - e. Our
deviations: errors are in units of the scale, so that beta means the same for every block; the scale is fitted as well
as the zero point; the final zero point is a whole number, because the kernels store it in the bits of a code. The last
one costs HQQ most of its advantage: with 16-bit zero points it beats the search of `clip`, with whole ones it does not.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import njit

from ..grids import Vector, fit_scale, minmax_grid, nearest_code, round_scale
from ..method import Array, Method, round_to_grids

ITERATIONS: Final = 10
LP_NORM: Final = 0.7
"""p of the lp norm, as in the paper."""

BETA: Final = 10.0
GROWTH: Final = 1.01
"""Initial weight of the quadratic term, and its factor of growth in each iteration, as in the paper."""


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def lp_error(block: Vector, importance: Vector, scale: float, zero: float, max_code: float) -> float:
    """Return the weighted sum of |error|^p of a block on a grid, errors in units of the weights."""
    total = 0.0
    for k in range(block.shape[0]):
        value = float(block[k])
        total += (
            float(importance[k]) * abs(value - (nearest_code(value, scale, zero, max_code) - zero) * scale) ** LP_NORM
        )
    return total


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def hqq_grid(block: Vector, importance: Vector, bits: int, symmetric: bool, is_float16: bool) -> tuple[float, float]:
    """Return the (scale, zero) with the least lp error of all iterations."""
    max_code = float((1 << bits) - 1)
    best, best_zero = minmax_grid(block, bits, symmetric, is_float16)
    least = lp_error(block, importance, best, best_zero, max_code)
    scale, zero, beta = best, best_zero, BETA
    for _ in range(ITERATIONS):
        dot, square, offset, total = 0.0, 0.0, 0.0, 0.0
        for k in range(block.shape[0]):
            steps, weight = float(block[k]) / scale, float(importance[k])
            code = min(max(np.rint(steps + zero), 0.0), max_code) - zero  # zero may be fractional here
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


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def choose_grids(
    rows: Array,
    importance: Array,
    block_size: int,
    bits: int,
    symmetric: bool,
    is_float16: bool,
    scales: Array,
    zeros: Array,
) -> None:
    """See `method.ChooseGrids`."""
    columns = rows.shape[1]
    for n in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            first, last = b * block_size, min((b + 1) * block_size, columns)
            scales[n, b], zeros[n, b] = hqq_grid(
                rows[n, first:last], importance[first:last], bits, symmetric, is_float16
            )


METHOD: Final = Method(round_to_grids(choose_grids))
