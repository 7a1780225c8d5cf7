"""Arrays in front of a page without access rights: a kernel that reads or writes behind them crashes the test."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_kept = []


def guarded(array):
    """Return a copy of an array whose end is followed by a guard page."""
    array = np.asarray(array, order="C")
    size = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _LIBC.mprotect(start + size, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    _kept.append(memory)  # malloc must not reuse a page without access rights
    del _kept[:-64]
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy
