"""Matrices that are read a few rows at a time, so that large ones are never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES: Final = 32 << 20
"""Maximum bytes of one chunk of a matrix in float32."""

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LazyMatrix:
    """A matrix float32 [N, K] that is not read yet; `read(start, stop)` returns rows [start, stop)."""

    shape: tuple[int, int]
    read: Callable[[int, int], Array]

    @classmethod
    def from_array(cls, array: Array) -> LazyMatrix:
        """Wrap a matrix that is in memory."""
        return cls((array.shape[0], array.shape[1]), lambda start, stop: array[start:stop])

    def read_all(self) -> Array:
        """Return all rows."""
        return self.read(0, self.shape[0])

    def chunks(self) -> Iterator[Array]:
        """Yield the rows in order, in chunks of at most `CHUNK_BYTES`."""
        rows, columns = self.shape
        step = max(1, CHUNK_BYTES // (4 * columns))
        for start in range(0, rows, step):
            yield self.read(start, min(start + step, rows))
