"""Who is told how far an export has come."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]
"""Called with (what, done, of): steps, or bytes."""


def ignore_progress(what: str, done: int, of: int) -> None:
    """Tell nobody."""
    del what, done, of
