"""The moments of a matrix, summed over documents in batches. Does not know how the documents are run."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..quantize.moments import HeldOut, Moments

COLUMN_CHUNK: Final = 512
"""Columns of a sum that one matrix product updates."""

MIN_BATCH_VALUES: Final = 1 << 21
"""Least number of input values in one batch: 8 MB."""

Array = NDArray[np.float32]


class MomentAccumulator:
    """Sums the moments of a matrix [rows, columns].

    The drift of the inputs is summed in the smaller form: of inputs [columns, columns], or of outputs [rows, columns]
    together with the drift of the residual stream. Documents are collected into batches of `MIN_BATCH_VALUES`, because
    one long product is faster than many short ones and evicts less of what else is in the CPU's caches.
    """

    def __init__(self, shape: tuple[int, int], weight: Array | None = None, *, sums_float32: bool = False) -> None:
        """`weight`: float32 [rows, columns], required if rows < columns. `sums_float32`: not float64."""
        rows, columns = shape
        kind = np.dtype(np.float32 if sums_float32 else np.float64)
        self._weight = weight
        self._hessian: NDArray[Any] = np.zeros((columns, columns), kind)
        self._input_drift: NDArray[Any] | None = np.zeros((columns, columns), kind) if columns <= rows else None
        self._residual_drift: NDArray[Any] = np.zeros((rows, columns), kind)
        self._has_residual_drift = self._has_input_drift = False
        self._count = 0
        self._waiting: list[_Positions] = []
        self._held: list[_Positions] = []

    def add(
        self,
        quantized_inputs: Array,
        unquantized_inputs: Array | None = None,
        drift: Array | None = None,
        weights: Array | None = None,
        *,
        is_held_out: bool = False,
    ) -> None:
        """Add a document's inputs, float32 [n, columns], in the quantized and, if known, the unquantized model.

        drift: float32 [n, rows], how much the residual stream that the matrix's output is added to has drifted.
        weights: float32 [n] >= 0, the weight of a squared error at each position; None: 1. is_held_out: put the
        positions into `Moments.held_out` instead of the sums.
        """
        own = quantized_inputs
        input_drift = None if unquantized_inputs is None else unquantized_inputs - own
        if weights is not None:
            roots = np.sqrt(weights)[:, None]
            own = own * roots
            input_drift = None if input_drift is None else input_drift * roots
            drift = None if drift is None else drift * roots
        positions = _Positions(own, input_drift, drift)
        if is_held_out:
            self._held.append(positions)
            return
        self._waiting.append(positions)
        if sum(each.own.size for each in self._waiting) >= MIN_BATCH_VALUES:
            self._sum_waiting()

    def moments(self) -> Moments:
        """Return the sums."""
        self._sum_waiting()
        for start in range(0, len(self._hessian), COLUMN_CHUNK):
            stop = start + COLUMN_CHUNK
            self._hessian[start:stop, stop:] = self._hessian[stop:, start:stop].T
        input_drift = self._input_drift if self._has_input_drift else None
        residual = self._residual_drift if self._has_residual_drift else None
        return Moments(self._hessian, input_drift, residual, self._count, self._held_out())

    def _held_out(self) -> HeldOut | None:
        if not self._held:
            return None
        held = _concatenate(self._held)
        if held.input_drift is None and held.drift is None:
            return HeldOut(held.own)
        if self._weight is None:
            raise AssertionError("the target of held-out positions needs the matrix")
        full: Array = held.own if held.input_drift is None else np.add(held.own, held.input_drift, dtype=np.float32)
        target: Array = np.matmul(full, self._weight.T, dtype=np.float32)
        if held.drift is not None:
            target += held.drift
        return HeldOut(held.own, target)

    def _sum_waiting(self) -> None:
        """Add the waiting documents to the sums."""
        if not self._waiting:
            return
        own, input_drift, drift = _concatenate(self._waiting)
        self._waiting.clear()
        self._count += len(own)
        for start in range(0, own.shape[1], COLUMN_CHUNK):  # the lower half only, without a temporary whole matrix
            columns = slice(start, start + COLUMN_CHUNK)
            self._hessian[start:, columns] += own[:, start:].T @ own[:, columns]
        if input_drift is not None:
            if self._input_drift is not None:
                self._input_drift += input_drift.T @ own
                self._has_input_drift = True
            elif self._weight is not None:
                missed = input_drift @ self._weight.T
                drift = missed if drift is None else drift + missed
        if drift is not None:
            self._residual_drift += drift.T @ own
            self._has_residual_drift = True


class _Positions(NamedTuple):
    """Weighted positions of documents. Either all documents of a matrix have `input_drift` or none; so with `drift`."""

    own: Array
    input_drift: Array | None
    drift: Array | None


def _concatenate(parts: list[_Positions]) -> _Positions:
    own, input_drift, drift = ([each for each in column if each is not None] for column in zip(*parts, strict=True))
    return _Positions(
        np.concatenate(own),
        np.concatenate(input_drift) if input_drift else None,
        np.concatenate(drift) if drift else None,
    )
