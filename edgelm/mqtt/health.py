"""How the board is: memory of this process, temperature, throttling. None where the kernel does not tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_THROTTLED: Final = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")  # Raspberry Pi
_ZONES: Final = Path("/sys/class/thermal")


def rss_mb() -> float | None:
    """Return the process's resident memory in MB (10^6 bytes)."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def temp_c() -> float | None:
    """Return the hottest thermal zone's temperature in degrees Celsius."""
    readings = []
    for zone in _ZONES.glob("thermal_zone*/temp"):
        try:
            readings.append(int(zone.read_text("ascii")) / 1000)
        except (OSError, ValueError):  # a zone whose sensor is off
            continue
    return round(max(readings), 1) if readings else None


def is_throttled() -> bool | None:
    """Whether a Raspberry Pi has slowed down now, for heat or weak power."""
    try:
        return int(_THROTTLED.read_text("ascii"), 16) & 0xF != 0
    except (OSError, ValueError):
        return None
