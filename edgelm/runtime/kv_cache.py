"""Key/value memory: one preallocated buffer a layer, one row a request.

Pages of a fresh buffer are committed by the system when they are first written, so rows and positions that are never
used cost address space only. Knows nothing of onnxruntime.
"""

from __future__ import annotations

import mmap
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.manifest import KVCacheShape

Tokens = NDArray[np.int32]
KvSegment = list[NDArray[Any]]
"""Keys and values of every layer at some positions, float32 or int8 [kv_heads, n, head_size] each."""

NO_HUGE_PAGES_ADVICE: Final[int | None] = getattr(mmap, "MADV_NOHUGEPAGE", None)
"""Advice to the system not to use huge pages; only Linux takes it."""

FREE_PAGES_ADVICE: Final[int | None] = (
    getattr(mmap, "MADV_DONTNEED", None) if NO_HUGE_PAGES_ADVICE is not None else None
)
"""Advice to the system that pages are not wanted any more: on Linux they are zeros from then on."""


class KVCache:
    """Keys and values of every layer, [rows, kv_heads, capacity, head_size] each; float32, or int8 for 8 bits."""

    def __init__(self, cache: KVCacheShape, rows: int, capacity: int) -> None:
        shape = (rows, cache.kv_heads, capacity, cache.head_size)
        self.names = [f"{i}.{part}" for i in range(cache.layers) for part in ("key", "value")]
        kind = np.dtype(np.int8 if cache.bits == 8 else np.float32)
        self._memories = [_fresh(int(np.prod(shape)) * kind.itemsize) for _ in self.names]
        self.arrays = [np.frombuffer(memory, kind).reshape(shape) for memory in self._memories]

    def views(self, first: int, count: int) -> list[NDArray[Any]]:
        """Rows [first, first + count) of every buffer, as views."""
        return [array[first : first + count] for array in self.arrays]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row over another."""
        for array in self.arrays:
            array[target, :, :length] = array[source, :, :length]

    def read(self, row: int, start: int, stop: int) -> list[NDArray[Any]]:
        """Return copies of positions [start, stop) of a row, [kv_heads, n, head_size] for each buffer."""
        return [array[row, :, start:stop].copy() for array in self.arrays]

    def write(self, row: int, start: int, piece: list[NDArray[Any]]) -> None:
        """Put what `read` returned into a row, from `start` on."""
        for array, values in zip(self.arrays, piece, strict=True):
            array[row, :, start : start + values.shape[1]] = values

    def release_row(self, row: int) -> None:
        """Give a row's memory back to the system, in whole pages; what the row held is lost."""
        if FREE_PAGES_ADVICE is None:
            return
        for array, memory in zip(self.arrays, self._memories, strict=True):
            if isinstance(memory, mmap.mmap):
                size = array[row].nbytes
                start = -(-row * size // mmap.PAGESIZE) * mmap.PAGESIZE
                stop = (row + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
                if stop > start:
                    memory.madvise(FREE_PAGES_ADVICE, start, stop - start)


def _fresh(size: int) -> mmap.mmap | bytearray:
    """Return zeros that take memory page by page; NumPy's own would take it 2 MB at a time, most of it never used."""
    if NO_HUGE_PAGES_ADVICE is None:
        return bytearray(size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(NO_HUGE_PAGES_ADVICE)
    return memory
