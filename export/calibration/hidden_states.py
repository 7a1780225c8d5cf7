"""Hidden states of many documents, as float32, or in half the memory as float16 with one scale for each position."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class HiddenStates:
    """One float32 array [n, width] for each numbered document.

    With `is_float16` values keep 11 significant bits at any magnitude: half the memory, but the conversion takes longer
    than many matrix products.
    """

    def __init__(self, arrays: Iterable[tuple[int, Array]] = (), *, is_float16: bool = False) -> None:
        self._is_float16 = is_float16
        self._stored: dict[int, tuple[NDArray[np.float16], Array] | Array] = {}
        for document, array in arrays:
            self[document] = array

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, document: int) -> bool:
        return document in self._stored

    def __getitem__(self, document: int) -> Array:
        stored = self._stored[document]
        if not isinstance(stored, tuple):
            return stored
        halves, scales = stored
        return halves.astype(np.float32) * scales

    def __setitem__(self, document: int, array: Array) -> None:
        if not self._is_float16:
            self._stored[document] = array
            return
        scales = np.maximum(np.abs(array).max(axis=1, keepdims=True), np.float32(1e-30))
        self._stored[document] = (array / scales).astype(np.float16), scales
