"""What a process and a machine do, in numbers: resident memory, memory bandwidth. Linux, from /proc."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Final

import numpy as np

COPY_BYTES: Final = 1 << 27
"""Bytes each thread reads and writes a round: far larger than any cache."""


def measure_memory_mb() -> dict[str, float]:
    """Return resident, private and peak resident memory in MB (10^6 bytes); empty where /proc has none."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return {}
    fields = {line.split(":")[0]: line.split() for line in (status + rollup).splitlines()}
    private = sum(int(fields[name][1]) for name in ("Private_Clean", "Private_Dirty") if name in fields)
    return {
        "rss_mb": int(fields["VmRSS"][1]) * 1.024e-3,
        "rss_peak_mb": int(fields["VmHWM"][1]) * 1.024e-3,
        "rss_private_mb": private * 1.024e-3,
    }


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
