"""One request on its way through the engine: its tokens, sampler, constraint, text so far, and clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.repetition import LoopDetector
from edgelm.engine.speculation import DraftState
from edgelm.errors import RequestError
from edgelm.sampling import Sampler
from edgelm.text.tokenizer import StreamDecoder, Tokenizer
from edgelm.types import Chunk, Completion, FinishReason, Request, Timing, TokenLogprob, Usage

if TYPE_CHECKING:
    from concurrent.futures import Future

    from edgelm.engine.sessions import SessionState
    from edgelm.text.grammar import Matcher

PROMPT_TAIL = 8
"""Prompt tokens that the detokenizer sees before the answer, so that word spacing comes out right."""


class Sequence:
    """A request with its prompt in tokens. `row` is its place in key/value memory while it runs."""

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
            raise RequestError("bad_request", "the prompt is empty: it has no tokens, and the model no start token")
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
        """Positions already in key/value memory."""
        self.cached = 0
        """Positions of the prompt that an earlier sequence had computed."""
        self.is_long_rope = False
        """Whether what is in memory was embedded for LongRoPE's long context."""
        self.draft_state = DraftState()
        self._limit = min(params.max_tokens, context - len(prompt))
        self.history: NDArray[np.int32] = np.zeros(len(prompt) + self._limit, np.int32)
        self.history[: len(prompt)] = prompt
        self.length = len(prompt)
        self._eos = frozenset() if params.ignore_eos else eos_tokens
        self._matcher = matcher
        guarded = params.repetition_guard and matcher is None and not params.ignore_eos
        self._loops = LoopDetector() if guarded else None
        self._sampler = Sampler(params, vocab_size)
        self._decoder = StreamDecoder(tokenizer, prompt[-PROMPT_TAIL:], params.stop)
        self._logprobs: list[TokenLogprob] = []
        self._submitted = submitted_s
        self._started = time.monotonic()
        self._first: float | None = None
        self._seq = 0
        self._forced = 0

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def pending(self) -> NDArray[np.int64]:
        """The newest tokens, int64 [n], not yet in key/value memory; at least one while it runs."""
        return self.history[self.computed_tokens : self.length].astype(np.int64)

    @property
    def remaining_tokens(self) -> int:
        """Tokens that the answer may still have."""
        return self._limit - (self.length - self.prompt_tokens)

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens sampled so far, without an end token."""
        return tuple(int(token) for token in self.history[self.prompt_tokens : self.length])

    @property
    def is_seeded(self) -> bool:
        """Whether its answer is to depend on nothing that was asked before, not even by rounding."""
        return self.request.sampling.seed is not None

    def is_prefilled(self) -> bool:
        """Whether the whole prompt, and what must follow it, is in key/value memory."""
        return self.computed_tokens >= self.length

    def start(self) -> list[Chunk]:
        """Take the tokens that the answer must begin with; return what the client sees of them."""
        return self._take_forced()

    def advance(self, logits: NDArray[np.float32]) -> list[Chunk]:
        """Sample the next token from float32 [V], changed in place; return what the client sees of it.

        The last chunk is `done`. Raises `RequestError("internal")` when the logits are not numbers.
        """
        params = self.request.sampling
        raw = logits.copy() if params.logprobs else None
        mask = self._matcher.mask() if self._matcher is not None else None
        token = self._sampler.sample(logits, mask, self.history[: self.length])
        if token in self._eos:
            self._saw_first()
            return [self.finish("stop")]
        if raw is not None:
            self._logprobs.append(self._sampler.logprobs(raw, token))
        chunks = self._take(token)
        return chunks if chunks[-1].done else [*chunks, *self._take_forced()]

    def _saw_first(self) -> None:
        if self._first is None:
            self._first = time.monotonic()

    def _take(self, token: int, *, forced: bool = False) -> list[Chunk]:
        """Put a token behind the others; return what the client sees of it."""
        if self._matcher is not None:
            self._matcher.accept(token)
        self._forced += forced
        self._saw_first()
        self.history[self.length] = token
        self.length += 1
        chunks = [self._chunk(self._decoder.push(token), token)]
        if self._decoder.is_stopped or (self._matcher is not None and self._matcher.is_finished):
            chunks.append(self.finish("stop"))
        elif self.remaining_tokens == 0:
            chunks.append(self.finish("length"))
        elif self._loops is not None and self._loops.detect(self.history[self.prompt_tokens : self.length]):
            chunks.append(self.finish("repetition"))
        return chunks

    def _take_forced(self) -> list[Chunk]:
        """Take the tokens that the constraint leaves no choice about: they need no logits."""
        chunks: list[Chunk] = []
        if self._matcher is None or self.request.sampling.logprobs:
            return chunks
        try:
            for token in self._matcher.forced_tokens():
                chunks += self._take(token, forced=True)
                if chunks[-1].done:
                    break
        except RequestError as error:
            chunks.append(self.fail(error))
        return chunks

    def fail(self, error: RequestError) -> Chunk:
        """Return the last chunk of a request that could not be answered to its end, whatever state it is in."""
        try:
            return self.finish("error", error)
        except Exception:  # noqa: BLE001  the failure may lie in the text itself
            done = Completion(self.id, self._decoder.text, self.answer, "error", error=error)
            return self._chunk("", None, done)

    def finish(self, reason: FinishReason, error: RequestError | None = None) -> Chunk:
        """Return the last chunk, with the whole answer."""
        delta = self._decoder.finish()
        now = time.monotonic()
        first = self._first if self._first is not None else now
        count = self.length - self.prompt_tokens
        completion = Completion(
            id=self.id,
            text=self._decoder.text,
            tokens=self.answer,
            finish_reason=reason,
            usage=Usage(self.prompt_tokens, self.cached, count, self._forced),
            timing=Timing(
                queue_ms=1e3 * (self._started - self._submitted),
                ttft_ms=1e3 * (first - self._submitted),
                total_ms=1e3 * (now - self._submitted),
                tok_s=(count - 1) / (now - first) if count > 1 and now > first else 0.0,
            ),
            logprobs=tuple(self._logprobs) if self.request.sampling.logprobs else None,
            error=error,
        )
        return self._chunk(delta, None, completion)

    def _chunk(self, delta: str, token: int | None, completion: Completion | None = None) -> Chunk:
        chunk = Chunk(self.id, self._seq, delta, token, completion is not None, completion)
        self._seq += 1
        return chunk


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request that has no row, and when it came, in seconds of `time.monotonic`."""

    request: Request
    submitted_s: float
    matcher_future: Future[Matcher] | None = None
    """Its constraint, which is being made ready."""
    prompt_future: Future[SessionState] | None = None
    """Its prompt, which is being read, once nothing of its session is before it."""

    @property
    def is_constraint_ready(self) -> bool:
        """Whether it has no constraint, or one that is ready or was refused."""
        return self.matcher_future is None or self.matcher_future.done()

    @property
    def missing(self) -> list[Future[Any]]:
        """What it waits for that others are doing."""
        return [each for each in (self.matcher_future, self.prompt_future) if each is not None and not each.done()]

    def end(self, reason: FinishReason, error: RequestError | None = None) -> Chunk:
        """Return the only chunk of a request that never ran."""
        waited = 1e3 * (time.monotonic() - self.submitted_s)
        timing = Timing(queue_ms=waited, ttft_ms=waited, total_ms=waited)
        completion = Completion(self.request.id, "", (), reason, timing=timing, error=error)
        return Chunk(self.request.id, 0, "", None, True, completion)
