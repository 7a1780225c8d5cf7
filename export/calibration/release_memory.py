"""What was freed, given back to the system: the C library keeps it where smaller things lie above it."""

from __future__ import annotations

import ctypes


def release_free_memory() -> None:
    """Return freed memory to the system, where the C library has a call for it (glibc's malloc_trim); a few ms."""
    if _trim is not None:
        _trim(0)


def _find_trim() -> ctypes._NamedFuncPointer | None:
    try:
        found: ctypes._NamedFuncPointer = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # no dlopen of the process itself, or another C library
        return None
    return found


_trim = _find_trim()
