"""Choosing scales and rounding: symmetric, one scale a block of weights, as compiled loops.

With b bits a weight is stored as q in [0, 2^b - 1] and read as (q - 2^(b-1)) * scale. Knows nothing of how codes are
packed.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

CANDIDATES = 24
"""Scales tried a block by the clip search, besides the plain one."""


SMALLEST = 2.0**-126
"""A scale below this, the least normal float32, becomes 1: its block is as good as zero, and kernels may flush it."""


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _error(block: NDArray[np.float32], scale: float, zero: int) -> float:
    """Sum of squared errors of a block under a scale."""
    inverse = 1.0 / scale
    total = 0.0
    for k in range(block.shape[0]):
        value = float(block[k])
        code = min(max(np.rint(value * inverse), -zero), zero - 1)
        difference = value - code * scale
        total += difference * difference
    return total


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _extreme(block: NDArray[np.float32]) -> float:
    """Return the value of greatest magnitude, with its sign; the first of equals."""
    extreme = 0.0
    for k in range(block.shape[0]):
        if abs(block[k]) > abs(extreme):
            extreme = float(block[k])
    return extreme


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_blocks(
    weight: NDArray[np.float32],
    block_size: int,
    bits: int,
    candidates: int,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
) -> None:
    """Quantize rows in blocks along the columns.

    weight: float32 [N, K]. codes: uint8 [N, blocks * block_size], written, columns past K get the code of zero.
    scales: float32 [N, blocks], written. With `candidates` 0 the scale maps the extreme value to the most negative
    code (the rule of llama.cpp's Q4_0, which uses all 2^bits codes); otherwise that scale is shrunk and turned in
    `candidates` steps of its sign and size, the least squared error wins, and a least-squares fit of the scale to the
    chosen codes follows.
    """
    zero = 1 << (bits - 1)
    rows, columns = weight.shape
    for n in range(rows):
        for b in range(scales.shape[1]):
            block = weight[n, b * block_size : min((b + 1) * block_size, columns)]
            scale = _extreme(block) / -zero
            tried = candidates
            if abs(scale) < SMALLEST:
                scale, tried = 1.0, 0
            best, least = scale, _error(block, scale, zero) if tried > 0 else 0.0
            for c in range(tried):
                size = 0.70 + 0.50 * (c // 2) / max(candidates // 2 - 1, 1)
                trial = scale * size * (1.0 if c % 2 == 0 else -1.0)
                error = _error(block, trial, zero)
                if error < least:
                    best, least = trial, error
            if tried > 0:
                dot, square = 0.0, 0.0
                for k in range(block.shape[0]):
                    value = float(block[k])
                    code = min(max(np.rint(value / best), -zero), zero - 1)
                    dot += code * value
                    square += code * code
                if square > 0.0 and dot != 0.0 and _error(block, dot / square, zero) < least:
                    best = dot / square
            scales[n, b] = best
            stored = float(scales[n, b])
            for k in range(block_size):
                column = b * block_size + k
                code = 0.0
                if column < columns:
                    code = min(max(np.rint(float(weight[n, column]) / stored), -zero), zero - 1)
                codes[n, column] = np.uint8(code + zero)
