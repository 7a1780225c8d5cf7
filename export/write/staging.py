"""A directory that appears whole or not at all: built beside its target, then renamed into place."""

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
"""What nothing was written to for so long was left by a run that was killed."""
MIN_FREE_BYTES: Final = 2_000_000
"""A disk with less room counts as full."""


def check_target(target: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Raise `EdgelmError` where `staged_directory` would refuse `target`: to know before long work, not after it."""
    exists = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if exists and not force:
        raise EdgelmError(f"{target} exists; --force replaces it")
    if exists and not replaceable(target):
        raise EdgelmError(f"{target} exists and is not something this command wrote; remove it by hand")


@contextmanager
def staged_directory(target: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends well and vanishes when it does not.

    An existing target is refused unless it is an empty directory or `force` is given and `replaceable(target)` holds;
    it is replaced only at the end. Parents that had to be made go again with a failure. Raises `EdgelmError`.
    """
    target = target.absolute()
    stage: Path | None = None
    missing: list[Path] = []
    try:
        _remove_abandoned(target)
        exists = target.exists() and not (target.is_dir() and not any(target.iterdir()))
        if exists and not force:
            raise EdgelmError(f"{target} exists; --force replaces it")
        if exists and not replaceable(target):
            raise EdgelmError(f"{target} exists and is not something this command wrote; remove it by hand")
        missing = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        stage.chmod(0o755)
        yield stage
        _rename_into_place(stage, target)
    except BaseException as error:
        is_full = isinstance(error, OSError) and _is_full(target.parent)  # before what was written goes again
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        for parent in missing:  # the innermost first; one that someone else uses by now stays
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            reason = "its disk is full" if is_full else error.strerror or error
            raise EdgelmError(f"{target} cannot be written: {reason}") from error
        raise


def _remove_abandoned(target: Path) -> None:
    """Remove what killed runs left beside the target: what nobody has written to lately."""
    for remains in target.parent.glob(f".{target.name}.*"):
        try:
            files = [remains, *remains.rglob("*")]
            is_old = time.time() - max(file.lstat().st_mtime for file in files) > ABANDONED_S
        except OSError:  # someone else's, and at work
            continue
        if remains.is_dir() and not remains.is_symlink() and is_old:
            shutil.rmtree(remains, ignore_errors=True)


def _is_full(folder: Path) -> bool:
    """Whether there is no room left where a folder lies."""
    try:
        return shutil.disk_usage(folder).free < MIN_FREE_BYTES
    except OSError:
        return False


def _rename_into_place(stage: Path, target: Path) -> None:
    """Rename the stage to the target; what stood there is removed after, or put back on failure."""
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
