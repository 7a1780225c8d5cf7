"""Returns freed memory to the operating system; the C library keeps it if smaller allocations lie above it."""

from __future__ import annotations

import ctypes


def release_free_memory() -> None:
    """Return freed memory to the system if the C library has glibc's malloc_trim. Takes a few ms."""
    if _trim is not None:
        _trim(0)


def _find_trim() -> ctypes._NamedFuncPointer | None:
    try:
        found: ctypes._NamedFuncPointer = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # no dlopen of the process itself, or another C library
        return None
    return found


_trim = _find_trim()
