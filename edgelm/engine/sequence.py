"""The state of one request in the engine: its tokens, sampler, constraint, text so far, and times.

Knows nothing of other requests, batches or the graph.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.repetition_guard import LoopDetector
from edgelm.engine.speculation import DraftState
from edgelm.errors import RequestError
from edgelm.sampling import Sampler
from edgelm.text.tokenizer import StreamDecoder, Tokenizer
from edgelm.types import Chunk, Completion, FinishReason, Request, Timing, TokenLogprob, Usage

if TYPE_CHECKING:
    from concurrent.futures import Future

    from edgelm.engine.sessions import SessionState
    from edgelm.text.constraint_compiler import Matcher

PROMPT_TAIL = 8
"""Prompt tokens that the detokenizer gets before the answer: the spacing of the first word depends on them."""


class Sequence:
    """A request with its prompt in tokens. `row` is its row of the KV cache while it runs."""

    def __init__(
        self,
        request: Request,
        prompt: list[int],
        *,
        tokenizer: Tokenizer,
        vocab_size: int,
        context: int,
        eos_tokens: frozenset[int],
        matcher: Matcher | None,
        submitted_s: float,
    ) -> None:
        if not prompt:
            raise RequestError("bad_request", "the prompt is empty: it has no tokens, and the model has no start token")
        if len(prompt) >= context:
            raise RequestError(
                "bad_request",
                f"the prompt has {len(prompt)} tokens, the context holds {context} with at least one for the answer:"
                " shorten the prompt or load with a longer context",
            )
        params = request.sampling
        self.request = request
        self.row = -1
        self.prompt_tokens = len(prompt)
        self.computed_tokens = 0
        """Positions already in the KV cache."""
        self.cached_tokens = 0
        """Positions of the prompt that came from the prefix cache."""
        self.is_long_rope = False
        """Whether the positions in the KV cache were embedded for LongRoPE's long context."""
        self.draft_state = DraftState()
        self._limit = min(params.max_tokens, context - len(prompt))
        self.history: NDArray[np.int32] = np.zeros(len(prompt) + self._limit, np.int32)
        self.history[: len(prompt)] = prompt
        self.length = len(prompt)
        self._eos = frozenset() if params.ignore_eos else eos_tokens
        self._matcher = matcher
        is_guarded = params.repetition_guard and matcher is None and not params.ignore_eos
        self._loop_detector = LoopDetector() if is_guarded else None
        self._sampler = Sampler(params, vocab_size)
        self._decoder = StreamDecoder(tokenizer, prompt[-PROMPT_TAIL:], params.stop)
        self._logprobs: list[TokenLogprob] = []
        self._submitted_s = submitted_s
        self._started_s = time.monotonic()
        self._first_token_s: float | None = None
        self._next_seq = 0
        self._forced_tokens = 0

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def pending(self) -> NDArray[np.int64]:
        """The newest tokens, int64 [n], which are not in the KV cache yet; at least one while the sequence runs."""
        return self.history[self.computed_tokens : self.length].astype(np.int64)

    @property
    def remaining_tokens(self) -> int:
        """Number of tokens that the answer may still get."""
        return self._limit - (self.length - self.prompt_tokens)

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens of the answer so far, without an end token."""
        return tuple(int(token) for token in self.history[self.prompt_tokens : self.length])

    @property
    def is_seeded(self) -> bool:
        """Whether the answer must not depend on earlier requests, not even by rounding."""
        return self.request.sampling.seed is not None

    def is_prefilled(self) -> bool:
        """Return whether the prompt and all forced tokens are in the KV cache."""
        return self.computed_tokens >= self.length

    def start(self) -> list[Chunk]:
        """Append the tokens that the constraint forces at the start of the answer; return their chunks."""
        return self._append_forced()

    def advance(self, logits: NDArray[np.float32]) -> list[Chunk]:
        """Sample the next token from logits, float32 [V], changed in place; return the new chunks.

        The last chunk of an answer is `done`. Raises `RequestError("internal")` if the logits are not finite.
        """
        params = self.request.sampling
        raw = logits.copy() if params.logprobs else None
        mask = self._matcher.mask() if self._matcher is not None else None
        token = self._sampler.sample(logits, mask, self.history[: self.length])
        if token in self._eos:
            self._record_first_token()
            return [self.finish("stop")]
        if raw is not None:
            self._logprobs.append(self._sampler.logprobs(raw, token))
        chunks = self._append(token)
        return chunks if chunks[-1].done else [*chunks, *self._append_forced()]

    def _record_first_token(self) -> None:
        if self._first_token_s is None:
            self._first_token_s = time.monotonic()

    def _append(self, token: int, *, forced: bool = False) -> list[Chunk]:
        """Append a token; return its chunks."""
        if self._matcher is not None:
            self._matcher.accept(token)
        self._forced_tokens += forced
        self._record_first_token()
        self.history[self.length] = token
        self.length += 1
        chunks = [self._chunk(self._decoder.push(token), token)]
        if self._decoder.is_stopped or (self._matcher is not None and self._matcher.is_finished):
            chunks.append(self.finish("stop"))
        elif self.remaining_tokens == 0:
            chunks.append(self.finish("length"))
        elif self._is_loop():
            chunks.append(self.finish("repetition"))
        return chunks

    def _is_loop(self) -> bool:
        answer = self.history[self.prompt_tokens : self.length]
        return self._loop_detector is not None and self._loop_detector.detect(answer)

    def _append_forced(self) -> list[Chunk]:
        """Append the tokens that the constraint forces, which need no logits; return their chunks."""
        chunks: list[Chunk] = []
        if self._matcher is None or self.request.sampling.logprobs:
            return chunks
        try:
            for token in self._matcher.forced_tokens():
                chunks += self._append(token, forced=True)
                if chunks[-1].done:
                    break
        except RequestError as error:
            chunks.append(self.fail(error))
        return chunks

    def fail(self, error: RequestError) -> Chunk:
        """Return the last chunk of a request that failed, in any state."""
        try:
            return self.finish("error", error)
        except Exception:  # noqa: BLE001  decoding the text may be what failed
            done = Completion(self.id, self._decoder.text, self.answer, "error", error=error)
            return self._chunk("", None, done)

    def finish(self, reason: FinishReason, error: RequestError | None = None) -> Chunk:
        """Return the last chunk, with the completion."""
        delta = self._decoder.finish()
        now = time.monotonic()
        first = self._first_token_s if self._first_token_s is not None else now
        count = self.length - self.prompt_tokens
        completion = Completion(
            id=self.id,
            text=self._decoder.text,
            tokens=self.answer,
            finish_reason=reason,
            usage=Usage(self.prompt_tokens, self.cached_tokens, count, self._forced_tokens),
            timing=Timing(
                queue_ms=1e3 * (self._started_s - self._submitted_s),
                ttft_ms=1e3 * (first - self._submitted_s),
                total_ms=1e3 * (now - self._submitted_s),
                tok_s=(count - 1) / (now - first) if count > 1 and now > first else 0.0,
            ),
            logprobs=tuple(self._logprobs) if self.request.sampling.logprobs else None,
            error=error,
        )
        return self._chunk(delta, None, completion)

    def _chunk(self, delta: str, token: int | None, completion: Completion | None = None) -> Chunk:
        chunk = Chunk(self.id, self._next_seq, delta, token, completion is not None, completion)
        self._next_seq += 1
        return chunk


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request without a row; `submitted_s` is the time of its submission, in seconds of `time.monotonic`."""

    request: Request
    submitted_s: float
    matcher_future: Future[Matcher] | None = None
    """The matcher of its constraint; None without a constraint."""
    prompt_future: Future[SessionState] | None = None
    """Its session's state with the prompt; None while an earlier request of its session is unfinished."""

    @property
    def is_constraint_ready(self) -> bool:
        """Whether it has no constraint, or its preparation has ended."""
        return self.matcher_future is None or self.matcher_future.done()

    @property
    def pending_futures(self) -> list[Future[Any]]:
        """Its futures that are not done yet."""
        return [each for each in (self.matcher_future, self.prompt_future) if each is not None and not each.done()]

    def end(self, reason: FinishReason, error: RequestError | None = None) -> Chunk:
        """Return the only chunk of a request that never ran."""
        waited_ms = 1e3 * (time.monotonic() - self.submitted_s)
        timing = Timing(queue_ms=waited_ms, ttft_ms=waited_ms, total_ms=waited_ms)
        completion = Completion(self.request.id, "", (), reason, timing=timing, error=error)
        return Chunk(self.request.id, 0, "", None, True, completion)
