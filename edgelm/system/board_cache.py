"""Files made once for this board, kept between runs: a folder of entries, each usable only where it was made.

An entry is a directory with a stamp that says what it was made from and what its files are. It is written beside its
place and renamed into it, so that a reader finds a whole entry or none, and of several writers one wins. Whatever does
not fit its stamp is made again. Knows nothing of onnxruntime.

What lies here is executed: libraries by name, and Numba's files, which are pickles. So nothing is used that others than
this user and root could have written (`edgelm.system.ownership`): the program then runs without, and one line says why.
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
from edgelm.system.ownership import deny_others, find_content_fault, find_path_fault, make_private
from edgelm.system.user_folders import user_folder

CACHE_DIR_VARIABLE: Final = "EDGELM_CACHE_DIR"
"""Environment variable that names the folder."""

LIMIT_VARIABLE: Final = "EDGELM_CACHE_MB"
"""Environment variable that says how large all entries together may be, in 10^6 bytes."""
LIMIT_MB: Final = 4000
"""What is kept where nothing says so: some ten bundles of a board's size."""

STAMP: Final = "stamp.json"
SCHEMA: Final = 1
UNUSED_AFTER_S: Final = 60 * 86_400
"""Entries that nothing has used for so long are removed when another one is made."""
ABANDONED_AFTER_S: Final = 3600
"""Age from which a half-written entry is taken to be left over from a process that died."""
MIN_FREE_BYTES: Final = 100_000_000
"""Space that an entry must leave on its disk."""

LOG: Final = logging.getLogger(__name__)

_said: set[str] = set()
"""What was said of places that are not used: once a process."""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What an entry depends on: what it is, the bundle's weights by their digest, the runtime, the processor."""

    kind: str
    bundle: str
    runtime: str
    cpu: str

    @property
    def name(self) -> str:
        """The entry's directory."""
        text = json.dumps([SCHEMA, *dataclasses.astuple(self)])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """An intact entry. `note` is what its maker wrote down about it, `sha256` the hash of each of its files."""

    path: Path
    kind: str
    metadata: Mapping[str, Any]
    sha256: Mapping[str, str]
    bytes: int
    created_s: float
    """Seconds since the epoch."""


