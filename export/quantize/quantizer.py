"""Quantizer: prepares once for a matrix, then turns its rows, all or some at a time, into packed codes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgelmError

from . import gptq, rounding
from .grids import SCALE_CANDIDATES
from .moments import Moments, prepare_gptq
from .pack import PackedMatrix, pack
from .spec import QuantSpec

DESCENT_ROUNDS: Final = 1
"""After GPTQ, so often are codes improved until they settle, and then scales. A second round changes nothing that can
be measured (stories260K: KL .0487 and .0486) and takes half as long as GPTQ itself."""

MAX_SWEEPS: Final = 8
"""At most so many times are codes improved in a round; few change after the first, so it costs little."""

GRID_SEARCHES: Final = {"rtn": rounding.MINMAX, "clip": rounding.SEARCH, "hqq": rounding.HQQ, "gptq": rounding.SEARCH}

Array = NDArray[np.float32]


def choose_scale_dtype(largest: float, bits: int) -> type[np.float16] | type[np.float32]:
    """Return float16 where it holds the scales of a matrix whose largest weight has this magnitude, else float32.

    Below 2^-14 float16 scales lose digits, so the largest one may be no smaller than 2^-12; above 65504 they end.
    """
    scale = largest / (1 << (bits - 1))
    return np.float16 if 2.0**-12 <= scale <= 2.0**15 else np.float32


class Quantizer:
    """Quantizes the rows of one matrix [N, K]. The same rows give the same codes in any company and order.

    Parameters
    ----------
    spec
        How it is stored; `spec.bits` is 4, 5, 6 or 8.
    importance
        float32 [K], what a squared error in a column costs, for example the inputs' second moments: clip and hqq weigh
        by it. None: the diagonal of `moments`, or 1 everywhere.
    moments
        What calibration text says of the inputs; gptq needs it.
    scale_dtype
        float16 or float32, see `choose_scale_dtype`: the same for all rows of a matrix.

    Raises
    ------
    EdgelmError
        gptq without moments, or with moments that are not positive definite.
    """

    def __init__(
        self,
        spec: QuantSpec,
        *,
        importance: Array | None = None,
        moments: Moments | None = None,
        scale_dtype: type[np.float16] | type[np.float32] = np.float16,
    ) -> None:
        if spec.method == "gptq" and moments is None:
            raise EdgelmError("the method gptq needs calibration text: name some, or choose clip or hqq")
        self._spec = spec
        self._dtype = scale_dtype
        if importance is None and moments is not None:
            importance = moments.damped_diagonal()
        self._importance = None if importance is None else _normalized(importance)
        if spec.method == "gptq" and moments is not None:
            self._order, self._second, self._factors = prepare_gptq(moments)
            self._groups = self._order // spec.block_size

    def quantize(self, rows: Array) -> PackedMatrix:
        """Quantize float32 [n, K], unchanged, on all CPUs; the last block of a row may be short."""
        spec = self._spec
        n, columns = rows.shape
        blocks = -(-columns // spec.block_size)
        codes = np.empty((n, blocks * spec.block_size), np.uint8)
        scales = np.empty((n, blocks), np.float32)
        zeros = np.empty((n, blocks), np.float32)
        importance = np.ones(columns, np.float32) if self._importance is None else self._importance

        def some(first: int, last: int) -> None:
            part = slice(first, last)
            rounding.choose_grids(
                rows[part],
                importance,
                spec.block_size,
                spec.bits,
                spec.symmetric,
                GRID_SEARCHES[spec.method],
                self._dtype is np.float16,
                SCALE_CANDIDATES,
                scales[part],
                zeros[part],
            )
            max_code = float((1 << spec.bits) - 1)
            rounding.round_blocks(rows[part], scales[part], zeros[part], spec.block_size, max_code, codes[part])
            if spec.method == "gptq":
                self._run_gptq(rows[part], scales[part], zeros[part], codes[part])

        workers = os.cpu_count() or 1
        step = min(256, -(-n // (4 * workers)))
        step = -(-step // gptq.ROW_TILE) * gptq.ROW_TILE
        with ThreadPoolExecutor(workers) as pool:
            for task in [pool.submit(some, i, min(i + step, n)) for i in range(0, n, step)]:
                task.result()
        return pack(codes, scales.astype(self._dtype), None if spec.symmetric else zeros, spec.bits, columns)

    def _run_gptq(self, rows: Array, scales: Array, zeros: Array, codes: NDArray[np.uint8]) -> None:
        """Replace the codes of columns below K, and the scales, by GPTQ's."""
        columns = rows.shape[1]
        members = np.full((scales.shape[1], self._spec.block_size), -1, np.int64)
        members.reshape(-1)[self._order] = np.arange(columns)
        is_float16, max_code = self._dtype is np.float16, float((1 << self._spec.bits) - 1)
        for i in range(0, len(rows), gptq.ROW_TILE):
            part = slice(i, i + gptq.ROW_TILE)
            residual = np.take(rows[part], self._order, axis=1)  # a fancy index would not be contiguous
            chosen = np.empty(residual.shape, np.uint8)
            grids = scales[part], zeros[part]
            gptq.round_columns(residual, self._factors, *grids, self._groups, max_code, chosen)
            for _ in range(DESCENT_ROUNDS):
                for _ in range(MAX_SWEEPS):
                    if not gptq.improve_codes(residual, self._second, *grids, self._groups, max_code, chosen):
                        break
                gptq.improve_scales(residual, self._second, *grids, members, is_float16, chosen)
            gptq.improve_codes(residual, self._second, *grids, self._groups, max_code, chosen)
            codes[part, self._order] = chosen


def _normalized(importance: NDArray[Any]) -> Array:
    """Mean 1, and nothing so small that its column would not be rounded to nearest."""
    values = np.asarray(importance, np.float64)
    mean = float(values.mean())
    return np.maximum(values / mean, 1e-6).astype(np.float32) if mean > 0 else np.ones(len(values), np.float32)
