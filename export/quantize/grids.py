"""A block's grid: the scale and zero point whose multiples its weights are rounded to, by search, as compiled loops.

A code q in [0, top] is read as (q - zero) * scale, where top = 2^bits - 1. A symmetric grid has zero = 2^(bits-1) and a
scale of either sign, so that the one code more on the negative side serves the side that needs it; an asymmetric one
has a whole-numbered zero in [0, top] and a positive scale. Zero is on every grid. Scales are rounded to what the file
stores before anything is measured with them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

SCALE_CANDIDATES = 24
"""Scales that the search tries besides the plain one."""

MAX_REFITS = 4
"""Least-squares fits of the scale to the codes, and codes to the scale, after the search."""

MIN_SCALE = 2.0**-126
"""No stored scale is smaller: the least normal float32; for float16, 2^-24, whose float32 value is a normal one."""

Vector = NDArray[Any]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_scale(scale: float, is_float16: bool) -> float:
    """Round a scale to float16 (`is_float16`) or float32: to nearest, ties to even, never zero, never infinite."""
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
    """Return the code whose value is nearest."""
    code: float = np.rint(value / scale) + zero
    return min(max(code, 0.0), max_code)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def block_error(block: Vector, importance: Vector, scale: float, zero: float, max_code: float, enough: float) -> float:
    """Sum of squared errors of a block on a grid, weighted by importance; not added up further than `enough`."""
    total = 0.0
    for k in range(block.shape[0]):
        if total >= enough:
            break
        value = float(block[k])
        difference = value - (nearest_code(value, scale, zero, max_code) - zero) * scale
        total += float(importance[k]) * difference * difference
    return total


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def fit_scale(block: Vector, importance: Vector, scale: float, zero: float, max_code: float) -> float:
    """Return the scale that fits a block's codes best, by weighted least squares; the same where none does."""
    dot, square = 0.0, 0.0
    for k in range(block.shape[0]):
        value, weight = float(block[k]), float(importance[k])
        code = nearest_code(value, scale, zero, max_code) - zero
        dot += weight * code * value
        square += weight * code * code
    return dot / square if square > 0.0 and dot != 0.0 else scale


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def minmax_grid(block: Vector, bits: int, symmetric: bool, is_float16: bool) -> tuple[float, float]:
    """Return (scale, zero) that cover a block from its least to its greatest value.

    Symmetric: the value of greatest magnitude gets code 0, the most negative one (the rule of llama.cpp's Q4_0).
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
def search_grid(
    block: Vector, importance: Vector, bits: int, symmetric: bool, is_float16: bool, candidates: int
) -> tuple[float, float]:
    """Return the (scale, zero) of least weighted squared error among the plain one and `candidates` more.

    Symmetric: 0.6 to 1.2 times the plain scale, with either sign; asymmetric: 0.6 to 1.05 times it, the range placed
    about the middle of the values. The best one's scale is then fitted to its codes for as long as that helps.
    """
    max_code = float((1 << bits) - 1)
    plain, zero = minmax_grid(block, bits, symmetric, is_float16)
    scale, least = plain, block_error(block, importance, plain, zero, max_code, np.inf)
    low, high = 0.0, 0.0
    for k in range(block.shape[0]):
        low, high = min(low, float(block[k])), max(high, float(block[k]))
    middle = low / 2 + high / 2
    sizes = candidates // 2 if symmetric else candidates
    for c in range(candidates):
        if symmetric:
            size = (0.6 + 0.6 * (c // 2) / max(sizes - 1, 1)) * (1.0 if c % 2 == 0 else -1.0)
            trial, at = round_scale(plain * size, is_float16), zero
        else:
            trial = round_scale(plain * (0.6 + 0.45 * c / max(sizes - 1, 1)), is_float16)
            at = min(max(np.rint(max_code / 2 - middle / trial), 0.0), max_code)
        error = block_error(block, importance, trial, at, max_code, least)
        if error < least:
            scale, zero, least = trial, at, error
    for _ in range(MAX_REFITS):
        trial = round_scale(fit_scale(block, importance, scale, zero, max_code), is_float16)
        error = block_error(block, importance, trial, zero, max_code, least)
        if error >= least:
            break
        scale, least = trial, error
    return scale, zero
