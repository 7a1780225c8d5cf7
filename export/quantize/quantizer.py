"""Quantizer: prepares a matrix once, then quantizes its rows, all or some at a time, on all CPUs."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgelmError

from .method import ROW_TILE, Array
from .methods import load_method
from .moments import Moments
from .pack import PackedMatrix, pack_codes
from .spec import QuantSpec

MAX_TASK_ROWS: Final = 256
"""Most rows that one thread quantizes at a time."""


def choose_scale_dtype(largest: float, bits: int) -> type[np.float16] | type[np.float32]:
    """Return float16 if it holds the scales of a matrix whose largest weight has this magnitude, else float32.

    Below 2^-14 float16 scales lose digits, so the largest scale must be at least 2^-12; above 65504 they overflow.
    """
    scale = largest / (1 << (bits - 1))
    return np.float16 if 2.0**-12 <= scale <= 2.0**15 else np.float32


class Quantizer:
    """Quantizes the rows of one matrix [N, K]. A row's codes do not depend on the rows passed with it.

    Parameters
    ----------
    spec
        How the matrix is stored; `spec.bits` is 4, 5, 6 or 8.
    importance
        float32 [K], the cost of a squared error in each column, for example the second moments of the inputs. Methods
        with `uses_importance` weight errors by it. None: the diagonal of `moments`, or 1 everywhere.
    moments
        Statistics of the inputs from calibration text. Required by methods with `needs_moments`.
    scale_dtype
        float16 or float32, see `choose_scale_dtype`; the same for all rows of a matrix.

    Raises
    ------
    EdgelmError
        The method needs moments and there are none, or they are not positive definite.
    """

    def __init__(
        self,
        spec: QuantSpec,
        *,
        importance: Array | None = None,
        moments: Moments | None = None,
        scale_dtype: type[np.float16] | type[np.float32] = np.float16,
    ) -> None:
        method = load_method(spec.method)
        if method.needs_moments and moments is None:
            raise EdgelmError(f"the method {spec.method} needs calibration text; use --calibrate, or another method")
        self._spec = spec
        self._dtype = scale_dtype
        if importance is None and moments is not None:
            importance = moments.damped_diagonal()
        self._importance = None if importance is None else _normalized(importance)
        self._quantize_rows = method.prepare(spec, scale_dtype is np.float16, moments)

    def quantize(self, rows: Array) -> PackedMatrix:
        """Quantize float32 [n, K], not changed. The last block of a row may be short."""
        spec = self._spec
        n, columns = rows.shape
        blocks = -(-columns // spec.block_size)
        codes = np.empty((n, blocks * spec.block_size), np.uint8)
        scales = np.empty((n, blocks), np.float32)
        zeros = np.empty((n, blocks), np.float32)
        importance = np.ones(columns, np.float32) if self._importance is None else self._importance

        def quantize_range(first: int, last: int) -> None:
            part = slice(first, last)
            self._quantize_rows(rows[part], importance, scales[part], zeros[part], codes[part])

        workers = os.cpu_count() or 1
        step = min(MAX_TASK_ROWS, -(-n // (4 * workers)))
        step = -(-step // ROW_TILE) * ROW_TILE
        with ThreadPoolExecutor(workers) as pool:
            for task in [pool.submit(quantize_range, i, min(i + step, n)) for i in range(0, n, step)]:
                task.result()
        return pack_codes(codes, scales.astype(self._dtype), None if spec.symmetric else zeros, spec.bits, columns)


def _normalized(importance: NDArray[Any]) -> Array:
    """Return importance scaled to a mean of 1; at least 1e-6, so that every column is rounded to nearest."""
    values = np.asarray(importance, np.float64)
    mean = float(values.mean())
    return np.maximum(values / mean, 1e-6).astype(np.float32) if mean > 0 else np.ones(len(values), np.float32)
