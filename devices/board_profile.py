"""Board profiles: the known facts about each board, one TOML file per board, read and validated here.

Knows nothing of the machine on which it runs: that is `detect.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from edgelm.errors import DeviceError
from edgelm.system.files import read_toml
from edgelm.validation import FieldError, Range, read

PROFILES: Final = Path(__file__).parent
"""The folder of the profiles that ship with edgelm."""


@dataclass(frozen=True, slots=True)
class BoardMatch:
    """How a board is recognized. `device_tree`: prefixes of /proc/device-tree/model, one per product of the family."""

    machine: str
    """The output of `uname -m`."""
    device_tree: tuple[str, ...] = ()
    implementer: str | None = None
    """"CPU implementer" of /proc/cpuinfo, hexadecimal, as "0x41" for Arm."""
    part: str | None = None
    """"CPU part" of /proc/cpuinfo, hexadecimal."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor: clock in MHz, features as in /proc/cpuinfo, threads for inference."""

    core: str
    cores: Annotated[int, Range(1, 4096)]
    max_mhz: Annotated[int, Range(1, 100_000)]
    features: tuple[str, ...]
    threads: Annotated[int, Range(1, 256)]


@dataclass(frozen=True, slots=True)
class BoardMemory:
    """Available memory sizes in GB, and the bandwidth in GB/s (1e9 bytes/s) with its source."""

    sizes_gb: tuple[Annotated[int, Range(1, 100_000)], ...]
    bandwidth_gb_s: Annotated[float, Range(0, 100_000, open_low=True)]
    bandwidth_source: str


@dataclass(frozen=True, slots=True)
class Emulation:
    """QEMU's name of the processor (QEMU_CPU), and the CPU part number that this processor reports."""

    qemu_cpu: str
    part: str


@dataclass(frozen=True, slots=True)
class BoardProfile:
    """The known facts about a board. cpu, memory and emulation are None for a profile that covers many machines."""

    name: str
    title: str
    match: BoardMatch
    cpu: Cpu | None = None
    memory: BoardMemory | None = None
    emulation: Emulation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON-ready values."""
        return dataclasses.asdict(self)


def load_profiles(folder: Path = PROFILES) -> dict[str, BoardProfile]:
    """Read every profile of a folder; return them by name, in alphabetical order."""
    return {profile.name: profile for profile in map(read_profile, sorted(folder.glob("*.toml")))}


def load_profile(name: str) -> BoardProfile:
    """Return the profile of that name, or read the file if `name` is a path that ends in .toml.

    Raises
    ------
    DeviceError
        There is no such profile, or the file is not a valid profile.
    """
    if name.endswith(".toml"):
        return read_profile(Path(name))
    profiles = load_profiles()
    if name not in profiles:
        raise DeviceError(
            f"there is no board profile {name!r}; known: {', '.join(profiles)}, or the path of a .toml file"
        )
    return profiles[name]


def read_profile(path: Path) -> BoardProfile:
    """Read one TOML file. Raises `DeviceError` on unknown, missing or wrongly typed keys."""
    try:
        table = read_toml(path)
    except OSError as error:
        raise DeviceError(f"cannot read the board profile {path}: {error.strerror}") from error
    except ValueError as error:
        raise DeviceError(f"{path} is not TOML: {error}") from error
    try:
        return read(BoardProfile, table)
    except FieldError as error:
        raise DeviceError(f"{path.name}: {error}") from error
