"""Work beside the engine: a daemon thread that does one thing after another, started when first needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundThread:
    """A thread of that name. Safe to call from several threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._asked: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, function: Callable[[], Result]) -> Future[Result]:
        """Return what will have the function's result, or what it raised."""
        future: Future[Result] = Future()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._asked.put((function, future))
        return future

    def close(self) -> None:
        """End the thread after what it does now and what was asked before."""
        with self._lock:
            if self._thread is not None:
                self._asked.put(None)
                self._thread = None

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            resolve_future(*asked)


def resolve_future(function: Callable[[], Result], future: Future[Result]) -> None:
    """Give a future a function's result, or what it raised."""
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001  whoever waits for the future is told
        future.set_exception(error)
    else:
        future.set_result(result)
