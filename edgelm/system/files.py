"""Atomic replacement of files, and reading of TOML files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def replace_file(path: Path, text: str, *, mode: int = 0o644, scratch: Path | None = None) -> None:
    """Write a text file atomically: a reader sees the old or the new content, also after a power failure.

    mode: permissions before the umask. scratch: the file that is written and then renamed, by default one beside `path`
    that no other process uses. Raises `OSError`.
    """
    scratch = scratch or path.with_name(f".{path.name}-{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until the content of a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table of a TOML file. Raises `OSError`, and `ValueError` if the file is not TOML."""
    if sys.version_info >= (3, 11):  # imported here: few commands need it
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
