"""Hidden states of many documents in half the memory: float16 with one scale a position."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class States:
    """One float32 [n, width] for each numbered document, kept to 11 significant bits; any size of value is held."""

    def __init__(self, arrays: Iterable[tuple[int, Array]] = ()) -> None:
        self._stored = {document: _narrow(array) for document, array in arrays}

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, document: int) -> bool:
        return document in self._stored

    def __getitem__(self, document: int) -> Array:
        halves, scales = self._stored[document]
        return halves.astype(np.float32) * scales

    def __setitem__(self, document: int, array: Array) -> None:
        self._stored[document] = _narrow(array)


def _narrow(array: Array) -> tuple[NDArray[np.float16], Array]:
    scales = np.maximum(np.abs(array).max(axis=1, keepdims=True), np.float32(1e-30))
    return (array / scales).astype(np.float16), scales
