"""Requests made ready to run: text to tokens, a constraint to its matcher, everything checked against the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.bundle import Bundle
from edgelm.constraints import Constraints
from edgelm.conversations import Conversations
from edgelm.errors import RequestError
from edgelm.messages import Request
from edgelm.sequence import Sequence
from edgelm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from concurrent.futures import Future

    from edgelm.grammar import Matcher


class Intake:
    """Opens requests for a bundle whose rows hold `context` tokens."""

    def __init__(self, bundle: Bundle, context: int) -> None:
        manifest = bundle.manifest
        self._bundle = bundle
        self._context = context
        self._eos = frozenset(manifest.eos_tokens)
        self._constraints = Constraints(bundle.tokenizer, manifest.vocab_size, manifest.eos_tokens)
        self.tokenizer = Tokenizer.of_bundle(bundle)
        self.conversations = Conversations(self.tokenizer, context)

    def prepare(self, request: Request) -> Future[Matcher] | None:
        """Have a request's constraint made ready on another thread; None where it has none."""
        return None if request.constraint is None else self._constraints.prepare(request.constraint)

    def close(self) -> None:
        """Stop preparing."""
        self._constraints.close()

    def open(self, request: Request, submitted: float, prepared: Future[Matcher] | None = None) -> Sequence:
        """Return a request's sequence. Raises `RequestError` for a prompt or a constraint that cannot be used.

        `prepared` is what `prepare` returned; what is not ready yet is waited for.
        """
        prepared = prepared or self.prepare(request)
        return Sequence(
            request,
            self.checked(self.conversations.prompt(request)),
            tokenizer=self.tokenizer,
            vocab_size=self._bundle.manifest.vocab_size,
            context=self._context,
            eos_tokens=self._eos,
            matcher=None if prepared is None else prepared.result().copy(),
            submitted=submitted,
        )

    def checked(self, tokens: list[int]) -> list[int]:
        """Return the tokens. Raises `RequestError` for one that the model does not have."""
        vocab_size = self._bundle.manifest.vocab_size  # a tokenizer may have added tokens that the model lacks
        bad = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise RequestError("bad_request", f"token {bad} lies outside the vocabulary [0, {vocab_size})")
        return tokens
