"""Constraints made ready beside the engine: tried in a process of its own, compiled on a thread of their own, kept.

Whoever waits for one keeps nobody else waiting. What is kept belongs to the client that brought it: were it shared, the
time to the first token would tell a client which schemas others use.
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
    from edgelm.text.grammar import ConstraintCompiler, Matcher

CONSTRAINT_CACHE_BYTES: Final = 64_000_000
"""About how much compiled constraints may take that are kept for the next request which brings the same one."""

TRIM_INTERVAL: Final = 25
"""Constraints after which the C library gives back what it holds of memory that is free: one takes up to some 100 MB
while it is compiled, and leaves holes. It takes some milliseconds."""


_Key = tuple[Owner, Constraint]


class ConstraintCache:
    """Prepares constraints for one vocabulary; parameters as those of `ConstraintCompiler`.

    Safe to call from several threads.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_tokens: tuple[int, ...]) -> None:
        self._vocabulary = (tokenizer, vocab_size, eos_tokens)
        self._sandbox = ConstraintSandbox(tokenizer, vocab_size, eos_tokens)
        self._compiler: ConstraintCompiler | None = None
        self._changed = threading.Condition()
        self._kept: OrderedDict[_Key, tuple[Future[Matcher], int]] = OrderedDict()
        """By owner and constraint, the one used longest ago first: the matcher, and about how many bytes it takes."""
        self._asked: FairQueue[tuple[_Key, Future[Matcher]]] = FairQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def prepare(self, constraint: Constraint, owner: Owner = None) -> Future[Matcher]:
        """Return what will have a matcher to be copied, or the `RequestError` with which the constraint is refused.

        Owners' constraints are tried in turns.
        """
        key = (owner, constraint)
        with self._changed:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="edgelm-constraints", daemon=True)
                self._thread.start()
            future: Future[Matcher] = Future()
            if owner != UNCACHED_OWNER:
                self._kept[key] = (future, 0)
            self._asked.put(owner, (key, future))
            self._changed.notify()
            return future

    def close(self) -> None:
        """Stop trying."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._sandbox.close()

    def _next(self) -> tuple[_Key, Future[Matcher]] | None:
        """Wait for a constraint to try; None is the end."""
        with self._changed:
            while not len(self._asked) and not self._is_closed:
                self._changed.wait()
            return None if self._is_closed else self._asked.get()

    def _run(self) -> None:
        count = 0
        while (asked := self._next()) is not None:
            count += 1
            if count % TRIM_INTERVAL == 0:
                _trim_heap()
            key, future = asked
            constraint = key[1]
            size = 0
            try:
                size = self._sandbox.run(constraint)
                matcher = self._compiled(constraint)
            except (RequestError, BundleError) as error:
                self._settle(key, future, None)
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001  a bug of ours fails the request, and is told
                self._settle(key, future, None)
                future.set_exception(
                    RequestError("internal", f"the constraint failed: {type(error).__name__}: {error}")
                )
            else:
                self._settle(key, future, size)
                future.set_result(matcher)

    def _compiled(self, constraint: Constraint) -> Matcher:
        if self._compiler is None:
            from edgelm.text.grammar import ConstraintCompiler

            self._compiler = ConstraintCompiler(*self._vocabulary)
        return self._compiler.compile(constraint)

    def _settle(self, key: _Key, future: Future[Matcher], size: int | None) -> None:
        """Keep a matcher of so many bytes, and what else fits; None was refused, and is not kept."""
        with self._changed:
            if size is None or key[0] == UNCACHED_OWNER:
                self._kept.pop(key, None)
                return
            self._kept[key] = (future, size)
            total = sum(each for _, each in self._kept.values())
            for other in [known for known, (_, each) in self._kept.items() if each and known != key]:
                if total <= CONSTRAINT_CACHE_BYTES:
                    break
                total -= self._kept.pop(other)[1]


def _trim_heap() -> None:
    """Give the system back what the C library keeps of memory that is free; where that is not glibc's, nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
