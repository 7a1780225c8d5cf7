"""A directory that appears whole or not at all: built beside its target, then renamed into place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgelm.errors import EdgelmError


@contextmanager
def staged(target: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends well and vanishes when it does not.

    An existing target is refused unless it is an empty directory or `force` is given and `replaceable(target)` holds;
    it is replaced only at the end. Raises `EdgelmError`.
    """
    target = target.absolute()
    exists = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if exists and not force:
        raise EdgelmError(f"{target} exists; --force replaces it")
    if exists and not replaceable(target):
        raise EdgelmError(f"{target} exists and is not something this command wrote; remove it by hand")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise EdgelmError(f"{target.parent} cannot be written: {error.strerror}") from error
    try:
        stage.chmod(0o755)
        yield stage
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(old / target.name)
            stage.rename(target)
            shutil.rmtree(old)
        else:
            stage.rename(target)
    except OSError as error:
        shutil.rmtree(stage, ignore_errors=True)
        raise EdgelmError(f"{target} cannot be written: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
