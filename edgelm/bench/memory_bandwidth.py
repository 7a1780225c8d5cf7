"""The memory bandwidth of this machine, measured."""

from __future__ import annotations

import threading
import time
from typing import Final

import numpy as np

COPY_BYTES: Final = 1 << 27
"""Bytes each thread reads and writes a round: far larger than any cache."""


def memory_bandwidth_gb_s(threads: int, seconds: float = 1.0) -> float:
    """Return the read bandwidth in GB/s (10^9): `threads` threads sum arrays larger than the caches; the best round."""
    arrays = [np.ones(COPY_BYTES // 8, np.int64) for _ in range(threads)]
    best, end = 0.0, time.monotonic() + seconds
    while best == 0.0 or time.monotonic() < end:
        workers = [threading.Thread(target=array.max) for array in arrays]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, threads * COPY_BYTES / (time.perf_counter() - start) / 1e9)
    return best
