"""Search each block's scale for the least squared error; weights out of range are clipped."""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from ..grids import Vector, block_error, fit_scale, minmax_grid, round_scale
from ..method import Array, Method, round_to_grids

SCALE_CANDIDATES: Final = 24
"""Scales tried besides that of `minmax_grid`."""

MAX_REFITS: Final = 4
"""Most rounds after the search; a round fits the scale to the codes by least squares, then rounds again."""


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def search_grid(
    block: Vector, importance: Vector, bits: int, symmetric: bool, is_float16: bool, candidates: int
) -> tuple[float, float]:
    """Return the (scale, zero) with the least weighted squared error among `minmax_grid` and `candidates` more.

    Symmetric: 0.6 to 1.2 times the scale of `minmax_grid`, with either sign. Asymmetric: 0.6 to 1.05 times it, with the
    range centred on the middle of the values. The best scale is then fitted to its codes while the error falls.
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
            scales[n, b], zeros[n, b] = search_grid(
                rows[n, first:last], importance[first:last], bits, symmetric, is_float16, SCALE_CANDIDATES
            )


METHOD: Final = Method(round_to_grids(choose_grids))
