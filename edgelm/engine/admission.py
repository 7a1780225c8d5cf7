"""Requests made ready to run: text to tokens, a constraint to its matcher, everything checked against the model.

What can take longer than a token is done on threads beside the engine's: a long prompt (64 KB take up to 0.1 s), a
constraint, the sampler's kernels. Short prompts are read at once.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from edgelm.bundle.bundle_folder import Bundle
from edgelm.engine.background import BackgroundThread, resolve_future
from edgelm.engine.constraints import ConstraintCache
from edgelm.engine.fairness import NO_CLIENT_LIMITS, ClientLimits
from edgelm.engine.sequence import Sequence
from edgelm.engine.sessions import Sessions, SessionState
from edgelm.errors import RequestError
from edgelm.sampling import are_kernels_loaded, load_kernels, needs_kernels
from edgelm.text.tokenizer import SHORT_TEXT_LENGTH, Tokenizer
from edgelm.types import Request

if TYPE_CHECKING:
    from edgelm.text.grammar import Matcher


class Admission:
    """Opens requests for a bundle whose rows hold `context` tokens."""

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
        """Have a request's constraint made ready on another thread; None where it has none."""
        return None if request.constraint is None else self._constraints.prepare(request.constraint, request.owner)

    def close(self) -> None:
        """Stop preparing."""
        self._constraints.close()
        self._background.close()

    def prepare_prompt(self, request: Request, before: SessionState) -> Future[SessionState]:
        """Return what will have a conversation with a request's prompt behind it; done already where that is quick.

        `before` is what `Sessions.begin` returned. The future may hold a `RequestError`.
        """
        needs_loading = needs_kernels(request.sampling) and not are_kernels_loaded()

        def work() -> SessionState:
            try:
                if needs_loading:
                    load_kernels()
                return self.sessions.append_prompt(before, request)
            except RequestError:
                raise
            except BaseException as error:  # a library's panic is no Exception, and concerns this request alone
                raise RequestError("internal", f"the prompt failed: {type(error).__name__}: {error}") from error

        if needs_loading or not self._is_quick(request, before):
            return self._background.run(work)
        future: Future[SessionState] = Future()
        resolve_future(work, future)
        return future

    def _is_quick(self, request: Request, before: SessionState) -> bool:
        """Whether a prompt, its session and what goes with it are short."""
        if request.messages is None and not request.is_templated:
            rest = request.prompt or ""
        else:
            rest = repr((request.prompt, request.messages, request.system, request.tools, request.template_vars))
        return len(before.text) + len(rest) <= SHORT_TEXT_LENGTH and not self.tokenizer.needs_preparation_for(rest)

    def create_sequence(
        self, request: Request, submitted_s: float, asked: SessionState, matcher_future: Future[Matcher] | None
    ) -> Sequence:
        """Return a request's sequence. Raises `RequestError` for a prompt or a constraint that cannot be used.

        `asked` is what `read` gave, `matcher_future` what `prepare` returned; what is not ready yet is waited for.
        """
        return Sequence(
            request,
            self.checked(self.sessions.record_prompt(request, asked)),
            tokenizer=self.tokenizer,
            vocab_size=self._bundle.manifest.vocab_size,
            context=self._context,
            eos_tokens=self._eos,
            matcher=None if matcher_future is None else matcher_future.result().copy(),
            submitted_s=submitted_s,
        )

    def checked(self, tokens: list[int]) -> list[int]:
        """Return the tokens. Raises `RequestError` for one that the model does not have."""
        vocab_size = self._bundle.manifest.vocab_size  # a tokenizer may have added tokens that the model lacks
        bad = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise RequestError("bad_request", f"token {bad} lies outside the vocabulary [0, {vocab_size})")
        return tokens
