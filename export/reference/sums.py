"""Moments of a matrix in the making: sums over documents, some of them at a time."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..quantize.moments import Moments

COLUMNS: Final = 512
"""Columns of a sum that are added to at once."""

TOGETHER: Final = 1 << 21
"""Values, at least, of the inputs whose products are summed at once: 8 MB."""

Array = NDArray[np.float32]


class Sums:
    """Moments of a matrix [rows, columns] in the making.

    What it is to make up for is summed in whichever form is smaller: of its inputs [columns, columns], or of its
    outputs [rows, columns], where the drift of a residual stream that it adds to belongs in any case. Documents wait
    until there are enough of them: long products are quicker than many short ones, and disturb what runs between less.
    """

    def __init__(self, shape: tuple[int, int], weight: Array | None = None, *, wide: bool = False) -> None:
        """`weight` [rows, columns] is needed where there are fewer rows than columns; `wide` sums in float32."""
        rows, columns = shape
        self.wide = wide
        kind = np.dtype(np.float32 if wide else np.float64)
        self._weight = weight
        self._second: NDArray[Any] = np.zeros((columns, columns), kind)
        self._cross: NDArray[Any] | None = np.zeros((columns, columns), kind) if columns <= rows else None
        self._residual: NDArray[Any] = np.zeros((rows, columns), kind)
        self._is_added = False
        self._count = self._followed = 0
        self._owns: list[Array] = []
        self._apart: list[tuple[Array, Array, Array | None]] = []

    def add(self, own: Array, full: Array | None = None, drift: Array | None = None) -> None:
        """Add a document: inputs [n, columns] in the quantized model and, where it is followed, in the other.

        `drift` [n, rows] is how far apart the residual streams are that the matrix adds to.
        """
        self._owns.append(own)
        if full is not None:
            self._apart.append((own, full - own, drift))
        if sum(own.size for own in self._owns) >= TOGETHER:
            self._add_up()

    def moments(self) -> Moments:
        """Return the sums, those over followed positions scaled to all."""
        self._add_up()
        for start in range(0, len(self._second), COLUMNS):
            stop = start + COLUMNS
            self._second[start:stop, stop:] = self._second[stop:, start:stop].T
        scale = self._count / max(self._followed, 1)
        if self._cross is not None:
            self._cross *= scale
        if self._is_added:
            self._residual *= scale
        return Moments(self._second, self._cross, self._residual if self._is_added else None, self._count)

    def _add_up(self) -> None:
        """Add the documents that wait."""
        if not self._owns:
            return
        own = np.concatenate(self._owns)
        self._owns.clear()
        self._count += len(own)
        for start in range(0, own.shape[1], COLUMNS):  # the lower half, without a second whole matrix
            columns = slice(start, start + COLUMNS)
            self._second[start:, columns] += own[:, start:].T @ own[:, columns]
        del own
        if not self._apart:
            return
        owns, differences, drifts = zip(*self._apart, strict=True)
        self._apart.clear()
        own, apart = np.concatenate(owns), np.concatenate(differences)
        self._followed += len(own)
        missing = None if drifts[0] is None else np.concatenate(drifts)
        if self._cross is not None:
            self._cross += apart.T @ own
        elif self._weight is not None:
            missed = apart @ self._weight.T
            missing = missed if missing is None else missing + missed
        if missing is not None:
            self._residual += missing.T @ own
            self._is_added = True
