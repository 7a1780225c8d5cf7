"""The board cache: files computed once for this board and kept between runs. Knows nothing of onnxruntime.

An entry is a directory with a stamp: what it was made from, and the size, time and hash of its files. It is written to
a temporary directory and renamed, so a reader finds a complete entry or none, and one of several writers wins. An entry
that does not match its stamp is made again.

Files of the cache are executed: shared libraries, and Numba's files, which are pickles. The cache is therefore used
only if no user other than this one and root could have written it (`ownership`); else the program runs without it and
logs the reason once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgelm.errors import EdgelmError
from edgelm.system.digest import file_sha256
from edgelm.system.files import replace_file, sync
from edgelm.system.ownership import deny_others, find_content_fault, find_path_fault, make_private
from edgelm.system.user_folders import user_folder

CACHE_DIR_VARIABLE: Final = "EDGELM_CACHE_DIR"
"""Environment variable that names the folder."""

LIMIT_VARIABLE: Final = "EDGELM_CACHE_MB"
"""Environment variable with the largest total size of all entries, in 10^6 bytes."""
LIMIT_MB: Final = 4000
"""Default of `EDGELM_CACHE_MB`: about ten bundles that fit a board."""

STAMP: Final = "stamp.json"
SCHEMA: Final = 1
UNUSED_AFTER_S: Final = 60 * 86_400
"""Entries unused for this long are removed when another one is made."""
ABANDONED_AFTER_S: Final = 3600
"""Age from which an incomplete entry is considered left over from a dead process."""
MIN_FREE_BYTES: Final = 100_000_000
"""Free disk space that must remain after an entry is written."""

LOG: Final = logging.getLogger(__name__)
NOT_USED: Final = "the board cache %s is not used: %s; edgelm runs without it"

_logged_faults: set[str] = set()
"""Faults that this process has already logged."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What an entry depends on: its kind, the digest of the bundle's weights, the runtime version, the CPU."""

    kind: str
    bundle: str
    runtime: str
    cpu: str

    @property
    def name(self) -> str:
        """Name of the entry's directory."""
        text = json.dumps([SCHEMA, *dataclasses.astuple(self)])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """An intact entry. `metadata` is what `make` recorded about it, `sha256` the hash of each file."""

    path: Path
    kind: str
    metadata: Mapping[str, Any]
    sha256: Mapping[str, str]
    bytes: int
    created_s: float
    """Seconds since the epoch."""


