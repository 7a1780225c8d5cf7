"""Decoding many requests together: `step()` admits, prefills a chunk, decodes one batch, samples, finishes.

No I/O, no threads, no clock but `time.monotonic`. Running sequences occupy rows 0 .. n-1 of the key/value
memory without gaps; at most one more, the last row, is still being prefilled.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import Bundle
from edgelm.errors import EdgelmError, RequestError
from edgelm.messages import Chunk, Constraint, FinishReason, Request
from edgelm.reuse import Reuse
from edgelm.sequence import Sequence, refused
from edgelm.session import PREFILL_CHUNK, Session, open_session
from edgelm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgelm.grammar import Grammar, Matcher

SCORE_CHUNK: Final = 64
"""Positions scored in one pass: bounds the logits held at once."""

MOST_ROWS: Final = 1024
"""Most requests decoded together."""

PREFIX_CACHE_MB: Final = 64
"""Default size of the memory of earlier sequences, in 10^6 bytes."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Request
    submitted: float


class Engine:
    """Owns a bundle's session. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        context: int | None = None,
        max_batch: int = 8,
        prefix_cache_mb: int = PREFIX_CACHE_MB,
    ) -> None:
        if not 1 <= max_batch <= MOST_ROWS:
            raise EdgelmError(f"max_batch must lie in [1, {MOST_ROWS}], got {max_batch}")
        if prefix_cache_mb < 0:
            raise EdgelmError(f"prefix_cache_mb must be at least 0, got {prefix_cache_mb}")
        manifest = bundle.manifest
        self.bundle = bundle
        self.max_batch = max_batch
        self.tokenizer = Tokenizer.from_file(
            bundle.tokenizer,
            chat_template=manifest.chat_template,
            bos_token=manifest.special_tokens.get("bos_token"),
            eos_token=manifest.special_tokens.get("eos_token"),
        )
        self.session: Session = open_session(bundle, rows=max_batch + 1, threads=threads, context=context)
        self.context = self.session.context
        self._eos = frozenset(manifest.eos_tokens)
        self._waiting: deque[_Waiting] = deque()
        self._running: list[Sequence] = []
        self._prefilling: Sequence | None = None
        self._cancelled: set[str] = set()
        self._reuse = Reuse(self.session, manifest.cache, prefix_cache_mb * 1_000_000)
        self._ready: list[Chunk] = []
        """What the step so far has for clients: kept here so that a failure later in the step does not lose it."""
        self._grammar: Grammar | None = None
        self._warm_up()

    # --- what the worker calls ---

    @property
    def queued(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that hold a row."""
        return len(self._running) + (self._prefilling is not None)

    def add(self, request: Request, submitted: float) -> None:
        """Queue a request; `submitted` is when it came, in seconds of `time.monotonic`."""
        self._waiting.append(_Waiting(request, submitted))

    def cancel(self, request_id: str) -> None:
        """Mark a request; the next step ends it with what it has."""
        self._cancelled.add(request_id)

    def step(self) -> list[Chunk]:
        """Do one round of work; return what clients are to see, in order."""
        self._drop_ended()
        self._admit()
        self._prefill()
        self._decode()
        return self._take_ready()

    def fail_all(self, error: RequestError) -> list[Chunk]:
        """End every request, waiting or running, with an error; return that after what a failed step had ready."""
        for sequence in self._held():
            self._ready.append(sequence.fail(error))
        self._ready += [refused(entry.request, "error", entry.submitted, error) for entry in self._waiting]
        self._running, self._prefilling = [], None
        self._waiting.clear()
        self._cancelled.clear()
        return self._take_ready()

    def score(self, tokens: list[int]) -> NDArray[np.float64]:
        """Return the natural-log probability of each token after the first, float64 [n - 1].

        Raises `RequestError` when there are more tokens than the context holds.
        """
        if len(tokens) > self.context:
            raise RequestError("bad_request", f"the text has {len(tokens)} tokens, the context holds {self.context}")
        result = np.empty(max(len(tokens) - 1, 0), np.float64)
        inputs = np.asarray(self._checked(tokens), np.int64)
        for start in range(0, len(result), SCORE_CHUNK):
            end = min(start + SCORE_CHUNK, len(result))
            part = self.session.prefill(self.max_batch, inputs[start:end], start, every=True, total=len(tokens))
            logits = part.astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(end - start), inputs[start + 1 : end + 1]]
            result[start:end] = chosen - np.log(np.exp(logits).sum(axis=1))
        return result

    # --- the parts of a step ---

    def _warm_up(self) -> None:
        """Run the graph once, so that the first request does not pay for what onnxruntime allocates late."""
        self.session.prefill(self.max_batch, np.zeros(1, np.int64), 0)
        self.session.decode(np.zeros(1, np.int64), np.zeros(1, np.int32))

    def _held(self) -> list[Sequence]:
        """Return every request that holds a row."""
        return [*self._running, *([self._prefilling] if self._prefilling is not None else [])]

    def _take_ready(self) -> list[Chunk]:
        ready, self._ready = self._ready, []
        return ready

    def _drop_ended(self) -> None:
        """End what was cancelled or is past its deadline."""
        now = time.monotonic()
        for entry in [entry for entry in self._waiting if self._end_of(entry.request, now)]:
            self._waiting.remove(entry)
            reason = self._end_of(entry.request, now) or "cancelled"
            self._ready.append(refused(entry.request, reason, entry.submitted))
        for sequence in self._held():
            ended = self._end_of(sequence.request, now)
            if ended:
                self._ready.append(sequence.finish(ended))
                self._reuse.keep(sequence)
                self._release(sequence)
        self._cancelled.clear()

    def _end_of(self, request: Request, now: float) -> FinishReason | None:
        if request.id in self._cancelled:
            return "cancelled"
        return "deadline" if request.deadline is not None and now >= request.deadline else None

    def _admit(self) -> None:
        """Give the oldest waiting request a row, when one is free and none is being prefilled."""
        while self._waiting and self._prefilling is None and len(self._running) < self.max_batch:
            entry = self._waiting.popleft()
            try:
                self._prefilling = self._open(entry)
                self._prefilling.row = len(self._running)
                self._reuse.begin(self._prefilling)
            except RequestError as error:
                self._ready.append(refused(entry.request, "error", entry.submitted, error))

    def _prefill(self) -> None:
        """Compute the next chunk of the prompt that is being read; after its end, sample the first token."""
        sequence = self._prefilling
        if sequence is None:
            return
        start = sequence.computed
        end = min(start + PREFILL_CHUNK, sequence.prompt_tokens)
        tokens = sequence.history[start:end].astype(np.int64)
        logits = self.session.prefill(sequence.row, tokens, start, total=sequence.prompt_tokens)
        sequence.computed = end
        if not sequence.is_prefilled():
            return
        self._reuse.keep(sequence)
        self._prefilling = None
        self._running.append(sequence)
        self._advance(sequence, logits[0])

    def _decode(self) -> None:
        """Compute one token of every running sequence and sample the next."""
        batch = list(self._running)
        if not batch:
            return
        for sequence in batch:
            if sequence.computed == self.session.long_from:
                self._compute_again(sequence)
        tokens = np.array([sequence.last_token for sequence in batch], np.int64)
        lengths = np.array([sequence.computed for sequence in batch], np.int32)
        logits = self.session.decode(tokens, lengths)
        for sequence in batch:  # all of them before any row moves
            sequence.computed += 1
        for row, sequence in enumerate(batch):
            self._advance(sequence, logits[row])

    def _compute_again(self, sequence: Sequence) -> None:
        """Recompute all positions of a sequence that outgrows what its rotary embedding was made for."""
        tokens = sequence.history[: sequence.computed].astype(np.int64)
        for start in range(0, len(tokens), PREFILL_CHUNK):
            part = tokens[start : start + PREFILL_CHUNK]
            self.session.prefill(sequence.row, part, start, total=sequence.computed + 1)

    def _advance(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        try:
            chunks = sequence.advance(logits)
        except RequestError as error:
            chunks = [sequence.fail(error)]
        self._ready += chunks
        last = chunks[-1].completion
        if last is not None:
            if last.error is None:
                self._reuse.keep(sequence)
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Free a row, and close the gap with the last ones."""
        if sequence is self._prefilling:
            self._prefilling = None
            return
        self._running.remove(sequence)
        if self._running and sequence.row < len(self._running):
            moved = self._running.pop()  # the highest row takes the gap
            self._running.insert(sequence.row, moved)
            self._move(moved, sequence.row)
        if self._prefilling is not None:
            self._move(self._prefilling, len(self._running))

    def _move(self, sequence: Sequence, row: int) -> None:
        self.session.copy_row(sequence.row, row, sequence.computed)
        sequence.row = row

    def _open(self, entry: _Waiting) -> Sequence:
        request = entry.request
        return Sequence(
            request,
            self._prompt(request),
            tokenizer=self.tokenizer,
            vocab_size=self.bundle.manifest.vocab_size,
            context=self.context,
            eos_tokens=self._eos,
            matcher=self._matcher(request.constraint),
            submitted=entry.submitted,
        )

    def _prompt(self, request: Request) -> list[int]:
        if request.tokens is not None:
            tokens = list(request.tokens)
        elif request.prompt is not None:
            tokens = self.tokenizer.encode(request.prompt)
        else:
            rendered = self.tokenizer.render_chat(request.messages or ())
            tokens = self.tokenizer.encode(rendered, add_special_tokens=False)
        return self._checked(tokens)

    def _checked(self, tokens: list[int]) -> list[int]:
        vocab_size = self.bundle.manifest.vocab_size  # a tokenizer may have added tokens that the model lacks
        bad = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise RequestError("bad_request", f"token {bad} lies outside the vocabulary [0, {vocab_size})")
        return tokens

    def _matcher(self, constraint: Constraint | None) -> Matcher | None:
        if constraint is None:
            return None
        if self._grammar is None:
            from edgelm.grammar import Grammar

            manifest = self.bundle.manifest
            self._grammar = Grammar(self.bundle.tokenizer, manifest.vocab_size, manifest.eos_tokens)
        return self._grammar.start(constraint)
