"""A progress line on a terminal for work over two seconds; silent when piped."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Final

DELAY_S: Final = 2.0
EVERY_S: Final = 0.1
WIDTH: Final = 30


class Progress:
    """Shows (what, done, of) as a bar with the time left, on standard error. Use as a context manager."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._shown = 0.0
        self._visible = False

    def __call__(self, what: str, done: int, of: int) -> None:
        """Show that `done` of `of` steps of `what` are done."""
        now = time.monotonic()
        elapsed = now - self._start
        if not sys.stderr.isatty() or elapsed < DELAY_S or now - self._shown < EVERY_S:
            return
        filled = WIDTH * done // max(of, 1)
        left = f"{elapsed / done * (of - done):.0f} s left" if done else ""
        bar = "#" * filled + "." * (WIDTH - filled)
        print(f"\r\x1b[K{what} {done}/{of} [{bar}] {left}", end="", file=sys.stderr, flush=True)
        self._shown, self._visible = now, True

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
