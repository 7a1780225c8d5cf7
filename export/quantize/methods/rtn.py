"""Round to nearest; the scale covers each block's smallest to largest weight."""

from __future__ import annotations

from typing import Final

from numba import njit

from ..grids import minmax_grid
from ..method import Array, Method, round_to_grids


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def choose_grids(
    rows: Array,
    importance: Array,  # noqa: ARG001
    block_size: int,
    bits: int,
    symmetric: bool,
    is_float16: bool,
    scales: Array,
    zeros: Array,
) -> None:
    """See `method.ChooseGrids`. Does not read importance."""
    columns = rows.shape[1]
    for n in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            block = rows[n, b * block_size : min((b + 1) * block_size, columns)]
            scales[n, b], zeros[n, b] = minmax_grid(block, bits, symmetric, is_float16)


METHOD: Final = Method(round_to_grids(choose_grids), uses_importance=False)
