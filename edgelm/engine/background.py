"""A background thread that runs functions one after another, started when first needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundThread:
    """A daemon thread with a queue of functions. Safe to call from several threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, function: Callable[[], Result]) -> Future[Result]:
        """Queue a function; return a future of its result."""
        future: Future[Result] = Future()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._tasks.put((function, future))
        return future

    def close(self) -> None:
        """End the thread after the functions queued so far."""
        with self._lock:
            if self._thread is not None:
                self._tasks.put(None)
                self._thread = None

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            resolve_future(*task)


def resolve_future(function: Callable[[], Result], future: Future[Result]) -> None:
    """Call a function and set its result, or the exception that it raised, in a future."""
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001  raised again where the future is awaited
        future.set_exception(error)
    else:
        future.set_result(result)
