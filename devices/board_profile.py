"""What is known of each board beforehand: one TOML file a board, read and validated here.

Knows nothing of the machine it runs on: `board.py` looks at that.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from edgelm.errors import DeviceError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Mapping

PROFILES: Final = Path(__file__).parent
"""The folder of the profiles that ship with edgelm."""


@dataclass(frozen=True, slots=True)
class BoardMatch:
    """How the board is told from others. `device_tree`: beginnings of /proc/device-tree/model."""

    machine: str
    """What `uname -m` prints."""
    device_tree: tuple[str, ...] = ()
    implementer: str | None = None
    """"CPU implementer" of /proc/cpuinfo, hexadecimal, as "0x41" for Arm."""
    part: str | None = None
    """"CPU part" of /proc/cpuinfo, hexadecimal."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor: clock in MHz, features as /proc/cpuinfo spells them, threads for inference."""

    core: str
    cores: int
    max_mhz: int
    features: tuple[str, ...]
    threads: int


@dataclass(frozen=True, slots=True)
class BoardMemory:
    """Sizes sold, in GB, and the bandwidth in GB/s (1e9 bytes) with where that figure is from."""

    sizes_gb: tuple[int, ...]
    bandwidth_gb_s: float
    bandwidth_source: str


@dataclass(frozen=True, slots=True)
class Emulation:
    """QEMU's name for the processor, and the part number that this processor goes by."""

    qemu_cpu: str
    part: str


@dataclass(frozen=True, slots=True)
class BoardProfile:
    """What is known of a board. A part that is None is not known: the profile stands for many machines."""

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
    """Read every profile of a folder, by name, in alphabetical order."""
    return {profile.name: profile for profile in map(read_profile, sorted(folder.glob("*.toml")))}


def load_profile(name: str) -> BoardProfile:
    """Return the profile of that name, or the one in the file, where `name` is a path that ends in .toml.

    Raises
    ------
    DeviceError
        No such profile, or a file that is not a valid one.
    """
    if name.endswith(".toml"):
        return read_profile(Path(name))
    profiles = load_profiles()
    if name not in profiles:
        raise DeviceError(f"no board is called {name!r}; known: {', '.join(profiles)}, or the path of a .toml file")
    return profiles[name]


def read_profile(path: Path) -> BoardProfile:
    """Read one TOML file. Raises `DeviceError` on unknown, missing or wrongly typed keys."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"cannot read the board profile {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise DeviceError(f"{path} is not TOML: {error}") from error
    return _build(BoardProfile, table, path.name)


T = TypeVar("T")


def _build(kind: type[T], table: Mapping[str, Any], file: str, prefix: str = "") -> T:
    """Make a dataclass of a TOML table; `prefix` comes before the names of its keys in errors."""
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(table) - set(hints)):
        raise DeviceError(f"{file}: unknown key {prefix}{unknown[0]}; allowed: {', '.join(hints)}")
    fields: Mapping[str, dataclasses.Field[Any]] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in table]:
        raise DeviceError(f"{file}: missing key {prefix}{missing[0]}")
    return kind(**{name: _value(hints[name], value, file, prefix + name) for name, value in table.items()})


def _value(hint: Any, value: Any, file: str, key: str) -> Any:
    """Check one TOML value against a field's type: a scalar, a tuple of scalars, or another dataclass."""
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
