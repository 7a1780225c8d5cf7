"""The machine at hand: which board it is, its processor, memory, temperature and throttling, as Linux tells.

Knows nothing of models. Every reader takes the root of the file system, and gives None for what is not told.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from .profile import Profile, load_profiles

ROOT: Final = Path("/")

THROTTLED_BITS: Final = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}
"""What the Raspberry Pi's firmware reports: these bits for now, the same 16 higher for since boot."""


@dataclass(frozen=True, slots=True)
class Throttling:
    """What holds a Raspberry Pi back now, and what did since boot; values of `THROTTLED_BITS`."""

    now: tuple[str, ...]
    since_boot: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """A machine as found. Memory in bytes, temperature in degrees Celsius; None where nothing tells."""

    profile: Profile | None
    matched_by: Literal["device tree", "processor", "machine"] | None
    """By what the profile was chosen: another board may have the same processor."""
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


def detect(root: Path = ROOT, machine: str | None = None) -> Board:
    """Look at this machine, or at the one whose file system lies under `root`.

    Parameters
    ----------
    root
        Where proc/ and sys/ are.
    machine
        What `uname -m` prints there; None asks this machine.
    """
    machine = machine or platform.machine()
    blocks = _read_cpuinfo(root)
    first = blocks[0] if blocks else {}
    model = _read(root / "proc/device-tree/model")
    implementer, part = first.get("CPU implementer"), first.get("CPU part")
    profile, matched_by = _match(model, machine, implementer, part)
    memory = _read_meminfo(root)
    return Board(
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
        throttling=read_throttling(root),
    )


def read_temperature(root: Path = ROOT) -> float | None:
    """Return the temperature of the processor in degrees Celsius: the hottest of its sensors, else of all."""
    found: list[tuple[bool, float]] = []
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        kind, text = _read(zone / "type") or "", _read(zone / "temp")
        # A sensor that is switched off reads as absurdly cold, or cannot be read at all.
        if text and re.fullmatch(r"-?\d+", text) and int(text) > -100_000:
            found.append((any(word in kind.lower() for word in ("cpu", "pkg", "soc")), int(text) / 1000))
    of_processor = [celsius for is_processor, celsius in found if is_processor]
    return max(of_processor or [celsius for _, celsius in found], default=None)


def read_throttling(root: Path = ROOT) -> Throttling | None:
    """Return what a Raspberry Pi's firmware says of throttling; None on any other machine."""
    files = sorted((root / "sys/devices/platform").glob("soc*/*firmware/get_throttled"))
    text = next(filter(None, map(_read, files)), None)
    if text is None and root == ROOT and (tool := shutil.which("vcgencmd")):
        done = subprocess.run([tool, "get_throttled"], capture_output=True, text=True, timeout=10, check=False)
        text = done.stdout.strip().removeprefix("throttled=")
    try:
        bits = int(text or "", 16)
    except ValueError:
        return None
    now, since_boot = (
        tuple(name for bit, name in THROTTLED_BITS.items() if bits >> (bit + shift) & 1) for shift in (0, 16)
    )
    return Throttling(now, since_boot)


def _match(
    model: str | None, machine: str, implementer: str | None, part: str | None
) -> tuple[Profile | None, Literal["device tree", "processor", "machine"] | None]:
    """Choose the profile: by the name of the board, else by its processor, else by its architecture."""
    profiles = list(load_profiles().values())
    if model:
        for profile in profiles:
            # The space keeps "Raspberry Pi 4 " from matching "Raspberry Pi 400".
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
    for block in re.split(r"\n\s*\n", _read(root / "proc/cpuinfo") or ""):
        lines = (line.partition(":") for line in block.splitlines())
        table = {key.strip(): value.strip() for key, _, value in lines}
        if "processor" in table:
            blocks.append(table)
    return blocks


def _read_meminfo(root: Path) -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    text = _read(root / "proc/meminfo") or ""
    return {key: int(kib) * 1024 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _read(path: Path) -> str | None:
    """Return a small text file, stripped; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n") or None
    except OSError:
        return None
