"""The memory of this process and of the machine. The only reader of /proc/self/status, smaps_rollup and /proc/meminfo.

psutil (1 MB on disk and in memory) could replace half of this module: it reports no peak and no control group limit,
and supports no other root of the file system.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgelm.system.sensors import ROOT, read_text

_STATUS: Final = Path("/proc/self/status")
_ROLLUP: Final = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """The memory of this process in bytes: resident, its peak, and the size of the address space."""

    resident: int
    peak_resident: int
    address_space: int


def read_process_memory() -> ProcessMemory:
    """Return the memory of this process. Raises `OSError` if the kernel does not report it."""
    fields = _parse_sizes(_STATUS.read_text(encoding="ascii", errors="replace"))
    try:
        return ProcessMemory(fields["VmRSS"], fields["VmHWM"], fields["VmSize"])
    except KeyError as error:
        raise OSError(f"{_STATUS} has no {error}") from error


def measure_memory_mb() -> dict[str, float]:
    """Return resident, private and peak resident memory in MB (10^6 bytes); empty if the kernel does not report it."""
    try:
        memory = read_process_memory()
        rollup = _parse_sizes(_ROLLUP.read_text(encoding="ascii"))
    except OSError:
        return {}
    return {
        "rss_mb": memory.resident / 1e6,
        "rss_peak_mb": memory.peak_resident / 1e6,
        "rss_private_mb": (rollup.get("Private_Clean", 0) + rollup.get("Private_Dirty", 0)) / 1e6,
    }


def read_meminfo(root: Path = ROOT) -> dict[str, int]:
    """Return the fields of /proc/meminfo in bytes; empty if there is no such file."""
    return _parse_sizes(read_text(root / "proc/meminfo") or "")


def read_memory_mb(root: Path = ROOT) -> float | None:
    """Return the memory of the machine in MB (10^6 bytes), or the limit of this process's control group if lower."""
    found = [size for name, size in read_meminfo(root).items() if name == "MemTotal"]
    limit = read_text(root / "sys/fs/cgroup/memory.max") or ""
    if limit.isdigit():
        found.append(int(limit))
    return min(found) / 1e6 if found else None


def _parse_sizes(text: str) -> dict[str, int]:
    """Return the sizes of a table of "name: number kB" lines, in bytes."""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
