"""Where a user's files of a program lie (XDG Base Directory Specification 0.8), also for users that have no home."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

Kind = Literal["cache", "data", "state"]

_PLACES: Final[dict[Kind, tuple[str, str, str]]] = {
    "cache": ("XDG_CACHE_HOME", ".cache", "/var/cache"),
    "data": ("XDG_DATA_HOME", ".local/share", "/var/lib"),
    "state": ("XDG_STATE_HOME", ".local/state", "/var/lib"),
}
"""For each kind: the variable, the folder at home, and the system's for who has neither, such as a service's user."""


def home() -> Path | None:
    """Return the user's home; None where neither HOME nor the list of users has one."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def user_folder(kind: Kind) -> Path:
    """Return where edgelm's files of a kind lie, or would. A variable that is no absolute path does not count."""
    variable, at_home, of_system = _PLACES[kind]
    named = Path(os.environ.get(variable) or "")
    place = home()
    if named.is_absolute():
        base = named
    elif place is not None:
        base = place / at_home
    else:
        base = Path(of_system)
    return base / "edgelm"