class BoardCache:
    """Entries below a folder. Nothing is created before the first entry is made, and then for this user alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numba_folder = folder / "kernels"
        """Where Numba keeps what it compiles, in files of its own."""

    @classmethod
    def default(cls) -> BoardCache:
        """Return the cache at EDGELM_CACHE_DIR, else where the system keeps a user's caches (XDG base directories).

        Raises `EdgelmError` for a variable that cannot be used.
        """
        read_limit_mb()
        named = os.environ.get(CACHE_DIR_VARIABLE)
        if named is not None:
            if not named:
                raise EdgelmError(f"{CACHE_DIR_VARIABLE} is empty: name a folder, or leave it unset")
            return cls(Path(named))
        return cls(user_folder("cache"))

    def is_safe(self) -> bool:
        """Whether nobody but this user and root could exchange what lies in the folder; else why not is said once."""
        return self._is_trusted(find_path_fault, self.folder)

    def prepare_numba_folder(self) -> Path | None:
        """Return the folder for Numba, made where it is missing; None where it cannot be used, which is said once."""
        try:
            if not self.is_safe():
                return None
            make_private(self.numba_folder)
        except OSError:
            return None
        usable = self.is_safe() and self._is_trusted(find_content_fault, self.numba_folder)
        return self.numba_folder if usable and os.access(self.numba_folder, os.W_OK) else None

    def find(self, key: CacheKey) -> CacheEntry | None:
        """Return an intact entry; one that is not is removed, and that is logged.

        One that others could have written is left as it is and not used.
        """
        path = self.folder / key.name
        if not os.path.lexists(path) or not self._may_use(path):
            return None
        reason = _fault(path, key)
        if reason is not None:
            LOG.warning("%s in the board cache is not used: %s; it is made again", path, reason)
            self._remove(path)
            return None
        _touch(path / STAMP)
        return _entry(path)

    def make(self, key: CacheKey, needs: int, fill: Callable[[Path], Mapping[str, Any]]) -> CacheEntry | None:
        """Make an entry; return None where the folder cannot hold it, which is logged.

        `fill` writes the files into an empty directory and returns the note. Whatever it raises leaves nothing behind;
        an `OSError` counts as a folder that cannot hold it. `needs` is about how many bytes it will write.
        """
        place = self.folder / key.name
        try:
            if not self.is_safe():
                return None
            make_private(self.folder)
            if not self.is_safe() or (os.path.lexists(place) and not self._may_use(place)):
                return None
            self._remove_expired()
            free = shutil.disk_usage(self.folder).free
            if free < needs + MIN_FREE_BYTES:
                room = f"about {needs / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB free"
                LOG.warning("the board cache %s is not used: %s; it runs without", self.folder, room)
                return None
            scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=self.folder))
        except OSError as error:
            LOG.warning("the board cache %s is not used: %s; it runs without", self.folder, error.strerror or error)
            return None
        try:
            metadata = fill(scratch)
            _write_stamp(scratch, key, metadata)
            try:
                scratch.rename(place)
            except OSError:  # another process was quicker
                if not self._may_use(place) or _fault(place, key) is not None:
                    raise
            made = _entry(place)
            self._evict(place)
            return made
        except OSError as error:
            LOG.warning("the board cache %s is not used: %s; it runs without", self.folder, error.strerror or error)
            return None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def update(self, key: CacheKey, metadata: Mapping[str, Any]) -> None:
        """Replace an entry's note, where the folder can be written."""
        path = self.folder / key.name
        try:
            stamp = json.loads((path / STAMP).read_text("utf-8"))
            _write(path / STAMP, json.dumps({**stamp, "note": metadata}))
        except (OSError, ValueError):
            LOG.debug("%s cannot be brought up to date", path, exc_info=True)

    def drop(self, key: CacheKey) -> None:
        """Remove an entry, if there is one."""
        self._remove(self.folder / key.name)

    def entries(self) -> Iterator[CacheEntry]:
        """Yield every entry whose stamp can be read, the oldest first."""
        found = [path for path in self._directories() if (path / STAMP).is_file()]
        readable = [entry for entry in map(_entry, found) if entry is not None]
        yield from sorted(readable, key=lambda entry: entry.created_s)

    def remove_bundle(self, bundle: Path) -> int:
        """Remove what was made of the bundle at a place; return how many bytes that frees."""
        entries = [entry for entry in self.entries() if entry.metadata.get("bundle") == str(bundle)]
        for entry in entries:
            self._remove(entry.path)
        return sum(entry.bytes for entry in entries)

    def clear(self) -> int:
        """Remove everything that this class wrote; return how many bytes that frees."""
        freed = self.numba_bytes()
        self._remove(self.numba_folder)
        for path in self._directories():
            freed += _size(path)
            self._remove(path)
        return freed

    def numba_bytes(self) -> int:
        """Return the size of all compiled kernels."""
        return _size(self.numba_folder)

    def _may_use(self, entry: Path) -> bool:
        """Whether nobody but this user and root could have written an entry or the folder; else why not is said."""
        return self.is_safe() and self._is_trusted(find_content_fault, entry)

    def _is_trusted(self, look: Callable[[Path], str | None], path: Path) -> bool:
        try:
            fault = look(path)
        except OSError as error:
            fault = f"{error.filename or path} cannot be looked at ({error.strerror or error})"
        if fault is not None and fault not in _said:
            _said.add(fault)
            LOG.warning(
                "%s is not used as a cache: %s, and what lies in a cache is executed; it runs without. Remove what "
                "others could have written, keep them out (chmod go-w, chown), or set %s to a folder of your own",
                path,
                fault,
                CACHE_DIR_VARIABLE,
            )
        return fault is None

    def _directories(self) -> list[Path]:
        """Return entries, whole and half-written ones; nothing else that may lie in the folder."""
        if not self.folder.is_dir():
            return []
        ours = (path for path in self.folder.iterdir() if path.is_dir() and not path.is_symlink())
        return [path for path in ours if path.name.startswith(".making-") or (path / STAMP).exists()]

    def _remove_expired(self) -> None:
        """Remove what nothing uses any more."""
        now = time.time()
        for path in self._directories():
            scratch = path.name.startswith(".making-")
            try:
                age = now - (path if scratch else path / STAMP).stat().st_mtime
            except FileNotFoundError:  # another process was quicker
                continue
            if age > (ABANDONED_AFTER_S if scratch else UNUSED_AFTER_S):
                self._remove(path)

    def _evict(self, newest: Path) -> None:
        """Remove the entries that were used longest ago until the others fit the limit; the newest stays.

        One that is in use goes on working: its files are mapped, and vanish with the last who maps them.
        """
        entries = sorted((used, path) for path, used in self._used() if path != newest)
        left = read_limit_mb() * 1_000_000 - _size(newest) - sum(_size(path) for _, path in entries)
        for _, path in entries:
            if left >= 0:
                break
            left += _size(path)
            LOG.info("the board cache is full: %s goes (%s sets its size)", path, LIMIT_VARIABLE)
            self._remove(path)

    def _used(self) -> Iterator[tuple[Path, float]]:
        """Yield whole entries and when they were last used, in seconds since the epoch."""
        for path in self._directories():
            if path.name.startswith(".making-"):
                continue
            try:
                yield path, (path / STAMP).stat().st_mtime
            except OSError:  # another process was quicker
                continue

    def _remove(self, path: Path) -> None:
        """Remove a directory: out of the way at once, so that no reader sees half of it."""
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
    """Return how large all entries together may be, in 10^6 bytes. Raises `EdgelmError` for what is no size."""
    given = os.environ.get(LIMIT_VARIABLE)
    if given is None:
        return LIMIT_MB
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1e9:
        raise EdgelmError(f"{LIMIT_VARIABLE} is a number of megabytes, such as {LIMIT_MB}; got {given!r:.40}")
    return limit


