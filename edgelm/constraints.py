"""Constraints made ready beside the engine: tried in a process of its own, compiled on a thread of their own, kept.

Whoever waits for one keeps nobody else waiting.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from edgelm.errors import BundleError, RequestError
from edgelm.messages import Constraint
from edgelm.trial import Trial

if TYPE_CHECKING:
    from edgelm.grammar import Grammar, Matcher

KEPT_BYTES: Final = 64_000_000
"""About how much compiled constraints may take that are kept for the next request which brings the same one."""


class Constraints:
    """Prepares constraints for one vocabulary; parameters as those of `Grammar`. Safe to call from several threads."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_tokens: tuple[int, ...]) -> None:
        self._vocabulary = (tokenizer, vocab_size, eos_tokens)
        self._trial = Trial(tokenizer, vocab_size, eos_tokens)
        self._grammar: Grammar | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[Constraint, tuple[Future[Matcher], int]] = OrderedDict()
        """By constraint, the one used longest ago first: the matcher, and about how many bytes it takes."""
        self._asked: SimpleQueue[tuple[Constraint, Future[Matcher]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def prepare(self, constraint: Constraint) -> Future[Matcher]:
        """Return what will have a matcher to be copied, or the `RequestError` with which the constraint is refused."""
        with self._lock:
            if constraint in self._kept:
                self._kept.move_to_end(constraint)
                return self._kept[constraint][0]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="edgelm-constraints", daemon=True)
                self._thread.start()
            future: Future[Matcher] = Future()
            self._kept[constraint] = (future, 0)
            self._asked.put((constraint, future))
            return future

    def close(self) -> None:
        """Stop trying."""
        with self._lock:
            if self._thread is not None:
                self._asked.put(None)
                self._thread = None
        self._trial.close()

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            constraint, future = asked
            size = 0
            try:
                size = self._trial.run(constraint)
                matcher = self._compiled(constraint)
            except (RequestError, BundleError) as error:
                self._settle(constraint, future, None)
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001  a bug of ours fails the request, and is told
                self._settle(constraint, future, None)
                future.set_exception(
                    RequestError("internal", f"the constraint failed: {type(error).__name__}: {error}")
                )
            else:
                self._settle(constraint, future, size)
                future.set_result(matcher)

    def _compiled(self, constraint: Constraint) -> Matcher:
        if self._grammar is None:
            from edgelm.grammar import Grammar

            self._grammar = Grammar(*self._vocabulary)
        return self._grammar.start(constraint)

    def _settle(self, constraint: Constraint, future: Future[Matcher], size: int | None) -> None:
        """Keep a matcher of so many bytes, and what else fits; None was refused, and is not kept."""
        with self._lock:
            if size is None:
                self._kept.pop(constraint, None)
                return
            self._kept[constraint] = (future, size)
            total = sum(each for _, each in self._kept.values())
            for other in [known for known, (_, each) in self._kept.items() if each and known != constraint]:
                if total <= KEPT_BYTES:
                    break
                total -= self._kept.pop(other)[1]
