"""Prepares requests: text to tokens, a constraint to its matcher, everything checked against the model.

Work that can take longer than a decode step runs on background threads: a long prompt (64 KB take up to 0.1 s), a
constraint, loading the sampler's kernels. Short prompts are tokenized at once.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from edgelm.bundle.bundle_folder import Bundle
from edgelm.engine.background import BackgroundThread, resolve_future
from edgelm.engine.constraint_cache import ConstraintCache
from edgelm.engine.fairness import NO_CLIENT_LIMITS, ClientLimits
from edgelm.engine.sequence import Sequence
from edgelm.engine.sessions import Sessions, SessionState
from edgelm.errors import RequestError
from edgelm.sampling import are_kernels_loaded, load_kernels, needs_kernels
from edgelm.text.tokenizer import SHORT_TEXT_LENGTH, Tokenizer
from edgelm.types import Request

if TYPE_CHECKING:
    from edgelm.text.constraint_compiler import Matcher


class Admission:
    """Prepares requests for a bundle whose rows have `context` tokens."""

    def __init__(self, bundle: Bundle, context: int, client_limits: ClientLimits = NO_CLIENT_LIMITS) -> None:
        manifest = bundle.manifest
        self._bundle = bundle
        self._context = context
        self._eos = frozenset(manifest.eos_tokens)
        self._constraints = ConstraintCache(bundle.tokenizer, manifest.vocab_size, manifest.eos_tokens)
        self.tokenizer = Tokenizer.of_bundle(bundle)
        self.sessions = Sessions(self.tokenizer, context, client_limits=client_limits)
        self._background = BackgroundThread("edgelm-prompts")

    def prepare_constraint(self, request: Request) -> Future[Matcher] | None:
        """Start preparing a request's constraint on another thread; return None if it has no constraint."""
        return None if request.constraint is None else self._constraints.prepare(request.constraint, request.owner)

    def close(self) -> None:
        """Stop the background threads."""
        self._constraints.close()
        self._background.close()

    def prepare_prompt(self, request: Request, before: SessionState) -> Future[SessionState]:
        """Return a future of the session's state with the request's prompt appended; a short prompt is done at once.

        `before` is the result of `Sessions.begin_request`. The future may raise `RequestError`.
        """
        needs_loading = needs_kernels(request.sampling) and not are_kernels_loaded()

        def work() -> SessionState:
            try:
                if needs_loading:
                    load_kernels()
                return self.sessions.append_prompt(before, request)
            except RequestError:
                raise
            except BaseException as error:  # a Rust panic is not an Exception; it fails only this request
                raise RequestError("internal", f"the prompt failed: {type(error).__name__}: {error}") from error

        if needs_loading or not self._is_short(request, before):
            return self._background.run(work)
        future: Future[SessionState] = Future()
        resolve_future(work, future)
        return future

    def _is_short(self, request: Request, before: SessionState) -> bool:
        """Return whether the prompt, its session and its other input are short enough to tokenize at once."""
        if request.messages is None and not request.is_templated:
            new_text = request.prompt or ""
        else:
            new_text = repr((request.prompt, request.messages, request.system, request.tools, request.template_vars))
        if len(before.text) + len(new_text) > SHORT_TEXT_LENGTH:
            return False
        return not self.tokenizer.needs_preparation_for(new_text)

    def create_sequence(
        self, request: Request, submitted_s: float, state: SessionState, matcher_future: Future[Matcher] | None
    ) -> Sequence:
        """Return a request's sequence. Raises `RequestError` for a prompt or a constraint that cannot be used.

        `state` is the result of `prepare_prompt`; `matcher_future`, from `prepare_constraint`, is awaited.
        """
        return Sequence(
            request,
            self.check_tokens(self.sessions.record_prompt(request, state)),
            tokenizer=self.tokenizer,
            vocab_size=self._bundle.manifest.vocab_size,
            context=self._context,
            eos_tokens=self._eos,
            matcher=None if matcher_future is None else matcher_future.result().copy(),
            submitted_s=submitted_s,
        )

    def check_tokens(self, tokens: list[int]) -> list[int]:
        """Return the tokens unchanged. Raises `RequestError` if one lies outside the model's vocabulary."""
        vocab_size = self._bundle.manifest.vocab_size  # the tokenizer's may be larger
        invalid = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if invalid is not None:
            raise RequestError("bad_request", f"token {invalid} lies outside the vocabulary [0, {vocab_size})")
        return tokens
