"""Memory of this process, temperature and throttling of the board. None if the kernel does not report a value."""

from __future__ import annotations

from edgelm.system.memory import read_process_memory
from edgelm.system.sensors import read_temperature, read_throttling


def read_rss_mb() -> float | None:
    """Return the resident memory of this process in MB (10^6 bytes)."""
    try:
        return round(read_process_memory().resident / 1e6, 1)
    except OSError:
        return None


def read_temp_c() -> float | None:
    """Return the temperature of the processor in degrees Celsius."""
    celsius = read_temperature()
    return None if celsius is None else round(celsius, 1)


def read_throttled() -> bool | None:
    """Return whether a Raspberry Pi is throttled now because of heat or low voltage."""
    throttling = read_throttling()
    return None if throttling is None else bool(throttling.now)
