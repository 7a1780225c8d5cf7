"""The callback that reports the progress of an export."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]
"""Called with (what, done, of); the numbers count steps or bytes."""


def ignore_progress(what: str, done: int, of: int) -> None:
    """Do nothing."""
    del what, done, of
