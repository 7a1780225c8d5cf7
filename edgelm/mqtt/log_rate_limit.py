"""Log lines of one kind, bounded: a few a minute, then how many more. What a stranger causes fills no disk."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

MOST_LINES: Final = 5
PERIOD_S: Final = 60.0
MOST_KINDS: Final = 256

_Kind = tuple[str, int, str]
"""Logger, level, and the message before its arguments are put in."""


@dataclass(slots=True)
class _Window:
    begun: float
    lines: int = 0
    left_out: int = 0
    last: logging.LogRecord | None = None


class LogRateLimit(logging.Filter):
    """Lets `most` lines of a kind pass in `period_s` seconds, and then has the handler tell how many were left out.

    Parameters
    ----------
    handler
        Writes the count; the filter is to be added to it.
    most, period_s
        How many lines, in how many seconds.
    """

    def __init__(self, handler: logging.Handler, most: int = MOST_LINES, period_s: float = PERIOD_S) -> None:
        super().__init__()
        self._handler = handler
        self._most = most
        self._period_s = period_s
        self._windows: OrderedDict[_Kind, _Window] = OrderedDict()
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is written now."""
        kind = (record.name, record.levelno, str(record.msg))
        now = time.monotonic()
        with self._lock:
            window = self._windows.get(kind)
            if window is None or (now - window.begun >= self._period_s and not window.left_out):
                self._windows.pop(kind, None)
                window = self._windows[kind] = _Window(now)
                if len(self._windows) > MOST_KINDS:
                    self._windows.popitem(last=False)
            if window.lines < self._most:
                window.lines += 1
                return True
            window.left_out += 1
            window.last = record
            if window.left_out == 1:
                timer = threading.Timer(max(0.0, window.begun + self._period_s - now), self._tell, (kind, window))
                timer.daemon = True
                timer.start()
        return False

    def _tell(self, kind: _Kind, window: _Window) -> None:
        """Write how many lines were left out, and begin anew."""
        with self._lock:
            last, left_out, window.last = window.last, window.left_out, None
            if self._windows.get(kind) is window:
                del self._windows[kind]
        if last is None:
            return
        told = copy.copy(last)
        told.msg, told.args = f"{last.getMessage()} (... and {left_out - 1} more of this kind)", None
        told.exc_info = told.exc_text = None
        with self._handler.lock or threading.RLock():
            self._handler.emit(told)
