"""A block's grid: the scale and zero point that turn codes into weights, and rounding to it, as compiled loops.

The weight of a code q in [0, max_code] is (q - zero) * scale, with max_code = 2^bits - 1. A symmetric grid has zero =
2^(bits-1) and a scale of either sign: the side with the larger weights gets the one code more. An asymmetric grid has a
whole-numbered zero in [0, max_code] and a positive scale. Every grid contains the weight 0. Scales are rounded to the
stored dtype before errors are measured with them. This module does not know the methods that choose grids.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

MIN_SCALE = 2.0**-126
"""The least stored float32 scale: the least normal float32. (Of float16 scales it is 2^-24, a normal float32.)"""

Vector = NDArray[Any]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_scale(scale: float, is_float16: bool) -> float:
    """Round a scale to float16 (`is_float16`) or float32: to nearest, ties to even; never 0, never infinite."""
    size = abs(scale)
    if is_float16:
        exponent = max(math.frexp(size)[1], -13)  # below 2^-14 float16 has steps of 2^-24
        step = math.ldexp(1.0, exponent - 11)
        size = min(max(np.rint(size / step) * step, 2.0**-24), 65504.0)
    else:
        size = float(np.float32(max(size, MIN_SCALE)))
    return -size if scale < 0.0 else size


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def nearest_code(value: float, scale: float, zero: float, max_code: float) -> float:
    """Return the code in [0, max_code] whose weight is nearest to `value`."""
    code: float = np.rint(value / scale) + zero
    return min(max(code, 0.0), max_code)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def block_error(
    block: Vector, importance: Vector, scale: float, zero: float, max_code: float, error_limit: float
) -> float:
    """Return the squared error of a block on a grid, weighted by importance. Stops early at `error_limit`."""
    total = 0.0
    for k in range(block.shape[0]):
        if total >= error_limit:
            break
        value = float(block[k])
        difference = value - (nearest_code(value, scale, zero, max_code) - zero) * scale
        total += float(importance[k]) * difference * difference
    return total


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def fit_scale(block: Vector, importance: Vector, scale: float, zero: float, max_code: float) -> float:
    """Return the scale with the least weighted squared error for a block's codes; `scale` if all codes are zero."""
    dot, square = 0.0, 0.0
    for k in range(block.shape[0]):
        value, weight = float(block[k]), float(importance[k])
        code = nearest_code(value, scale, zero, max_code) - zero
        dot += weight * code * value
        square += weight * code * code
    return dot / square if square > 0.0 and dot != 0.0 else scale


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def minmax_grid(block: Vector, bits: int, symmetric: bool, is_float16: bool) -> tuple[float, float]:
    """Return the (scale, zero) whose range covers a block's smallest to largest weight.

    Symmetric: the weight of largest magnitude gets code 0 (the rule of llama.cpp's Q4_0).
    """
    low, high = 0.0, 0.0
    for k in range(block.shape[0]):
        low, high = min(low, float(block[k])), max(high, float(block[k]))
    if symmetric:
        zero = float(1 << (bits - 1))
        return round_scale((low if -low >= high else high) / -zero, is_float16), zero
    max_code = float((1 << bits) - 1)
    scale = round_scale(high / max_code - low / max_code, is_float16)
    return scale, min(max(np.rint(-low / scale), 0.0), max_code)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_blocks(
    rows: NDArray[np.float32],
    scales: NDArray[np.float32],
    zeros: NDArray[np.float32],
    block_size: int,
    max_code: float,
    codes: NDArray[np.uint8],
) -> None:
    """Write the codes nearest to rows.

    rows: float32 [n, K]. scales, zeros: float32 [n, blocks]. codes: uint8 [n, blocks * block_size], written; past
    column K with the code of zero.
    """
    columns = rows.shape[1]
    for n in range(rows.shape[0]):
        for k in range(codes.shape[1]):
            scale, zero = float(scales[n, k // block_size]), float(zeros[n, k // block_size])
            codes[n, k] = np.uint8(nearest_code(float(rows[n, k]), scale, zero, max_code) if k < columns else zero)
