"""The bundles of a user, by name: one directory each in EDGELM_DATA_DIR, else where a user's data lie.

A bundle that `edgelm pull` makes has a record beside it, `<name>.json`: where it came from.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from edgelm.bundle.catalogue import MODEL_NAME_PATTERN, check_name, load_catalogue
from edgelm.errors import BundleError, EdgelmError
from edgelm.system.user_folders import user_folder

DATA_DIR_VARIABLE: Final = "EDGELM_DATA_DIR"
"""Environment variable that names the folder."""

BUILTIN: Final = "builtin"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a bundle came from."""

    source: str
    """A hub id, a file or a directory."""
    revision: str | None = None
    """The hub's commit."""


class BundleStore:
    """The bundles below a folder. Nothing is created before the first is stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def default(cls) -> BundleStore:
        """Return the store at EDGELM_DATA_DIR, else where the system keeps a user's data (XDG base directories)."""
        named = os.environ.get(DATA_DIR_VARIABLE)
        if named is not None:
            if not named:
                raise EdgelmError(f"{DATA_DIR_VARIABLE} is empty: name a folder, or leave it unset")
            return cls(Path(named))
        return cls(user_folder("data"))

    def bundle_path(self, name: str) -> Path:
        """Return where a bundle of that name lies, or would. Raises `EdgelmError` for what cannot be a name."""
        check_name(name)
        return self.folder / "bundles" / name

    def find(self, name: str) -> Path | None:
        """Return the directory of a stored bundle; None for anything else."""
        if not MODEL_NAME_PATTERN.fullmatch(name) or name == BUILTIN:
            return None
        place = self.bundle_path(name)
        return place if place.is_dir() else None

    def names(self) -> list[str]:
        """Return the names of all stored bundles, sorted."""
        folder = self.folder / "bundles"
        if not folder.is_dir():
            return []
        return sorted(
            path.name for path in folder.iterdir() if path.is_dir() and MODEL_NAME_PATTERN.fullmatch(path.name)
        )

    def origin(self, name: str) -> Origin | None:
        """Return where a bundle came from, as far as its record can be read."""
        try:
            found = json.loads(self._record(name).read_text("utf-8"))
            source, revision = found["source"], found["revision"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        if not isinstance(source, str) or not isinstance(revision, str | None):
            return None
        return Origin(source, revision)

    def write_origin(self, name: str, origin: Origin) -> None:
        """Write down where a bundle came from."""
        self._record(name).write_text(json.dumps(asdict(origin)), "utf-8")

    def remove(self, name: str) -> int:
        """Remove a bundle and its record; return how many bytes that frees.

        Raises `EdgelmError` where there is none, or it cannot be removed.
        """
        place = self.bundle_path(name)
        if not place.is_dir():
            raise EdgelmError(f"there is no bundle {name!r} here")
        freed = sum(path.lstat().st_size for path in place.rglob("*") if path.is_file())
        try:
            aside = Path(tempfile.mkdtemp(prefix=".removing-", dir=place.parent))
            place.rename(aside / name)  # gone at once, whatever happens next
            shutil.rmtree(aside)
            self._record(name).unlink(missing_ok=True)
            for remains in place.parent.glob(f".{name}.*"):  # of a `pull` that was killed
                shutil.rmtree(remains, ignore_errors=True)
        except OSError as error:
            raise EdgelmError(f"{place} cannot be removed: {error.strerror or error}") from error
        return freed

    def _record(self, name: str) -> Path:
        return self.folder / "bundles" / f"{name}.json"


def resolve_bundle_path(model: str | Path) -> Path:
    """Return the directory that a name, or the path of a directory, stands for; "builtin" is inside the package.

    A name wins over a directory that is called so, which `./name` stands for. What is neither is returned as a path.
    """
    if str(model) == BUILTIN:
        return Path(__file__).parents[1] / "builtin"
    found = None if isinstance(model, Path) else BundleStore.default().find(model)
    return Path(model) if found is None else found


def missing_bundle_error(model: str) -> BundleError:
    """Return the error for what is neither a directory nor the name of a stored bundle, with the remedy."""
    known = load_catalogue()
    if model in known:
        return BundleError(f"{model} is not here yet: `edgelm pull {model}` fetches and converts it")
    if Path(model).is_file():
        return BundleError(f"{model} is not a directory: `edgelm export` makes a bundle of a checkpoint")
    close = difflib.get_close_matches(model, [*BundleStore.default().names(), *known, BUILTIN], n=1, cutoff=0.6)
    meant = f"did you mean {close[0]}? " if close else ""
    return BundleError(
        f"{model} is not a directory, nor the name of a model here; {meant}`edgelm list` shows what is here,"
        " `edgelm models` what can be had"
    )
