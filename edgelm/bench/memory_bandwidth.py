"""Measures the memory bandwidth of this machine."""

from __future__ import annotations

import threading
import time
from typing import Final

import numpy as np

READ_BYTES: Final = 1 << 27
"""Bytes that each thread reads per round: far larger than any CPU cache."""


def measure_bandwidth_gb_s(threads: int, seconds: float = 1.0) -> float:
    """Return the read bandwidth in GB/s (10^9): the best round of `threads` threads that scan large arrays."""
    arrays = [np.ones(READ_BYTES // 8, np.int64) for _ in range(threads)]
    best, end = 0.0, time.monotonic() + seconds
    while best == 0.0 or time.monotonic() < end:
        workers = [threading.Thread(target=array.max) for array in arrays]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, threads * READ_BYTES / (time.perf_counter() - start) / 1e9)
    return best
