"""How the board is: memory of this process, temperature, throttling. None where the kernel does not tell."""

from __future__ import annotations

import os
from pathlib import Path

from edgelm.system.sensors import read_temperature, read_throttling


def rss_mb() -> float | None:
    """Return the process's resident memory in MB (10^6 bytes)."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def temp_c() -> float | None:
    """Return the processor's temperature in degrees Celsius."""
    celsius = read_temperature()
    return None if celsius is None else round(celsius, 1)


def is_throttled() -> bool | None:
    """Whether a Raspberry Pi has slowed down now, for heat or weak power."""
    throttling = read_throttling()
    return None if throttling is None else bool(throttling.now)
