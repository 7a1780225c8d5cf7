"""The thread that runs an engine: takes requests from a bounded queue, passes chunks to the callback of each request.

Knows nothing of decoding or of what the callbacks do.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from edgelm.engine.engine import Engine
from edgelm.errors import EdgelmError, RequestError
from edgelm.text.tokenizer import Tokenizer
from edgelm.types import Chunk, Completion, Request

OnChunk = Callable[[Chunk], None]
"""Receives the chunks of a request on the worker's thread. Must not block; if it raises, the request is cancelled."""

Result = TypeVar("Result")

INITIAL_DURATION_S: Final = 1.0
"""Assumed duration of a request before one has finished, for `retry_after_s`."""

LOG: Final = logging.getLogger(__name__)

SMOOTHING: Final = 0.2
"""Weight of the newest request in the moving averages."""


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """Numbers of waiting, running and completed requests; `tok_s` is a moving average of tokens per second."""

    queued: int
    active: int
    completed: int
    tok_s: float


class Worker:
    """Runs an engine on its own thread.

    Parameters
    ----------
    engine
        Owned by the worker: no other thread may call it.
    queue_size
        Maximum number of requests that wait in addition to those that run; None is no limit.
    """

    def __init__(self, engine: Engine, queue_size: int | None = 8) -> None:
        self._engine = engine
        self.failure: BaseException | None = None
        self._queue_size = queue_size
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Request, float]] = deque()
        self._calls: deque[tuple[Callable[[Engine], Any], Future[Any]]] = deque()
        self._cancels: list[str] = []
        self._callbacks: dict[str, OnChunk] = {}
        self._is_draining = False
        self._is_closing = False
        self._completed = 0
        self._tok_s = 0.0
        self._duration_s = INITIAL_DURATION_S
        self._thread = threading.Thread(target=self._run, name="edgelm-worker", daemon=True)

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._engine.context

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, which may be used from any thread."""
        return self._engine.tokenizer

    def start(self) -> None:
        """Start the thread. It is stopped at exit of the program, which a running graph would abort."""
        atexit.register(self.close)
        self._thread.start()

    def submit(self, request: Request, on_chunk: OnChunk) -> None:
        """Queue a request.

        Raises `RequestError`: "busy" with `retry_after_s` if the queue is full, "draining" after `drain()` or
        `close()`, "id_conflict" if a request with this id is unfinished, "internal" if the thread has failed. Any later
        failure arrives as the last chunk, whose completion has the error.
        """
        with self._changed:
            if self.failure is not None:
                raise RequestError("internal", f"the engine has stopped: {self.failure}")
            if self._is_draining or self._is_closing:
                raise RequestError("draining", "the service is stopping and accepts no new requests")
            if request.id in self._callbacks:
                raise RequestError("id_conflict", f"a request with id {request.id!r} is not finished yet")
            if self._queue_size is not None and len(self._callbacks) >= self._queue_size + self._engine.max_batch:
                raise RequestError(
                    "busy", f"the queue is full ({self._queue_size} waiting)", retry_after_s=self._retry_after_s()
                )
            self._callbacks[request.id] = on_chunk
            self._inbox.append((request, time.monotonic()))
            self._changed.notify()

    def retry_after_s(self) -> float:
        """Return the estimated time until all current requests are answered, in seconds."""
        with self._changed:
            return self._retry_after_s()

    def _retry_after_s(self) -> float:
        return round(max(0.1, len(self._callbacks) / self._engine.max_batch * self._duration_s), 1)

    def cancel(self, request_id: str) -> bool:
        """Finish a request with the answer so far; return whether it was unfinished."""
        with self._changed:
            is_known = request_id in self._callbacks
            if is_known:
                self._cancels.append(request_id)
                self._changed.notify()
            return is_known

    def call(self, function: Callable[[Engine], Result]) -> Result:
        """Run a function on the worker's thread between two steps; return its result."""
        future: Future[Result] = Future()
        with self._changed:
            if self.failure is not None or self._is_closing:
                raise EdgelmError("the model is closed")
            self._calls.append((function, future))
            self._changed.notify()
        return future.result()

    def drain(self) -> None:
        """Refuse new requests from now on; unfinished ones continue."""
        with self._changed:
            self._is_draining = True

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop the thread after the current step; unfinished requests end with the error "interrupted"."""
        atexit.unregister(self.close)
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def stats(self) -> WorkerStats:
        """Return the current statistics."""
        with self._changed:
            active = self._engine.active
            return WorkerStats(max(0, len(self._callbacks) - active), active, self._completed, self._tok_s)

    # --- the worker's thread ---

    def _run(self) -> None:
        try:
            self._engine.warm_up()  # on this thread, so that loading a model does not wait for it
            while self._wait_for_work():
                self._deliver(self._step())
        except BaseException as error:  # noqa: BLE001  an internal error: every request gets it
            self.failure = error
        finally:
            reason = RequestError("interrupted", "the service stopped before the answer was complete")
            if self.failure is not None:
                reason = RequestError("internal", f"the engine has stopped: {self.failure}")
            self._fail_all(reason)

    def _wait_for_work(self) -> bool:
        """Wait for work and pass it to the engine; return False after `close()`."""
        with self._changed:
            while not (self._inbox or self._calls or self._cancels or self._is_closing or self._has_work()):
                self._changed.wait()
            if self._is_closing:
                return False
            while self._inbox:
                self._engine.add(*self._inbox.popleft())
            for request_id in self._cancels:
                self._engine.cancel(request_id)
            self._cancels.clear()
            calls = list(self._calls)
            self._calls.clear()
        for function, future in calls:
            try:
                future.set_result(function(self._engine))
            except BaseException as error:  # noqa: BLE001  raised again in the caller
                future.set_exception(error)
        return True

    def _has_work(self) -> bool:
        return self._engine.queued > 0 or self._engine.active > 0

    def _step(self) -> list[Chunk]:
        try:
            return self._engine.step()
        except Exception as error:  # noqa: BLE001  a failed step becomes final errors, never silence
            return self._engine.fail_all(RequestError("internal", f"the step failed: {type(error).__name__}: {error}"))

    def _deliver(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            with self._changed:
                on_chunk = self._callbacks.pop(chunk.id, None) if chunk.done else self._callbacks.get(chunk.id)
                if chunk.completion is not None:
                    self._count(chunk.completion)
                    self._cancels = [known for known in self._cancels if known != chunk.id]  # the id may be used again
            if on_chunk is not None:
                self._call_back(chunk, on_chunk)

    def _call_back(self, chunk: Chunk, on_chunk: OnChunk) -> None:
        try:
            on_chunk(chunk)
        except Exception:  # a failing callback must not affect other requests
            LOG.exception("the callback of request %r failed; its answer is dropped", chunk.id)
            with self._changed:
                if chunk.id in self._callbacks:  # the id stays in use until the engine has finished it
                    self._callbacks[chunk.id] = _ignore
                    self._cancels.append(chunk.id)

    def _count(self, completion: Completion) -> None:
        self._completed += 1
        timing = completion.timing
        self._duration_s += SMOOTHING * ((timing.total_ms - timing.queue_ms) / 1e3 - self._duration_s)
        if timing.tok_s > 0:
            self._tok_s += (SMOOTHING if self._tok_s else 1.0) * (timing.tok_s - self._tok_s)

    def _fail_all(self, reason: RequestError) -> None:
        """End every unfinished request and every call with an error."""
        with self._changed:
            self._is_closing = True
            while self._inbox:
                self._engine.add(*self._inbox.popleft())
            calls = list(self._calls)
            self._calls.clear()
        self._deliver(self._engine.fail_all(reason))
        self._engine.close()
        for _, future in calls:
            future.set_exception(EdgelmError("the model is closed"))


def _ignore(_chunk: Chunk) -> None:
    """Replace a callback that failed."""
