"""The user's bundles by name: one directory each below EDGELM_DATA_DIR, or below the user's data folder.

A bundle that `edgelm pull` makes has a file `<name>.json` beside it, which records its origin.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from edgelm.bundle.catalogue import MODEL_NAME_PATTERN, check_name, load_catalogue
from edgelm.errors import BundleError, EdgelmError
from edgelm.system.files import replace_file
from edgelm.system.user_folders import user_folder
from edgelm.validation import read, suggest_match

DATA_DIR_VARIABLE: Final = "EDGELM_DATA_DIR"
"""Environment variable that names the folder."""

BUILTIN: Final = "builtin"
BUILTIN_FOLDER: Final = Path(__file__).parents[1] / "builtin"


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of a bundle."""

    source: str
    """A hub id, a file or a directory."""
    revision: str | None = None
    """Commit id on the hub."""


class BundleStore:
    """The bundles below a folder, which is created with the first bundle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def default(cls) -> BundleStore:
        """Return the store at EDGELM_DATA_DIR, or at the user's data folder (XDG base directories)."""
        named = os.environ.get(DATA_DIR_VARIABLE)
        if named is not None:
            if not named:
                raise EdgelmError(f"{DATA_DIR_VARIABLE} is empty: name a folder, or leave it unset")
            return cls(Path(named))
        return cls(user_folder("data"))

    def bundle_path(self, name: str) -> Path:
        """Return the path for a bundle of that name, which may not exist. Raises `EdgelmError` if not a valid name."""
        check_name(name)
        return self.folder / "bundles" / name

    def find(self, name: str) -> Path | None:
        """Return the directory of a stored bundle, or None."""
        if not MODEL_NAME_PATTERN.fullmatch(name) or name == BUILTIN:
            return None
        folder = self.bundle_path(name)
        return folder if folder.is_dir() else None

    def names(self) -> list[str]:
        """Return the names of all stored bundles, sorted."""
        folder = self.folder / "bundles"
        if not folder.is_dir():
            return []
        return sorted(
            path.name for path in folder.iterdir() if path.is_dir() and MODEL_NAME_PATTERN.fullmatch(path.name)
        )

    def origin(self, name: str) -> Origin | None:
        """Return the origin of a bundle; None if it has no readable record."""
        try:
            found = json.loads(self._record(name).read_text("utf-8"))
            return read(Origin, {name: found[name] for name in ("source", "revision")})
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def write_origin(self, name: str, origin: Origin) -> None:
        """Record the origin of a bundle."""
        replace_file(self._record(name), json.dumps(asdict(origin)))

    def remove(self, name: str) -> int:
        """Remove a bundle and its record; return the freed bytes.

        Raises `EdgelmError` if there is no such bundle or it cannot be removed.
        """
        folder = self.bundle_path(name)
        if not folder.is_dir():
            raise EdgelmError(f"there is no bundle {name!r} in {folder.parent}")
        freed = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        try:
            aside = Path(tempfile.mkdtemp(prefix=".removing-", dir=folder.parent))
            folder.rename(aside / name)  # in one step: a failure below leaves no half of a bundle
            shutil.rmtree(aside)
            self._record(name).unlink(missing_ok=True)
            for leftover in folder.parent.glob(f".{name}.*"):  # from a `pull` that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        except OSError as error:
            raise EdgelmError(f"{folder} cannot be removed: {error.strerror or error}") from error
        return freed

    def _record(self, name: str) -> Path:
        return self.folder / "bundles" / f"{name}.json"


def resolve_bundle_path(model: str | Path) -> Path:
    """Return the directory of a bundle given by name or path; "builtin" is inside the package.

    A stored name has priority over a directory of the same name, which `./name` selects. Anything else is returned as a
    path, which may not exist.
    """
    if str(model) == BUILTIN:
        return BUILTIN_FOLDER
    found = None if isinstance(model, Path) else BundleStore.default().find(model)
    return Path(model) if found is None else found


def missing_bundle_error(model: str) -> BundleError:
    """Return the error for a name or path that is not a bundle, with advice."""
    known = load_catalogue()
    if model in known:
        return BundleError(f"{model} is not downloaded yet: `edgelm pull {model}` downloads and converts it")
    if Path(model).is_file():
        return BundleError(f"{model} is not a directory: `edgelm export` makes a bundle from a checkpoint")
    suggestion = suggest_match(model, [*BundleStore.default().names(), *known, BUILTIN], 0.6, otherwise=";")
    return BundleError(
        f"{model} is not a directory and not the name of a stored bundle{suggestion} `edgelm list` shows stored"
        " bundles, `edgelm models` the models for `edgelm pull`"
    )
