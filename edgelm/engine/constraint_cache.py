"""Prepares constraints on a background thread: tries them in a sandbox process, compiles and caches them.

A request that waits for its constraint delays no other request. Each client has its own cache entries: if they were
shared, the time to the first token would reveal to a client which schemas others use.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edgelm.engine.constraint_sandbox import ConstraintSandbox
from edgelm.engine.fairness import FairQueue
from edgelm.errors import BundleError, RequestError
from edgelm.types import UNCACHED_OWNER, Constraint, Owner

if TYPE_CHECKING:
    from edgelm.text.constraint_compiler import ConstraintCompiler, Matcher

CONSTRAINT_CACHE_BYTES: Final = 64_000_000
"""Approximate maximum size of all cached matchers."""

TRIM_INTERVAL: Final = 25
"""Number of constraints after which the C library returns free memory to the system, which takes some milliseconds.
Compiling one takes up to about 100 MB and fragments the heap."""

_Key = tuple[Owner, Constraint]


class ConstraintCache:
    """Prepares constraints for one vocabulary; the parameters are those of `ConstraintCompiler`.

    Safe to call from several threads.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_tokens: tuple[int, ...]) -> None:
        self._vocabulary = (tokenizer, vocab_size, eos_tokens)
        self._sandbox = ConstraintSandbox(tokenizer, vocab_size, eos_tokens)
        self._compiler: ConstraintCompiler | None = None
        self._changed = threading.Condition()
        self._entries: OrderedDict[_Key, tuple[Future[Matcher], int]] = OrderedDict()
        """Matcher and bytes by owner and constraint, the least recently used first; 0 bytes until it is prepared."""
        self._queue: FairQueue[tuple[_Key, Future[Matcher]]] = FairQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def prepare(self, constraint: Constraint, owner: Owner = None) -> Future[Matcher]:
        """Return a future of the constraint's matcher, which the caller must copy before use.

        The future raises `RequestError` if the constraint is refused. The order between owners is round-robin.
        """
        key = (owner, constraint)
        with self._changed:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][0]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="edgelm-constraints", daemon=True)
                self._thread.start()
            future: Future[Matcher] = Future()
            if owner != UNCACHED_OWNER:
                self._entries[key] = (future, 0)
            self._queue.put(owner, (key, future))
            self._changed.notify()
            return future

    def close(self) -> None:
        """Stop the thread and the sandbox."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._sandbox.close()

    def _next(self) -> tuple[_Key, Future[Matcher]] | None:
        """Wait for the next constraint; return None after `close()`."""
        with self._changed:
            while not len(self._queue) and not self._is_closed:
                self._changed.wait()
            return None if self._is_closed else self._queue.get()

    def _run(self) -> None:
        count = 0
        while (entry := self._next()) is not None:
            count += 1
            if count % TRIM_INTERVAL == 0:
                _trim_heap()
            key, future = entry
            constraint = key[1]
            size = 0
            try:
                size = self._sandbox.run(constraint)
                matcher = self._compile(constraint)
            except (RequestError, BundleError) as error:
                self._store(key, future, None)
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001  an internal error fails only this request
                self._store(key, future, None)
                future.set_exception(
                    RequestError("internal", f"the constraint failed: {type(error).__name__}: {error}")
                )
            else:
                self._store(key, future, size)
                future.set_result(matcher)

    def _compile(self, constraint: Constraint) -> Matcher:
        if self._compiler is None:
            from edgelm.text.constraint_compiler import ConstraintCompiler

            self._compiler = ConstraintCompiler(*self._vocabulary)
        return self._compiler.compile(constraint)

    def _store(self, key: _Key, future: Future[Matcher], size: int | None) -> None:
        """Cache a matcher of `size` bytes and evict others until all fit; if it is None, remove the entry instead."""
        with self._changed:
            if size is None or key[0] == UNCACHED_OWNER:
                self._entries.pop(key, None)
                return
            self._entries[key] = (future, size)
            total = sum(each for _, each in self._entries.values())
            for other in [known for known, (_, each) in self._entries.items() if each and known != key]:
                if total <= CONSTRAINT_CACHE_BYTES:
                    break
                total -= self._entries.pop(other)[1]


def _trim_heap() -> None:
    """Return free heap memory to the system, if the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
