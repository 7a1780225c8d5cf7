"""Decodes many requests together: `step()` admits, prefills one chunk, decodes one batch, samples, finishes.

Owns the runner and everything that requests share. No I/O, and no clock except `time.monotonic`. Its threads are those
of onnxruntime and two background threads that prepare constraints and long prompts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.bundle_folder import Bundle
from edgelm.engine.admission import Admission
from edgelm.engine.engine_options import DEFAULT_OPTIONS, EngineOptions
from edgelm.engine.fairness import FairnessPolicy
from edgelm.engine.prefix_cache import PrefixCache
from edgelm.engine.scheduler import Scheduler
from edgelm.engine.scoring import score
from edgelm.engine.sequence import QueuedRequest, Sequence
from edgelm.engine.sessions import SessionState
from edgelm.engine.speculation import NO_DRAFT, Speculator
from edgelm.errors import RequestError
from edgelm.runtime.memory_plan import PREFILL_CHUNK, check_memory
from edgelm.runtime.prepack import open_verified
from edgelm.runtime.runner import Runner, open_runner
from edgelm.types import Chunk, FinishReason, Request

IDLE_WAIT_S: Final = 0.02
"""How long an idle step waits for a constraint or a prompt before it checks deadlines again."""


class Engine:
    """A loaded bundle and its requests. Not thread-safe: one thread calls it."""

    def __init__(self, bundle: Bundle, options: EngineOptions = DEFAULT_OPTIONS) -> None:
        self.bundle, self.max_batch = bundle, options.max_batch
        rows = options.max_batch + 1  # the last one is `scratch_row`
        self.memory = check_memory(
            bundle.manifest,
            options.memory_limit_mb,
            rows=rows,
            context=bundle.manifest.context if options.context is None else options.context,
            prefix_cache_bytes=options.prefix_cache_bytes,
        )
        self.runner: Runner = open_runner(
            bundle,
            rows=rows,
            threads=options.threads,
            spin=options.spin,
            context=options.context,
            cache=options.board_cache,
        )
        self.context = self.runner.context
        self._admission = Admission(bundle, self.context, options.client_limits)
        self.tokenizer, self._sessions = self._admission.tokenizer, self._admission.sessions
        self._waiting: deque[QueuedRequest] = deque()
        self._scheduler = Scheduler(self.runner, options.max_batch)
        self._fairness = FairnessPolicy(options.client_limits.rows)
        self._cancelled: set[str] = set()
        self._prefix_cache = PrefixCache(self.runner, bundle, options.prefix_cache_bytes)
        self._speculator = Speculator() if options.speculation else None
        self._ready: list[Chunk] = []
        """Chunks of the current step; kept here so that a failure later in the step does not lose them."""

    @classmethod
    def open(cls, path: str | Path, options: EngineOptions = DEFAULT_OPTIONS) -> Engine:
        """Open, verify and load a bundle. Raises `EdgelmError` as `edgelm.load` does."""
        return cls(open_verified(path, options.board_cache), options)

    # --- called by the worker ---

    def close(self) -> None:
        """Stop the background threads."""
        self._admission.close()

    def warm_up(self) -> None:
        """Run the graph once, so that the first request does not wait for late allocations."""
        self.runner.prefill(self.scratch_row, np.zeros(1, np.int64), 0)
        self.runner.decode(np.zeros(1, np.int64), np.zeros(1, np.int32))

    @property
    def queued(self) -> int:
        """Number of requests that wait for a row."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Number of requests that hold a row."""
        return len(self._scheduler.held)

    def add(self, request: Request, submitted_s: float) -> None:
        """Queue a request; `submitted_s` is the time of its submission, in seconds of `time.monotonic`."""
        self._waiting.append(QueuedRequest(request, submitted_s, self._admission.prepare_constraint(request)))

    def cancel(self, request_id: str) -> None:
        """Mark a request as cancelled; the next step finishes it with the answer so far."""
        self._cancelled.add(request_id)

    def step(self) -> list[Chunk]:
        """Do one round of work; return the new chunks in order."""
        self._finish_expired()
        self._admit()
        if not self._scheduler.held and not self._ready and self._await_preparation():
            self._admit()
        self._decode(PREFILL_CHUNK - self._prefill())
        return self._take_ready()

    def fail_all(self, error: RequestError) -> list[Chunk]:
        """End every waiting or running request with an error; return these chunks after those of the failed step."""
        for sequence in self._scheduler.held:
            self._ready.append(sequence.fail(error))
        self._ready += [entry.end("error", error) for entry in self._waiting]
        self._scheduler.clear()
        self._waiting.clear()
        self._cancelled.clear()
        return self._take_ready()

    def end_session(self, session: str, client: str | None = None) -> bool:
        """End a client's session; return whether it existed."""
        return self._sessions.end_session(session, client)

    def session_token_counts(self, client: str | None = None) -> dict[str, int]:
        """Return the number of tokens of each of a client's sessions, the least recently used first."""
        return self._sessions.token_counts(client)

    def score(self, tokens: list[int]) -> NDArray[np.float64]:
        """Return the natural-log probability of each token after the first, float64 [n - 1].

        Raises `RequestError` if there are more tokens than the context has.
        """
        if len(tokens) > self.context:
            raise RequestError("bad_request", f"the text has {len(tokens)} tokens, the context holds {self.context}")
        return score(self.runner, self.scratch_row, self._admission.check_tokens(tokens))

    @property
    def scratch_row(self) -> int:
        """The row of the KV cache that no request holds."""
        return self.max_batch

    # --- the parts of a step ---

    def _take_ready(self) -> list[Chunk]:
        ready, self._ready = [self._sessions.record_completion(chunk) for chunk in self._ready], []
        return ready

    def _finish_expired(self) -> None:
        """Finish requests that were cancelled or are past their deadline."""
        now = time.monotonic()
        for entry in list(self._waiting):
            if reason := self._expiry_reason(entry.request, now):
                self._waiting.remove(entry)
                self._ready.append(entry.end(reason))
        for sequence in self._scheduler.held:
            if ended := self._expiry_reason(sequence.request, now):
                self._ready.append(sequence.finish(ended))
                self._prefix_cache.store(sequence)
                self._scheduler.release(sequence)
        self._cancelled.clear()

    def _expiry_reason(self, request: Request, now: float) -> FinishReason | None:
        if request.id in self._cancelled:
            return "cancelled"
        return "deadline" if request.deadline is not None and now >= request.deadline else None

    def _admit(self) -> None:
        """Assign free rows to waiting requests, fairly between clients."""
        while not self._scheduler.is_full:
            entry = self._next_waiting()
            if entry is None:
                return
            sequence = self._create_sequence(entry)
            self._waiting.remove(entry)  # only now: if creating the sequence fails, the request still gets an error
            self._fairness.record_served(entry.request.client, (other.request.client for other in self._waiting))
            if sequence is None:
                continue
            self._scheduler.assign_row(sequence)
            self._emit(sequence, sequence.start())

    def _next_waiting(self) -> QueuedRequest | None:
        """Return the next request to start: it is prepared, and no earlier request of its session is unfinished."""
        running = [sequence.request.client for sequence in self._scheduler.held]
        return self._fairness.choose(self._ready_to_start(), running, lambda entry: entry.request.client)

    def _ready_to_start(self) -> Iterator[QueuedRequest]:
        """Yield the requests that can start, the oldest first; start preparing prompts whose session is free."""
        blocked: set[tuple[str | None, str]] = set()
        for entry in self._waiting:
            request = entry.request
            session = None if request.session is None else (request.client, request.session)
            if session in blocked:
                continue
            if entry.is_constraint_ready and (
                entry.prompt_future is not None or not self._sessions.is_session_busy(request)
            ):
                if entry.prompt_future is None:
                    entry.prompt_future = self._prepare_prompt(request)
                if entry.prompt_future.done():
                    yield entry
            if session is not None:
                blocked.add(session)

    def _prepare_prompt(self, request: Request) -> Future[SessionState]:
        before = self._sessions.begin_request(request)
        if not request.is_end_session_only:
            return self._admission.prepare_prompt(request, before)
        nothing: Future[SessionState] = Future()
        nothing.set_result(before)
        return nothing

    def _await_preparation(self) -> bool:
        """Wait up to `IDLE_WAIT_S` for a constraint or a prompt in preparation; return whether there is one."""
        pending = [future for entry in self._waiting for future in entry.pending_futures]
        if pending:
            wait(pending, IDLE_WAIT_S, FIRST_COMPLETED)
        return bool(pending)

    def _create_sequence(self, entry: QueuedRequest) -> Sequence | None:
        """Return the sequence of a request; None if it ends now: it is invalid, or only ends a session."""
        try:
            if not entry.request.is_end_session_only and entry.prompt_future is not None:
                return self._admission.create_sequence(
                    entry.request, entry.submitted_s, entry.prompt_future.result(), entry.matcher_future
                )
            self._ready.append(entry.end("stop"))
        except RequestError as error:
            self._ready.append(entry.end("error", error))
        return None

    def _prefill(self) -> int:
        """Compute one prefill chunk, return its size in tokens; at the end of a prompt, sample the first token."""
        sequence = self._scheduler.choose_prefill()
        if sequence is None:
            return 0
        if sequence.computed_tokens == 0:  # only now, so that prompts computed in the meantime are found
            self._prefix_cache.load_prefix(sequence)
        start = sequence.computed_tokens
        end = min(start + PREFILL_CHUNK, sequence.length)
        tokens = sequence.history[start:end].astype(np.int64)
        logits = self.runner.prefill(sequence.row, tokens, start, final_length=sequence.length)
        sequence.computed_tokens = end
        if sequence.is_prefilled():
            self._prefix_cache.store(sequence)
            self._scheduler.start(sequence)
            self._advance(sequence, logits[0])
        return len(tokens)

    def _decode(self, token_budget: int) -> None:
        """Compute the newest token of every running sequence and sample the next; speculate if there is only one.

        In addition at most `token_budget` tokens that constraints forced are computed; a sequence that has more of them
        samples in a later step.
        """
        batch, long_from = list(self._scheduler.running), self.runner.long_from
        for sequence in batch:
            if long_from is not None and sequence.computed_tokens <= long_from < sequence.length:
                self._recompute(sequence)
        if not batch:
            return
        if len(batch) == 1 and len(batch[0].pending) <= max(token_budget, 1):
            self._decode_speculative(batch[0])
            return
        for sequence in batch:
            end = min(sequence.length - 1, sequence.computed_tokens + token_budget)
            token_budget -= self._compute(sequence, end)
        tokens = np.array([sequence.pending[0] for sequence in batch], np.int64)
        lengths = np.array([sequence.computed_tokens for sequence in batch], np.int32)
        logits = self.runner.decode(tokens, lengths)
        for sequence in batch:  # before `_advance`, which may move rows
            sequence.computed_tokens += 1
        for row, sequence in enumerate(batch):
            if sequence.is_prefilled():
                self._advance(sequence, logits[row])

    def _decode_speculative(self, sequence: Sequence) -> None:
        """Compute pending and draft tokens in one pass; sample while the samples equal the draft tokens."""
        pending = sequence.pending
        draft = self._propose_draft(sequence) if len(pending) == 1 else NO_DRAFT
        tokens = np.concatenate([pending, draft]) if len(draft) else pending
        start_s = time.perf_counter()
        if len(tokens) == 1:
            logits = self.runner.decode(tokens, np.array([sequence.computed_tokens], np.int32))
        else:
            logits = self.runner.prefill(
                sequence.row,
                tokens,
                sequence.computed_tokens,
                all_logits=len(draft) > 0,
                final_length=sequence.length + len(draft),
            )
        elapsed_s = time.perf_counter() - start_s
        sequence.computed_tokens = sequence.length
        accepted = 0
        while self._advance(sequence, logits[accepted]) and accepted < len(draft):
            if sequence.history[sequence.computed_tokens] != draft[accepted]:
                break
            accepted += 1
            sequence.computed_tokens += 1
            if sequence.length > sequence.computed_tokens:
                break  # a constraint forced further tokens
        if self._speculator is not None:
            self._speculator.record_pass(sequence.draft_state, len(tokens), elapsed_s, len(draft), accepted)

    def _propose_draft(self, sequence: Sequence) -> NDArray[np.int32]:
        """Return draft tokens, int32 [n], that fit the context and the current rotary embedding."""
        if self._speculator is None or (sequence.is_seeded and not self.runner.is_invariant):
            return NO_DRAFT
        max_tokens, long_from = sequence.remaining_tokens - 1, self.runner.long_from
        if long_from is not None and sequence.length <= long_from:
            max_tokens = min(max_tokens, long_from - sequence.length)
        return self._speculator.propose(
            sequence.draft_state, sequence.history[: sequence.length], max_tokens, sequence.request.owner
        )

    def _compute(self, sequence: Sequence, end: int) -> int:
        """Compute the tokens of a sequence up to position `end`, without logits; return their number."""
        begun = sequence.computed_tokens
        for start in range(begun, end, PREFILL_CHUNK):
            part = sequence.history[start : min(start + PREFILL_CHUNK, end)].astype(np.int64)
            self.runner.prefill(sequence.row, part, start, final_length=sequence.length)
        sequence.computed_tokens = end
        return end - begun

    def _recompute(self, sequence: Sequence) -> None:
        """Recompute all positions of a sequence that becomes longer than its rotary embedding allows."""
        sequence.computed_tokens, sequence.is_long_rope = 0, True
        self._compute(sequence, sequence.length - 1)

    def _advance(self, sequence: Sequence, logits: NDArray[np.float32]) -> bool:
        """Sample the next token of a sequence; return whether it continues."""
        try:
            chunks = sequence.advance(logits)
        except RequestError as error:
            chunks = [sequence.fail(error)]
        return not self._emit(sequence, chunks)

    def _emit(self, sequence: Sequence, chunks: list[Chunk]) -> bool:
        """Add the chunks of a sequence to the step's; return whether the sequence has ended."""
        self._ready += chunks
        last = chunks[-1].completion if chunks else None
        if last is None:
            return False
        if last.error is None:
            self._prefix_cache.store(sequence)
            if self._speculator is not None:
                self._speculator.add_sequence(sequence.history[: sequence.length], sequence.request.owner)
        self._scheduler.release(sequence)
        return True
