"""Round to nearest; the scale maps each block's largest magnitude to the largest positive code.

The absmax quantization of Dettmers et al. 2022 (arXiv:2208.07339), section 2, in blocks. The range is the same on both
sides, so the most negative code is never used; zero points, if stored, are all 2^(bits-1).
"""

from __future__ import annotations

from typing import Final

from numba import njit

from ..grids import round_scale
from ..method import Array, Method, round_to_grids


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def choose_grids(
    rows: Array,
    importance: Array,  # noqa: ARG001
    block_size: int,
    bits: int,
    symmetric: bool,  # noqa: ARG001
    is_float16: bool,
    scales: Array,
    zeros: Array,
) -> None:
    """See `method.ChooseGrids`. Does not read importance or symmetric."""
    columns, zero = rows.shape[1], float(1 << (bits - 1))
    for n in range(rows.shape[0]):
        for b in range(scales.shape[1]):
            largest = 0.0
            for k in range(b * block_size, min((b + 1) * block_size, columns)):
                largest = max(largest, abs(float(rows[n, k])))
            scales[n, b], zeros[n, b] = round_scale(largest / (zero - 1.0), is_float16), zero


METHOD: Final = Method(round_to_grids(choose_grids), uses_importance=False)
