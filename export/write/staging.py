"""A directory that is written completely or not at all: built beside its target, then renamed into place."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from edgelm.errors import EdgelmError

ABANDONED_S: Final = 900
"""A staging directory without a write for this many seconds was left by a killed run."""
MIN_FREE_BYTES: Final = 2_000_000
"""A disk with less free space counts as full."""


def check_target(target: Path, *, force: bool, is_replaceable: Callable[[Path], bool]) -> None:
    """Raise `EdgelmError` if `staged_directory` would refuse `target`. Call it before long work."""
    exists = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if exists and not force:
        raise EdgelmError(f"{target} exists; --force replaces it")
    if exists and not is_replaceable(target):
        raise EdgelmError(f"{target} exists and was not written by this command; remove it by hand")


@contextmanager
def staged_directory(target: Path, *, force: bool, is_replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` if the block succeeds, and is removed otherwise.

    An existing target is refused, unless it is an empty directory, or `force` is given and `is_replaceable(target)`
    holds; it is replaced only at the end. Parent directories that were created are removed on failure. Raises
    `EdgelmError`.
    """
    target = target.absolute()
    stage: Path | None = None
    missing: list[Path] = []
    try:
        _remove_abandoned(target)
        check_target(target, force=force, is_replaceable=is_replaceable)
        missing = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        stage.chmod(0o755)
        yield stage
        _rename_into_place(stage, target)
    except BaseException as error:
        is_full = isinstance(error, OSError) and _is_full(
            target.parent
        )  # check before the staging directory is removed
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for parent in missing:  # innermost first; one that is in use by now stays
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            reason = "its disk is full" if is_full else error.strerror or error
            raise EdgelmError(f"{target} cannot be written: {reason}") from error
        raise


def _remove_abandoned(target: Path) -> None:
    """Remove staging directories of killed runs beside the target: those not written to for `ABANDONED_S`."""
    for remains in target.parent.glob(f".{target.name}.*"):
        try:
            files = [remains, *remains.rglob("*")]
            is_old = time.time() - max(file.lstat().st_mtime for file in files) > ABANDONED_S
        except OSError:  # in use by another process, or not accessible
            continue
        if remains.is_dir() and not remains.is_symlink() and is_old:
            shutil.rmtree(remains, ignore_errors=True)


def _is_full(folder: Path) -> bool:
    """Return whether the disk of a folder is full."""
    try:
        return shutil.disk_usage(folder).free < MIN_FREE_BYTES
    except OSError:
        return False


def _rename_into_place(stage: Path, target: Path) -> None:
    """Rename the stage to the target. An old target is removed afterwards, or restored on failure."""
    if not target.exists():
        stage.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.rename(old / target.name)
        stage.rename(target)
    finally:
        if not target.exists():
            (old / target.name).rename(target)
        shutil.rmtree(old)
