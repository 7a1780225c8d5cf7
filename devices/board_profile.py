"""Board profiles: the known facts about each board, one TOML file per board, read and validated here.

Knows nothing of the machine on which it runs: that is `detect.py`.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from edgelm.errors import DeviceError
from edgelm.system.files import read_toml

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    cores: int
    max_mhz: int
    features: tuple[str, ...]
    threads: int


@dataclass(frozen=True, slots=True)
class BoardMemory:
    """Available memory sizes in GB, and the bandwidth in GB/s (1e9 bytes/s) with its source."""

    sizes_gb: tuple[int, ...]
    bandwidth_gb_s: float
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
    return _build(BoardProfile, table, path.name)


T = TypeVar("T")


def _build(kind: type[T], table: Mapping[str, Any], file: str, prefix: str = "") -> T:
    """Build a dataclass from a TOML table; `prefix` precedes the keys in error messages."""
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(table) - set(hints)):
        raise DeviceError(f"{file}: unknown key {prefix}{unknown[0]}; allowed: {', '.join(hints)}")
    fields: Mapping[str, dataclasses.Field[Any]] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in table]:
        raise DeviceError(f"{file}: missing key {prefix}{missing[0]}")
    return kind(**{name: _value(hints[name], value, file, prefix + name) for name, value in table.items()})


def _value(hint: Any, value: Any, file: str, key: str) -> Any:
    """Convert one TOML value to a field's type: a scalar, a tuple of scalars, or another dataclass."""
    kind = next(kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise DeviceError(f"{file}: {key} must be a list, got {value!r}")
        return tuple(_value(kind, entry, file, key) for entry in value)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise DeviceError(f"{file}: {key} must be a table, got {value!r}")
        return _build(kind, value, file, key + ".")  # type: ignore[arg-type]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise DeviceError(f"{file}: {key} must be of type {kind.__name__}, got {value!r}")
    return value