class BoardCache:
    """Entries below a folder, which is created with the first entry, readable and writable for this user only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numba_folder = folder / "kernels"
        """Folder of Numba's compiled kernels, whose files Numba manages."""

    @classmethod
    def default(cls) -> BoardCache:
        """Return the cache at EDGELM_CACHE_DIR, or at the user's cache folder (XDG base directories).

        Raises `EdgelmError` if a variable's value is not valid.
        """
        read_limit_mb()
        named = os.environ.get(CACHE_DIR_VARIABLE)
        if named is not None:
            if not named:
                raise EdgelmError(f"{CACHE_DIR_VARIABLE} is empty: name a folder, or leave it unset")
            return cls(Path(named))
        return cls(user_folder("cache"))

    def is_safe(self) -> bool:
        """Whether only this user and root can replace files of the folder; if not, the reason is logged once."""
        return self._is_trusted(find_path_fault, self.folder)

    def prepare_numba_folder(self) -> Path | None:
        """Create and return the folder for Numba; None if it cannot be used, which is logged once."""
        try:
            if not self.is_safe():
                return None
            make_private(self.numba_folder)
        except OSError:
            return None
        usable = self.is_safe() and self._is_trusted(find_content_fault, self.numba_folder)
        return self.numba_folder if usable and os.access(self.numba_folder, os.W_OK) else None

    def find(self, key: CacheKey) -> CacheEntry | None:
        """Return an intact entry, or None. A damaged entry is removed, which is logged.

        An entry that others could have written is neither used nor removed.
        """
        path = self.folder / key.name
        if not os.path.lexists(path) or not self._may_use(path):
            return None
        reason = _find_fault(path, key)
        if reason is not None:
            LOG.warning("%s in the board cache is not used: %s; it will be made again", path, reason)
            self._remove(path)
            return None
        _touch(path / STAMP)
        return _read_entry(path)

    def make(self, key: CacheKey, expected_bytes: int, fill: Callable[[Path], Mapping[str, Any]]) -> CacheEntry | None:
        """Make an entry; return None if the folder cannot be used or is full, which is logged.

        `fill` writes the files into an empty directory and returns the metadata. An exception leaves no files; an
        `OSError` is treated as a folder that cannot be used. `expected_bytes` is approximate.
        """
        path = self.folder / key.name
        try:
            if not self.is_safe():
                return None
            make_private(self.folder)
            if not self.is_safe() or (os.path.lexists(path) and not self._may_use(path)):
                return None
            self._remove_expired()
            free = shutil.disk_usage(self.folder).free
            if free < expected_bytes + MIN_FREE_BYTES:
                space = f"about {expected_bytes / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
                LOG.warning(NOT_USED, self.folder, space)
                return None
            scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=self.folder))
        except OSError as error:
            LOG.warning(NOT_USED, self.folder, error.strerror or error)
            return None
        try:
            metadata = fill(scratch)
            _write_stamp(scratch, key, metadata)
            try:
                scratch.rename(path)
            except OSError:  # another process was faster
                if not self._may_use(path) or _find_fault(path, key) is not None:
                    raise
            entry = _read_entry(path)
            self._evict(path)
            return entry
        except OSError as error:
            LOG.warning(NOT_USED, self.folder, error.strerror or error)
            return None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def update(self, key: CacheKey, metadata: Mapping[str, Any]) -> None:
        """Replace an entry's metadata, if the folder can be written."""
        path = self.folder / key.name
        try:
            stamp = json.loads((path / STAMP).read_text("utf-8"))
            replace_file(path / STAMP, json.dumps({**stamp, "note": metadata}))
        except (OSError, ValueError):
            LOG.debug("%s cannot be updated", path, exc_info=True)

    def drop(self, key: CacheKey) -> None:
        """Remove an entry if it exists."""
        self._remove(self.folder / key.name)

    def entries(self) -> Iterator[CacheEntry]:
        """Yield every entry with a readable stamp, oldest first."""
        found = [path for path in self._list_directories() if (path / STAMP).is_file()]
        readable = [entry for entry in map(_read_entry, found) if entry is not None]
        yield from sorted(readable, key=lambda entry: entry.created_s)

    def remove_bundle(self, bundle: Path) -> int:
        """Remove all entries made from the bundle at a path; return the freed bytes."""
        entries = [entry for entry in self.entries() if entry.metadata.get("bundle") == str(bundle)]
        for entry in entries:
            self._remove(entry.path)
        return sum(entry.bytes for entry in entries)

    def clear(self) -> int:
        """Remove all entries and compiled kernels; return the freed bytes."""
        freed = self.numba_bytes()
        self._remove(self.numba_folder)
        for path in self._list_directories():
            freed += _measure_bytes(path)
            self._remove(path)
        return freed

    def numba_bytes(self) -> int:
        """Return the size of all kernels that Numba compiled."""
        return _measure_bytes(self.numba_folder)

    def _may_use(self, entry: Path) -> bool:
        """Whether only this user and root could have written an entry and the folder; if not, it is logged once."""
        return self.is_safe() and self._is_trusted(find_content_fault, entry)

    def _is_trusted(self, find_fault: Callable[[Path], str | None], path: Path) -> bool:
        try:
            fault = find_fault(path)
        except OSError as error:
            fault = f"{error.filename or path} cannot be checked ({error.strerror or error})"
        if fault is not None and fault not in _logged_faults:
            _logged_faults.add(fault)
            LOG.warning(
                "%s is not used as a cache: %s, and files of the cache are executed; edgelm runs without it. Remove "
                "files that others could have written, change the permissions (chmod go-w, chown), or set %s",
                path,
                fault,
                CACHE_DIR_VARIABLE,
            )
        return fault is None

    def _list_directories(self) -> list[Path]:
        """Return the directories of complete and incomplete entries; other files of the folder are left out."""
        if not self.folder.is_dir():
            return []
        folders = (path for path in self.folder.iterdir() if path.is_dir() and not path.is_symlink())
        return [path for path in folders if path.name.startswith(".making-") or (path / STAMP).exists()]

    def _remove_expired(self) -> None:
        """Remove unused entries and incomplete ones of dead processes."""
        now = time.time()
        for path in self._list_directories():
            scratch = path.name.startswith(".making-")
            try:
                age = now - (path if scratch else path / STAMP).stat().st_mtime
            except FileNotFoundError:  # another process removed it
                continue
            if age > (ABANDONED_AFTER_S if scratch else UNUSED_AFTER_S):
                self._remove(path)

    def _evict(self, newest: Path) -> None:
        """Remove the least recently used entries until the rest fits the limit; `newest` is kept.

        An entry in use keeps working: its files are mapped and exist until the last process unmaps them.
        """
        entries = sorted((used, path) for path, used in self._list_last_uses() if path != newest)
        used_bytes = _measure_bytes(newest) + sum(_measure_bytes(path) for _, path in entries)
        remaining = read_limit_mb() * 1_000_000 - used_bytes
        for _, path in entries:
            if remaining >= 0:
                break
            remaining += _measure_bytes(path)
            LOG.info("the board cache is full: %s is removed (%s sets the limit)", path, LIMIT_VARIABLE)
            self._remove(path)

    def _list_last_uses(self) -> Iterator[tuple[Path, float]]:
        """Yield complete entries with the time of their last use, in seconds since the epoch."""
        for path in self._list_directories():
            if path.name.startswith(".making-"):
                continue
            try:
                yield path, (path / STAMP).stat().st_mtime
            except OSError:  # another process removed it
                continue

    def _remove(self, path: Path) -> None:
        """Rename a directory, then remove it, so that no reader sees an incomplete entry."""
        if not path.is_dir():
            return
        try:
            aside = Path(tempfile.mkdtemp(prefix=".making-", dir=self.folder))
            path.rename(aside / "old")
        except OSError:
            LOG.debug("%s cannot be removed", path, exc_info=True)
            return
        shutil.rmtree(aside, ignore_errors=True)


