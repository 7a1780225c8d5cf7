"""A progress bar for work of over two seconds, and a spinner for work of unknown length; only on a terminal."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from types import TracebackType
from typing import Final

from edgelm.system.terminal import escape_line, unwrap_stream

DELAY_S: Final = 2.0
REDRAW_INTERVAL_S: Final = 0.1
SPINNER_DELAY_S: Final = 0.5
WIDTH: Final = 30
MIN_BYTES: Final = 100_000
"""From this many steps on, steps are bytes and are shown as MB."""


class ProgressBar:
    """Shows progress as a bar with the remaining time on standard error. A context manager."""

    def __init__(self) -> None:
        self._what = ""
        self._begun = self._start = time.monotonic()
        self._shown = 0.0
        self._visible = False

    def __call__(self, what: str, done: int, of: int) -> None:
        """Show that `done` of `of` steps or bytes of the task `what` are done."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._begun = what, now
        if not sys.stderr.isatty() or now - self._start < DELAY_S or now - self._shown < REDRAW_INTERVAL_S:
            return
        _redraw(format_bar(what, done, of, now - self._begun))
        self._shown, self._visible = now, True

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._visible:
            _redraw("")


def _redraw(line: str) -> None:
    """Replace the current line of the terminal."""
    print(f"\r\x1b[K{escape_line(line)}", end="", file=unwrap_stream(sys.stderr), flush=True)


def format_bar(what: str, done: int, of: int, elapsed_s: float) -> str:
    """Return the line: task, progress, bar, and the time left at the mean speed so far."""
    filled = min(WIDTH, WIDTH * done // max(of, 1))
    left = f"{elapsed_s / done * max(of - done, 0):.0f} s left" if done and elapsed_s > 0 else ""
    steps = f"{done / 1e6:.1f}/{of / 1e6:.1f} MB" if of >= MIN_BYTES else f"{done}/{of}"
    return f"{what} {steps} [{'#' * filled}{'.' * (WIDTH - filled)}] {left}".rstrip()


class Spinner:
    """Shows on a terminal, after half a second, that work of unknown length is running. A context manager."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)

    def _spin(self) -> None:
        if self._done.wait(SPINNER_DELAY_S):
            return
        begun = time.monotonic()
        for symbol in itertools.cycle("|/-\\"):
            waited = time.monotonic() - begun + SPINNER_DELAY_S
            _redraw(f"{symbol} {self._what} ({waited:.0f} s)")
            if self._done.wait(REDRAW_INTERVAL_S):
                break
        _redraw("")

    def __enter__(self) -> Spinner:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()
