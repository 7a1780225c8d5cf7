"""Detection of this board: its profile, processor, memory, temperature and throttling, as Linux reports them.

Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgelm.system.memory import read_meminfo
from edgelm.system.sensors import ROOT, Throttling, parse_throttling, read_temperature, read_text, read_throttling

from .board_profile import BoardProfile, load_profiles


@dataclass(frozen=True, slots=True)
class DetectedBoard:
    """A machine. Memory in bytes, temperature in degrees Celsius; None if Linux does not report a value."""

    profile: BoardProfile | None
    matched_by: Literal["device tree", "processor", "machine"] | None
    """The fact that selected the profile. By processor it may be another board with the same processor."""
    model: str | None
    machine: str
    processor: str | None
    implementer: str | None
    part: str | None
    cores: int
    features: tuple[str, ...]
    memory_bytes: int | None
    memory_available_bytes: int | None
    temperature_c: float | None
    throttling: Throttling | None

    def to_dict(self) -> dict[str, Any]:
        """Return the board as JSON-ready values, its profile by name."""
        return dataclasses.asdict(self) | {"profile": self.profile.name if self.profile else None}


def detect_board(root: Path = ROOT, machine: str | None = None) -> DetectedBoard:
    """Detect this machine, or the one whose file system is at `root`.

    Parameters
    ----------
    root
        Folder that holds proc/ and sys/.
    machine
        The output of `uname -m` there; None is that of this machine.
    """
    machine = machine or platform.machine()
    blocks = _read_cpuinfo(root)
    first = blocks[0] if blocks else {}
    model = read_text(root / "proc/device-tree/model")
    implementer, part = first.get("CPU implementer"), first.get("CPU part")
    profile, matched_by = _match_profile(model, machine, implementer, part)
    memory = read_meminfo(root)
    return DetectedBoard(
        profile=profile,
        matched_by=matched_by,
        model=model,
        machine=machine,
        processor=first.get("model name") or (profile.cpu.core if profile and profile.cpu else None),
        implementer=implementer,
        part=part,
        cores=max(1, len(blocks)),
        features=tuple((first.get("Features") or first.get("flags") or "").split()),
        memory_bytes=memory.get("MemTotal"),
        memory_available_bytes=memory.get("MemAvailable"),
        temperature_c=read_temperature(root),
        throttling=read_throttling(root) or (_query_firmware() if root == ROOT else None),
    )


def _match_profile(
    model: str | None, machine: str, implementer: str | None, part: str | None
) -> tuple[BoardProfile | None, Literal["device tree", "processor", "machine"] | None]:
    """Select the profile by the device tree's model, else by the processor, else by the architecture."""
    profiles = list(load_profiles().values())
    if model:
        for profile in profiles:
            # With the space, "Raspberry Pi 4 " does not match "Raspberry Pi 400".
            if any(f"{model} ".startswith(start) for start in profile.match.device_tree):
                return profile, "device tree"
    for profile in profiles:
        match = profile.match
        if match.part and (match.implementer, match.part) == (implementer, part):
            return profile, "processor"
    for profile in profiles:
        if not profile.match.part and profile.match.machine == machine:
            return profile, "machine"
    return None, None


def _read_cpuinfo(root: Path) -> list[dict[str, str]]:
    """Return one table for each processor of /proc/cpuinfo."""
    blocks = []
    for block in re.split(r"\n\s*\n", read_text(root / "proc/cpuinfo") or ""):
        lines = (line.partition(":") for line in block.splitlines())
        table = {key.strip(): value.strip() for key, _, value in lines}
        if "processor" in table:
            blocks.append(table)
    return blocks


def _query_firmware() -> Throttling | None:
    """Return the throttling that the Raspberry Pi's vcgencmd reports, for kernels that do not report it."""
    tool = shutil.which("vcgencmd")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "get_throttled"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_throttling(done.stdout.strip().removeprefix("throttled="))
