"""Temperature and throttling of the board, from the kernel's files; None if the kernel does not report a value.

The parameter `root` is the root of the file system, which contains sys/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")

THROTTLED_BITS: Final = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}
"""Bits of the Raspberry Pi firmware's report: these for the present, shifted by 16 for the time since boot."""


@dataclass(frozen=True, slots=True)
class Throttling:
    """Causes of throttling of a Raspberry Pi, now and since boot; values of `THROTTLED_BITS`."""

    now: tuple[str, ...]
    since_boot: tuple[str, ...]


def read_temperature(root: Path = ROOT) -> float | None:
    """Return the CPU temperature in degrees Celsius: the hottest CPU sensor, or the hottest of all."""
    found: list[tuple[bool, float]] = []
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        kind, text = read_text(zone / "type") or "", read_text(zone / "temp")
        # A disabled sensor reports an impossibly low value or cannot be read.
        if text and re.fullmatch(r"-?\d+", text) and int(text) > -100_000:
            found.append((any(word in kind.lower() for word in ("cpu", "pkg", "soc")), int(text) / 1000))
    of_processor = [celsius for is_processor, celsius in found if is_processor]
    return max(of_processor or [celsius for _, celsius in found], default=None)


def read_throttling(root: Path = ROOT) -> Throttling | None:
    """Return the throttling that a Raspberry Pi's firmware reports; None on other machines."""
    # The path is soc/soc:firmware up to the Pi 4, soc@107c000000/soc@107c000000:firmware on the Pi 5.
    files = sorted((root / "sys/devices/platform").glob("soc*/*firmware/get_throttled"))
    return parse_throttling(next(filter(None, map(read_text, files)), ""))


def parse_throttling(text: str) -> Throttling | None:
    """Return the meaning of the firmware's hexadecimal number; None if it is not a number."""
    try:
        bits = int(text, 16)
    except ValueError:
        return None
    now, since_boot = (
        tuple(name for bit, name in THROTTLED_BITS.items() if bits >> (bit + shift) & 1) for shift in (0, 16)
    )
    return Throttling(now, since_boot)


def read_text(path: Path) -> str | None:
    """Return a kernel file's text, stripped; None if it cannot be read or is empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n") or None
    except OSError:
        return None
