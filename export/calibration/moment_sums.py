"""Moments of a matrix in the making: sums over documents, some of them at a time."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..quantize.moments import HeldOut, Moments

COLUMN_CHUNK: Final = 512
"""Columns of a sum that are added to at once."""

MIN_BATCH_VALUES: Final = 1 << 21
"""Values, at least, of the inputs whose products are summed at once: 8 MB."""

Array = NDArray[np.float32]


class MomentAccumulator:
    """Moments of a matrix [rows, columns] in the making.

    What it is to make up for is summed in whichever form is smaller: of its inputs [columns, columns], or of its
    outputs [rows, columns], where the drift of a residual stream that it adds to belongs in any case. Documents wait
    until there are enough of them: long products are quicker than many short ones, and disturb what runs between less.
    """

    def __init__(self, shape: tuple[int, int], weight: Array | None = None, *, wide: bool = False) -> None:
        """`weight` [rows, columns] is needed where there are fewer rows than columns; `wide` sums in float32."""
        rows, columns = shape
        kind = np.dtype(np.float32 if wide else np.float64)
        self._weight = weight
        self._second: NDArray[Any] = np.zeros((columns, columns), kind)
        self._input_drift: NDArray[Any] | None = np.zeros((columns, columns), kind) if columns <= rows else None
        self._residual_drift: NDArray[Any] = np.zeros((rows, columns), kind)
        self._has_residual_drift = self._has_input_drift = False
        self._count = 0
        self._waiting: list[_Positions] = []
        self._held: list[_Positions] = []

    def add(
        self,
        own: Array,
        full: Array | None = None,
        drift: Array | None = None,
        weights: Array | None = None,
        *,
        hold_back: bool = False,
    ) -> None:
        """Add a document: inputs [n, columns] in the quantized model and, where it is known, in the unquantized one.

        `drift` [n, rows] is how far apart the residual streams are that the matrix adds to. `weights` [n], 0 or more,
        says how much a squared error at each position counts; None: 1. With `hold_back` the positions go into
        `Moments.held_back` and not into the sums.
        """
        apart = None if full is None else full - own
        if weights is not None:
            roots = np.sqrt(weights)[:, None]
            own = own * roots
            apart = None if apart is None else apart * roots
            drift = None if drift is None else drift * roots
        positions = _Positions(own, apart, drift)
        if hold_back:
            self._held.append(positions)
            return
        self._waiting.append(positions)
        if sum(each.own.size for each in self._waiting) >= MIN_BATCH_VALUES:
            self._add_up()

    def moments(self) -> Moments:
        """Return the sums."""
        self._add_up()
        for start in range(0, len(self._second), COLUMN_CHUNK):
            stop = start + COLUMN_CHUNK
            self._second[start:stop, stop:] = self._second[stop:, start:stop].T
        cross = self._input_drift if self._has_input_drift else None
        residual = self._residual_drift if self._has_residual_drift else None
        return Moments(self._second, cross, residual, self._count, self._held_back())

    def _held_back(self) -> HeldOut | None:
        if not self._held:
            return None
        held = _concatenate(self._held)
        if held.apart is None and held.drift is None:
            return HeldOut(held.own)
        if self._weight is None:
            raise AssertionError("a target needs the matrix")
        full: Array = held.own if held.apart is None else np.add(held.own, held.apart, dtype=np.float32)
        target: Array = np.matmul(full, self._weight.T, dtype=np.float32)
        if held.drift is not None:
            target += held.drift
        return HeldOut(held.own, target)

    def _add_up(self) -> None:
        """Add the documents that wait."""
        if not self._waiting:
            return
        own, apart, drift = _concatenate(self._waiting)
        self._waiting.clear()
        self._count += len(own)
        for start in range(0, own.shape[1], COLUMN_CHUNK):  # the lower half, without a second whole matrix
            columns = slice(start, start + COLUMN_CHUNK)
            self._second[start:, columns] += own[:, start:].T @ own[:, columns]
        if apart is not None:
            if self._input_drift is not None:
                self._input_drift += apart.T @ own
                self._has_input_drift = True
            elif self._weight is not None:
                missed = apart @ self._weight.T
                drift = missed if drift is None else drift + missed
        if drift is not None:
            self._residual_drift += drift.T @ own
            self._has_residual_drift = True


class _Positions(NamedTuple):
    """Weighted positions of documents. Of one matrix either all documents have `apart`, or none; so with `drift`."""

    own: Array
    apart: Array | None
    drift: Array | None


def _concatenate(parts: list[_Positions]) -> _Positions:
    own, apart, drift = ([each for each in column if each is not None] for column in zip(*parts, strict=True))
    return _Positions(
        np.concatenate(own), np.concatenate(apart) if apart else None, np.concatenate(drift) if drift else None
    )
