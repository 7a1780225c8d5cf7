"""Constraints: compiles a JSON schema, regular expression, Lark grammar or list of choices to token masks.

The only importer of llguidance. Knows nothing of logits: a mask states which tokens keep the text a valid prefix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edgelm.errors import BundleError, RequestError
from edgelm.text.tokenizer_file import sanitize_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from edgelm.types import Constraint

JSON_DEFAULTS: Final[dict[str, Any]] = {"whitespace_pattern": r"[ \t\r\n]{1,32}"}
"""Small models can repeat whitespace forever, because JSON has no limit. A schema's `x-guidance` has priority."""

MAX_NUMBER: Final = 2**53
"""Largest exact JSON number (RFC 8259, section 6); the library is not exact above it either."""
MAX_SCHEMA_DEPTH: Final = 200
"""Nesting levels of a JSON schema."""

MAX_ERROR_LENGTH: Final = 300
"""Characters of the library's error that our error quotes: some errors repeat the whole constraint."""


class ConstraintCompiler:
    """Compiles constraints for one vocabulary.

    Parameters
    ----------
    tokenizer
        The bundle's tokenizer.json. Padding, truncation and added tokens outside the vocabulary are ignored.
    vocab_size
        Width V of the model's logits; at least the size of the tokenizer's vocabulary.
    eos_tokens
        Tokens that end a completion: allowed exactly where the constraint is satisfied.

    Raises
    ------
    BundleError
        If the tokenizer cannot be used with constraints, or is larger than `vocab_size`.
    """

    def __init__(self, tokenizer: str | Path, vocab_size: int, eos_tokens: Iterable[int]) -> None:
        import llguidance

        self._library: Any = llguidance
        self._vocab_size = vocab_size
        try:
            self._tokenizer: Any = llguidance.LLTokenizer(
                sanitize_tokenizer(Path(tokenizer).read_text(encoding="utf-8"), vocab_size),
                n_vocab=vocab_size,
                eos_token=list(eos_tokens) or None,
            )
        except (OSError, ValueError) as error:
            raise BundleError(f"{tokenizer}: cannot be used for constraints: {error}") from error

    def compile(self, constraint: Constraint) -> Matcher:
        """Return a matcher at the beginning of a completion; `Matcher.copy` gives more of them.

        A regular expression has the syntax of Rust's regex crate: no look-around, and digits are all Unicode digits.

        Raises
        ------
        RequestError
            With code "bad_request" if the constraint is not valid or uses an unsupported feature.
        """
        try:
            with convert_panics():
                source = self._source_of(constraint)
                compiled = self._library.LLMatcher(self._tokenizer, source, log_level=0)
        except (ValueError, RecursionError) as error:
            raise RequestError("bad_request", f"{constraint.kind} is not valid: {_in_one_line(error)}") from error
        if compiled.is_error():
            message = _in_one_line(compiled.get_error())
            raise RequestError("bad_request", f"{constraint.kind} is not valid: {message}")
        return Matcher(compiled, self._vocab_size)

    def _source_of(self, constraint: Constraint) -> str:
        """Return the constraint in llguidance's notation."""
        matcher, value = self._library.LLMatcher, constraint.value
        if constraint.kind == "choices":
            choices = " | ".join(json.dumps(choice) for choice in value)
            return str(matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}"))  # one terminal: no row limit
        if constraint.kind == "json_schema":
            _check_schema(json.loads(str(value)))
            return str(matcher.grammar_from_json_schema(value, defaults=JSON_DEFAULTS))
        if constraint.kind == "regex":
            return str(matcher.grammar_from_regex(value))
        return str(matcher.grammar_from_lark(value))


@contextmanager
def convert_panics() -> Iterator[None]:
    """Convert a panic of the library to `RequestError`: PyO3 raises a type that `except Exception` does not catch."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RequestError(
            "bad_request", f"the constraint causes a failure of llguidance: {_in_one_line(error)}"
        ) from error


def _check_schema(schema: object) -> None:
    """Raise `ValueError` if a number is too large or the nesting is too deep."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        deeper: list[object] = []
        for each in level:
            if isinstance(each, dict):
                deeper += each.values()
            elif isinstance(each, list):
                deeper += each
            elif isinstance(each, int | float) and not abs(each) <= MAX_NUMBER:
                raise ValueError(f"{each:.6g} is beyond 2^53, where numbers are not exact")
        level = deeper
        if not level:
            return
    raise ValueError(f"it has more than {MAX_SCHEMA_DEPTH} levels")


class Matcher:
    """Follows one completion token by token. Created by `ConstraintCompiler.compile`."""

    def __init__(self, inner: Any, vocab_size: int) -> None:
        self._inner = inner
        self._mask = np.zeros(-(-vocab_size // 32), dtype=np.uint32)

    def copy(self) -> Matcher:
        """Return an independent matcher in the same state."""
        return Matcher(self._inner.deep_copy(), 32 * len(self._mask))

    def mask(self) -> NDArray[np.uint32]:
        """Return the token mask of the next token: uint32 [ceil(V / 32)], bit i % 32 of word i // 32 for token i.

        The next call overwrites the array. Ids that the tokenizer does not have are never allowed. If no text can
        follow, only the end tokens are allowed.

        Raises
        ------
        RequestError
            With code "bad_request" if the constraint is too complex.
        """
        with convert_panics():
            self._inner.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            self._check()
        return self._mask

    def accept(self, token: int) -> None:
        """Advance by the sampled token.

        Raises
        ------
        RequestError
            With code "internal" if the mask does not allow the token; "bad_request" if the constraint is too complex.
        """
        with convert_panics():
            if self._inner.validate_tokens([token]) != 1:
                raise RequestError("internal", f"token {token} was sampled, but the constraint does not allow it")
            self._inner.consume_token(token)
            self._check()

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must come next; empty if there is a choice. They are not accepted yet."""
        with convert_panics():
            return [int(token) for token in self._inner.compute_ff_tokens()]

    @property
    def is_accepting(self) -> bool:
        """Whether the completion satisfies the constraint if it ends here."""
        return bool(self._inner.is_accepting())

    @property
    def is_finished(self) -> bool:
        """Whether the completion satisfies the constraint and no text can follow."""
        return bool(self._inner.is_stopped())

    def _check(self) -> None:
        if self._inner.is_error():
            message = _in_one_line(self._inner.get_error())
            raise RequestError("bad_request", f"the constraint cannot be followed further: {message}")


def _in_one_line(message: object) -> str:
    """Return llguidance's message without its state dump and its source markers, cut to `MAX_ERROR_LENGTH`."""
    lines = str(message).split("<state>")[0].splitlines()
    text = " ".join(line.strip() for line in lines if line.strip(" ^"))
    return text if len(text) <= MAX_ERROR_LENGTH else text[:MAX_ERROR_LENGTH] + "..."
