"""How onnxruntime's threads are set: what was measured on this board, kept beside the packed weights."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Final

from edgelm.system.board_cache import BoardCache, CacheKey

THREADS_LIMIT: Final = 256
"""Most threads that may be asked for."""


@dataclass(frozen=True, slots=True)
class ThreadSettings:
    """Threads of one operator, and whether idle ones wait actively: quicker to wake, and never idle."""

    threads: int
    spin: bool = True


def count_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Return the number of cores this process may run on, at most 4: decoding is bound by memory, not by cores."""
    return min(4, count_cores())


def load_tuning(cache: BoardCache, key: CacheKey) -> ThreadSettings | None:
    """Return what was measured to be best; None where nothing was, or for more cores than there are now."""
    entry = cache.find(key)
    threads, spin = (entry.metadata.get(name) if entry is not None else None for name in ("threads", "spin"))
    if not isinstance(threads, int) or not isinstance(spin, bool) or not 1 <= threads <= count_cores():
        return None
    return ThreadSettings(threads, spin)


def save_tuning(cache: BoardCache, key: CacheKey, tuning: ThreadSettings, bundle: str) -> bool:
    """Keep what was measured for a bundle instead of an earlier outcome; return whether that was possible."""
    cache.drop(key)
    return cache.make(key, 0, lambda _folder: {**asdict(tuning), "bundle": bundle}) is not None
