"""Memory of this process, temperature and throttling of the board. None if the kernel does not report a value."""

from __future__ import annotations

import os
from pathlib import Path

from edgelm.system.sensors import read_temperature, read_throttling


def read_rss_mb() -> float | None:
    """Return the resident memory of this process in MB (10^6 bytes)."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def read_temp_c() -> float | None:
    """Return the temperature of the processor in degrees Celsius."""
    celsius = read_temperature()
    return None if celsius is None else round(celsius, 1)


def read_throttled() -> bool | None:
    """Return whether a Raspberry Pi is throttled now because of heat or low voltage."""
    throttling = read_throttling()
    return None if throttling is None else bool(throttling.now)
