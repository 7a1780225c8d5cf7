"""The KV cache: preallocated buffers of keys and values for each layer, with one row for each request.

The system commits the pages of a new buffer when they are first written, so rows and positions that are never used cost
only address space. Knows nothing of onnxruntime.
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
"""Advice to the system not to use huge pages; None on systems other than Linux."""

FREE_PAGES_ADVICE: Final[int | None] = (
    getattr(mmap, "MADV_DONTNEED", None) if NO_HUGE_PAGES_ADVICE is not None else None
)
"""Advice to the system to free pages: on Linux they read as zeros afterwards."""


class KVCache:
    """Keys and values of every layer, [rows, kv_heads, capacity, head_size] each; float32, or int8 for 8 bits."""

    def __init__(self, cache: KVCacheShape, rows: int, capacity: int) -> None:
        shape = (rows, cache.kv_heads, capacity, cache.head_size)
        self.names = [f"{i}.{part}" for i in range(cache.layers) for part in ("key", "value")]
        dtype = np.dtype(np.int8 if cache.bits == 8 else np.float32)
        self._buffers = [_allocate(int(np.prod(shape)) * dtype.itemsize) for _ in self.names]
        self.arrays = [np.frombuffer(buffer, dtype).reshape(shape) for buffer in self._buffers]

    def row_views(self, first: int, count: int) -> list[NDArray[Any]]:
        """Return views of rows [first, first + count) of every buffer."""
        return [array[first : first + count] for array in self.arrays]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row to the start of another."""
        for array in self.arrays:
            array[target, :, :length] = array[source, :, :length]

    def read_row(self, row: int, start: int, stop: int) -> list[NDArray[Any]]:
        """Return copies of positions [start, stop) of a row, [kv_heads, n, head_size] for each buffer."""
        return [array[row, :, start:stop].copy() for array in self.arrays]

    def write_row(self, row: int, start: int, segment: list[NDArray[Any]]) -> None:
        """Write a segment that `read_row` returned into a row, starting at position `start`."""
        for array, values in zip(self.arrays, segment, strict=True):
            array[row, :, start : start + values.shape[1]] = values

    def release_row(self, row: int) -> None:
        """Free the whole pages of a row; the content of the row is lost."""
        if FREE_PAGES_ADVICE is None:
            return
        for array, buffer in zip(self.arrays, self._buffers, strict=True):
            if isinstance(buffer, mmap.mmap):
                size = array[row].nbytes
                start = -(-row * size // mmap.PAGESIZE) * mmap.PAGESIZE
                stop = (row + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
                if stop > start:
                    buffer.madvise(FREE_PAGES_ADVICE, start, stop - start)


def _allocate(size: int) -> mmap.mmap | bytearray:
    """Return zeros that are committed in small pages. NumPy's arrays use huge pages of 2 MB, mostly never written."""
    if NO_HUGE_PAGES_ADVICE is None:
        return bytearray(size)
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(NO_HUGE_PAGES_ADVICE)
    return buffer