def describe_cpu(root: Path = Path("/")) -> str:
    """Return the processor's architecture, name and instruction sets, as the kernel tells them."""
    try:
        lines = (root / "proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    fields = {(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)}
    return " ".join([platform.machine(), *(value for name in wanted for n, value in sorted(fields) if n == name)])


def file_signatures(files: Mapping[str, Path]) -> dict[str, list[int]]:
    """Return size and time of change (ns) of files, by which a later change of theirs shows."""
    return {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in files.items()}


def _write_stamp(path: Path, key: CacheKey, metadata: Mapping[str, Any]) -> None:
    """Write the stamp after everything else has reached the disk."""
    files = {file.name: file for file in sorted(path.iterdir())}
    for file in files.values():
        deny_others(file)
        _sync(file)
    stamp = {
        "schema": SCHEMA,
        "key": dataclasses.asdict(key),
        "made": time.time(),
        "signature": file_signatures(files),
        "sha256": {name: file_sha256(file) for name, file in files.items()},
        "note": metadata,
    }
    _write(path / STAMP, json.dumps(stamp))
    _sync(path)


def _fault(path: Path, key: CacheKey) -> str | None:
    """Return why an entry cannot be used; None where it can.

    Files of the right size and time are taken to be what they were; others are hashed.
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


def _entry(path: Path) -> CacheEntry | None:
    try:
        stamp = json.loads((path / STAMP).read_text("utf-8"))
        kind, hashes = CacheKey(**stamp["key"]).kind, dict(stamp["sha256"])
        return CacheEntry(path, kind, dict(stamp["note"]), hashes, _size(path), float(stamp["made"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _size(path: Path) -> int:
    """Return the size of all files below a directory; 0 where there is none, or it goes away."""
    try:
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except FileNotFoundError:
        return 0


def _touch(file: Path) -> None:
    """Say that an entry is in use; a folder that cannot be written stays as it is."""
    try:
        os.utime(file)
    except OSError:
        LOG.debug("%s cannot be touched", file)


def _write(file: Path, text: str) -> None:
    """Replace a file as a whole."""
    scratch = file.with_name(f".{file.name}-{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    deny_others(scratch)
    _sync(scratch)
    scratch.replace(file)


def _sync(path: Path) -> None:
    """Wait until a file or directory has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
