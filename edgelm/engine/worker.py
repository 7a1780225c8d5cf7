"""The one thread that owns an engine: a bounded queue in, chunks out through each request's sink."""

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

Sink = Callable[[Chunk], None]
"""Receives a request's chunks on the worker's thread. It must not block, and loses the rest when it raises."""

Result = TypeVar("Result")

INITIAL_DURATION_S: Final = 1.0
"""Duration of a request assumed before one has finished, for `retry_after_s`."""

LOG: Final = logging.getLogger(__name__)

SMOOTHING: Final = 0.2
"""Weight of the newest request in the running means."""


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """`queued` requests wait, `active` ones run; `tok_s` is a running mean of answers' tokens per second."""

    queued: int
    active: int
    completed: int
    tok_s: float


class Worker:
    """Runs an engine on a thread of its own.

    Parameters
    ----------
    engine
        Owned by the worker from now on.
    queue_size
        Requests that may wait beyond those that run; None is unbounded.
    """

    def __init__(self, engine: Engine, queue_size: int | None = 8) -> None:
        self._engine = engine
        self.failure: BaseException | None = None
        self._queue_size = queue_size
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Request, float]] = deque()
        self._calls: deque[tuple[Callable[[Engine], Any], Future[Any]]] = deque()
        self._cancels: list[str] = []
        self._sinks: dict[str, Sink] = {}
        self._draining = False
        self._closing = False
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
        """Start the thread. It is stopped when the program ends: a graph that runs then would end it with an abort."""
        atexit.register(self.close)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request.

        Raises `RequestError`: "busy" with `retry_after_s` when the queue is full, "draining" after `drain()` or
        `close()`, "id_conflict" when a request of that id is under way, "internal" when the worker's thread has died.
        Every later failure arrives as the last chunk, whose completion carries the error.
        """
        with self._changed:
            if self.failure is not None:
                raise RequestError("internal", f"the engine has stopped: {self.failure}")
            if self._draining or self._closing:
                raise RequestError("draining", "the service is stopping and takes no new requests")
            if request.id in self._sinks:
                raise RequestError("id_conflict", f"a request with id {request.id!r} is under way")
            if self._queue_size is not None and len(self._sinks) >= self._queue_size + self._engine.max_batch:
                raise RequestError(
                    "busy", f"the queue is full ({self._queue_size} waiting)", retry_after_s=self._retry_after_s()
                )
            self._sinks[request.id] = sink
            self._inbox.append((request, time.monotonic()))
            self._changed.notify()

    def retry_after_s(self) -> float:
        """Return about when what waits now will have been answered, in seconds."""
        with self._changed:
            return self._retry_after_s()

    def _retry_after_s(self) -> float:
        return round(max(0.1, len(self._sinks) / self._engine.max_batch * self._duration_s), 1)

    def cancel(self, request_id: str) -> bool:
        """End a request with what it has; return whether it was under way."""
        with self._changed:
            known = request_id in self._sinks
            if known:
                self._cancels.append(request_id)
                self._changed.notify()
            return known

    def call(self, function: Callable[[Engine], Result]) -> Result:
        """Run a function on the worker's thread between two steps, and return what it returns."""
        future: Future[Result] = Future()
        with self._changed:
            if self.failure is not None or self._closing:
                raise EdgelmError("the model is closed")
            self._calls.append((function, future))
            self._changed.notify()
        return future.result()

    def drain(self) -> None:
        """Refuse new requests from now on; those under way go on."""
        with self._changed:
            self._draining = True

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop the thread after the current step; what is under way ends with the error "interrupted"."""
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def stats(self) -> WorkerStats:
        """Return a snapshot."""
        with self._changed:
            active = self._engine.active
            return WorkerStats(max(0, len(self._sinks) - active), active, self._completed, self._tok_s)

    # --- the worker's thread ---

    def _run(self) -> None:
        try:
            self._engine.warm_up()  # here: who loads a model has something else to do in the meantime
            while self._take():
                self._deliver(self._step())
        except BaseException as error:  # noqa: BLE001  a bug of ours: say so to everyone rather than fall silent
            self.failure = error
        finally:
            reason = RequestError("interrupted", "the service stopped before the answer was complete")
            if self.failure is not None:
                reason = RequestError("internal", f"the engine has stopped: {self.failure}")
            self._end(reason)

    def _take(self) -> bool:
        """Wait for work and hand it to the engine; return whether to go on."""
        with self._changed:
            while not (self._inbox or self._calls or self._cancels or self._closing or self._has_work()):
                self._changed.wait()
            if self._closing:
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
            except BaseException as error:  # noqa: BLE001  it belongs to the caller
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
                sink = self._sinks.pop(chunk.id, None) if chunk.done else self._sinks.get(chunk.id)
                if chunk.completion is not None:
                    self._count(chunk.completion)
                    self._cancels = [known for known in self._cancels if known != chunk.id]  # not for the id's next use
            if sink is not None:
                self._hand_over(chunk, sink)

    def _hand_over(self, chunk: Chunk, sink: Sink) -> None:
        try:
            sink(chunk)
        except Exception:  # a bug of one client must not cost the others their answers
            LOG.exception("the receiver of request %r failed; its answer is dropped", chunk.id)
            with self._changed:
                if chunk.id in self._sinks:  # the id stays taken until the engine has let go of it
                    self._sinks[chunk.id] = _ignore
                    self._cancels.append(chunk.id)

    def _count(self, completion: Completion) -> None:
        self._completed += 1
        timing = completion.timing
        self._duration_s += SMOOTHING * ((timing.total_ms - timing.queue_ms) / 1e3 - self._duration_s)
        if timing.tok_s > 0:
            self._tok_s += (SMOOTHING if self._tok_s else 1.0) * (timing.tok_s - self._tok_s)

    def _end(self, reason: RequestError) -> None:
        """Give everyone under way a final message, and every caller an error."""
        with self._changed:
            self._closing = True
            while self._inbox:
                self._engine.add(*self._inbox.popleft())
            calls = list(self._calls)
            self._calls.clear()
        self._deliver(self._engine.fail_all(reason))
        self._engine.close()
        for _, future in calls:
            future.set_exception(EdgelmError("the model is closed"))


def _ignore(_chunk: Chunk) -> None:
    """Stand in for a receiver that failed."""
