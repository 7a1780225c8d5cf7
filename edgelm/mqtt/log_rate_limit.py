"""Rate limit of log lines of one kind, so that messages from a hostile client cannot fill the disk."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

MAX_LINES: Final = 5
PERIOD_S: Final = 60.0
MAX_KINDS: Final = 256

_Kind = tuple[str, int, str]
"""Logger, level, and the message without its arguments."""


@dataclass(slots=True)
class _Window:
    begun: float
    lines: int = 0
    left_out: int = 0
    last: logging.LogRecord | None = None


class LogRateLimit(logging.Filter):
    """Passes `max_lines` lines of a kind in `period_s` seconds; at the end the handler logs how many were left out.

    Parameters
    ----------
    handler
        The handler to which the filter is added; it also writes the count.
    max_lines, period_s
        Number of lines, and the period in seconds.
    """

    def __init__(self, handler: logging.Handler, max_lines: int = MAX_LINES, period_s: float = PERIOD_S) -> None:
        super().__init__()
        self._handler = handler
        self._max_lines = max_lines
        self._period_s = period_s
        self._windows: OrderedDict[_Kind, _Window] = OrderedDict()
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written now."""
        kind = (record.name, record.levelno, str(record.msg))
        now = time.monotonic()
        with self._lock:
            window = self._windows.get(kind)
            if window is None or (now - window.begun >= self._period_s and not window.left_out):
                self._windows.pop(kind, None)
                window = self._windows[kind] = _Window(now)
                if len(self._windows) > MAX_KINDS:
                    self._windows.popitem(last=False)
            if window.lines < self._max_lines:
                window.lines += 1
                return True
            window.left_out += 1
            window.last = record
            if window.left_out == 1:
                timer = threading.Timer(
                    max(0.0, window.begun + self._period_s - now), self._log_left_out, (kind, window)
                )
                timer.daemon = True
                timer.start()
        return False

    def _log_left_out(self, kind: _Kind, window: _Window) -> None:
        """Write how many lines were left out, and start a new period."""
        with self._lock:
            last, left_out, window.last = window.last, window.left_out, None
            if self._windows.get(kind) is window:
                del self._windows[kind]
        if last is None:
            return
        record = copy.copy(last)
        record.msg, record.args = f"{last.getMessage()} (... and {left_out - 1} more of this kind)", None
        record.exc_info = record.exc_text = None
        with self._handler.lock or threading.RLock():
            self._handler.emit(record)
