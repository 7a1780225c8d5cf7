"""The user's folders for cache, data and state (XDG Base Directory Specification 0.8).

The only importer of platformdirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

FolderKind = Literal["cache", "data", "state"]


def user_folder(kind: FolderKind) -> Path:
    """Return the absolute path of the user's folder of a kind, which need not exist.

    A user without a home, such as a service's, gets the system's folder. A relative HOME or XDG variable is ignored.
    """
    from platformdirs.unix import Unix  # on macOS too: the folders must not change

    folders = Unix("edgelm", appauthor=False)
    try:
        folder = Path(getattr(folders, f"user_{kind}_dir"))
    except RuntimeError:
        folder = Path()
    if folder.is_absolute():
        return folder
    return Path(folders.site_cache_dir if kind == "cache" else folders.site_state_dir)