def read_limit_mb() -> float:
    """Return the largest total size of all entries in 10^6 bytes. Raises `EdgelmError` if the value is not valid."""
    given = os.environ.get(LIMIT_VARIABLE)
    if given is None:
        return LIMIT_MB
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1e9:
        raise EdgelmError(f"{LIMIT_VARIABLE} must be a number of megabytes, such as {LIMIT_MB}; got {given!r:.40}")
    return limit


def describe_cpu(root: Path = Path("/")) -> str:
    """Return the CPU's architecture, name and instruction sets as the kernel reports them."""
    try:
        lines = (root / "proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    fields = {(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)}
    return " ".join([platform.machine(), *(value for name in wanted for n, value in sorted(fields) if n == name)])


def file_signatures(files: Mapping[str, Path]) -> dict[str, list[int]]:
    """Return the size and modification time (ns) of files, to detect later changes."""
    return {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in files.items()}


def _write_stamp(path: Path, key: CacheKey, metadata: Mapping[str, Any]) -> None:
    """Write the stamp after all other files are on the disk."""
    files = {file.name: file for file in sorted(path.iterdir())}
    for file in files.values():
        deny_others(file)
        sync(file)
    stamp = {
        "schema": SCHEMA,
        "key": dataclasses.asdict(key),
        "made": time.time(),
        "signature": file_signatures(files),
        "sha256": {name: file_sha256(file) for name, file in files.items()},
        "note": metadata,
    }
    replace_file(path / STAMP, json.dumps(stamp))
    sync(path)


def _find_fault(path: Path, key: CacheKey) -> str | None:
    """Return why an entry cannot be used, or None.

    A file with the recorded size and time is considered unchanged; a file with another time is hashed.
    """
    try:
        stamp = json.loads((path / STAMP).read_text("utf-8"))
        made_for = CacheKey(**stamp["key"])
        for field in dataclasses.fields(CacheKey):
            if getattr(made_for, field.name) != getattr(key, field.name):
                return f"it was made for another {field.name}"
        now = file_signatures({name: path / name for name in stamp["signature"]})
        for name, (size, changed) in stamp["signature"].items():
            if now[name][0] != size:
                return f"{name} has {now[name][0]} bytes instead of {size}"
            if now[name][1] != changed and file_sha256(path / name) != stamp["sha256"][name]:
                return f"{name} has changed"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"its {STAMP} is damaged"
    return None


def _read_entry(path: Path) -> CacheEntry | None:
    try:
        stamp = json.loads((path / STAMP).read_text("utf-8"))
        kind, hashes = CacheKey(**stamp["key"]).kind, dict(stamp["sha256"])
        return CacheEntry(path, kind, dict(stamp["note"]), hashes, _measure_bytes(path), float(stamp["made"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _measure_bytes(path: Path) -> int:
    """Return the size of all files below a directory; 0 if it does not exist or is being removed."""
    try:
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except FileNotFoundError:
        return 0


def _touch(file: Path) -> None:
    """Record the use of an entry, if the folder can be written."""
    try:
        os.utime(file)
    except OSError:
        LOG.debug("the time of %s cannot be set", file)
