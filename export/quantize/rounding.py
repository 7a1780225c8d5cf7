"""Rounding rows of weights to grids chosen block by block, as a compiled loop.

Knows the methods that need no calibration text, and nothing of how codes are packed.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .grids import minmax_grid, nearest_code, search_grid
from .hqq import hqq_grid

MINMAX, SEARCH, HQQ = 0, 1, 2
"""Ways to choose a grid: `minmax_grid`, `search_grid`, `hqq_grid`."""


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def choose_grids(
    rows: NDArray[np.float32],
    importance: NDArray[np.float32],
    block_size: int,
    bits: int,
    symmetric: bool,
    way: int,
    is_float16: bool,
    candidates: int,
    scales: NDArray[np.float32],
    zeros: NDArray[np.float32],
) -> None:
    """Write the scales and zero points, float32 [n, blocks], of rows float32 [n, K]; importance: float32 [K]."""
    columns = rows.shape[1]
    for n in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            first, last = b * block_size, min((b + 1) * block_size, columns)
            block, weights = rows[n, first:last], importance[first:last]
            if way == MINMAX:
                scale, zero = minmax_grid(block, bits, symmetric, is_float16)
            elif way == SEARCH:
                scale, zero = search_grid(block, weights, bits, symmetric, is_float16, candidates)
            else:
                scale, zero = hqq_grid(block, weights, bits, symmetric, is_float16)
            scales[n, b], zeros[n, b] = scale, zero


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_blocks(
    rows: NDArray[np.float32],
    scales: NDArray[np.float32],
    zeros: NDArray[np.float32],
    block_size: int,
    max_code: float,
    codes: NDArray[np.uint8],
) -> None:
    """Write the codes, uint8 [n, blocks * block_size], nearest to rows float32 [n, K]; past K, the code of zero."""
    columns = rows.shape[1]
    for n in range(rows.shape[0]):
        for k in range(codes.shape[1]):
            scale, zero = float(scales[n, k // block_size]), float(zeros[n, k // block_size])
            codes[n, k] = np.uint8(nearest_code(float(rows[n, k]), scale, zero, max_code) if k < columns else zero)
