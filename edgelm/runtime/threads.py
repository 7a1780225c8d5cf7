"""Settings of onnxruntime's threads: the defaults, and those tuned on this board, which the board cache keeps."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Final

from edgelm.system.board_cache import BoardCache, CacheKey

THREADS_LIMIT: Final = 256
"""Maximum number of threads."""


@dataclass(frozen=True, slots=True)
class ThreadSettings:
    """Threads of one operator, and whether idle threads spin: they start work sooner, but always use their core."""

    threads: int
    spin: bool = True


def count_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Return the number of cores this process may run on, at most 4: memory bandwidth limits decode, not cores."""
    return min(4, count_cores())


def load_tuning(cache: BoardCache, key: CacheKey) -> ThreadSettings | None:
    """Return the settings tuned on this board; None if there are none, or if they need more cores than there are."""
    entry = cache.find(key)
    threads, spin = (entry.metadata.get(name) if entry is not None else None for name in ("threads", "spin"))
    if not isinstance(threads, int) or not isinstance(spin, bool) or not 1 <= threads <= count_cores():
        return None
    return ThreadSettings(threads, spin)


def save_tuning(cache: BoardCache, key: CacheKey, tuning: ThreadSettings, bundle: str) -> bool:
    """Store the settings tuned for a bundle, in place of earlier ones; return whether the cache could store them."""
    cache.drop(key)
    return cache.make(key, 0, lambda _folder: {**asdict(tuning), "bundle": bundle}) is not None
