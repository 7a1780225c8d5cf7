"""Tokens to text, one token at a time: text that `StreamDecoder` returns never changes later.

Knows how byte-level and byte-fallback vocabularies split a character over tokens. Knows nothing of models; it needs
only a `TokenDecoder`. Stop strings are found by `stop_strings`.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from typing import TYPE_CHECKING, Final, Protocol

from edgelm.text.stop_strings import StopFilter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REPLACEMENT: Final = "\ufffd"
"""Character that decoders write for bytes that are not, or not yet, valid UTF-8."""
MAX_PENDING_TOKENS: Final = 16
"""Largest number of tokens decoded together, without the context."""
PROMPT_TAIL_TOKENS: Final = 8
"""Number of last prompt tokens used: they decide whether a space follows and which character is incomplete."""


class TokenDecoder(Protocol):
    """What `StreamDecoder` needs of a tokenizer."""

    @property
    def byte_tokens(self) -> Mapping[int, int]:
        """Bytes by token id, in a vocabulary with byte fallback; else empty."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens without special tokens."""


class StreamDecoder:
    """Turns the tokens of one completion into pieces of text.

    The joined pieces equal the decoded completion, cut before the first stop string. No piece ends inside a UTF-8
    character or contains part of a stop string: text that may become either is held back until it is decided. The
    cost per token is bounded. Every broken UTF-8 sequence becomes one U+FFFD.

    Parameters
    ----------
    tokenizer
        Decodes tokens.
    prompt_tail
        The last tokens of the prompt; the last 8 are used. The completion is decoded after them, because many
        decoders drop a space at the start of a text. Their own text is not returned, except a character that the
        completion completes.
    stop
        Texts that end the completion. The one that is complete first counts; of several, the longest.

    Attributes
    ----------
    text
        All pieces so far, joined.
    is_stopped
        Whether a stop string was found. Later tokens give no text.
    """

    def __init__(self, tokenizer: TokenDecoder, prompt_tail: Sequence[int] = (), stop: tuple[str, ...] = ()) -> None:
        self.text = ""
        self.is_stopped = False
        self._decode = tokenizer.decode
        self._byte_tokens = tokenizer.byte_tokens
        self._utf8 = getincrementaldecoder("utf-8")("replace")
        self._has_prompt_bytes = False
        self._stop = StopFilter(stop)
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
        self._given = 0  # characters of the pending tokens' text that were already returned
        tail = list(prompt_tail[-PROMPT_TAIL_TOKENS:])
        self._set_context(tail)
        for token in tail:
            self._text_of(token)
        self._set_context(tail)
        self._has_prompt_bytes = bool(self._utf8.getstate()[0])  # bytes of an incomplete character

    def push(self, token: int) -> str:
        """Add the next token; return the text that is final now, often empty."""
        return "" if self.is_stopped else self._emit(self._text_of(token))

    def finish(self) -> str:
        """End the completion; return the text that was held back."""
        piece = self._emit(self._fresh_text()[self._given :] + self._end_bytes())
        held = self._stop.flush()
        self._set_context([])
        self.text += held
        return piece + held

    def _emit(self, text: str) -> str:
        piece = self._stop.push(text)
        self.is_stopped = self._stop.matched
        self.text += piece
        return piece

    def _text_of(self, token: int) -> str:
        """Return the text that is final after this token."""
        byte = self._byte_tokens.get(token)
        if byte is None:
            text = self._text_in_context(token)
            return self._end_bytes() + text if text else ""  # a special token has no text and ends no character
        # Bytes are decoded here: the library replaces a whole run of bytes that is not yet valid by U+FFFD.
        text = self._utf8.decode(bytes((byte,)))
        if not self._decode([*self._context, token]):
            text = ""  # a space that the decoder drops at the start of a text
        self._has_prompt_bytes &= not text
        self._set_context([token])
        return text

    def _end_bytes(self) -> str:
        """Return U+FFFD for a character that stays incomplete; nothing if the prompt contains its first bytes."""
        broken = self._utf8.decode(b"", final=True)
        began, self._has_prompt_bytes = self._has_prompt_bytes, False
        return "" if began else broken

    def _text_in_context(self, token: int) -> str:
        self._pending.append(token)
        fresh = self._fresh_text()
        held = 1 if fresh.endswith(REPLACEMENT) and not self._byte_tokens else 0
        final = fresh[: len(fresh) - held]
        piece = final[self._given :]
        self._given = max(self._given, len(final))
        if fresh and not held:
            self._set_context(self._pending)
        elif len(self._pending) >= MAX_PENDING_TOKENS:
            self._slide(fresh, held)
        return piece

    def _fresh_text(self) -> str:
        """Return the text that the pending tokens add to the context's text."""
        text = self._decode(self._context + self._pending)
        for known in (self._context_text, self._context_text.removesuffix(REPLACEMENT)):
            if text.startswith(known):  # the second: the completion completes a character of the prompt
                return text[len(known) :]
        return self._decode(self._pending)  # the decoder changes earlier text: context is useless

    def _set_context(self, tokens: list[int]) -> None:
        self._context = tokens
        self._context_text = self._decode(tokens)
        self._pending = []
        self._given = 0

    def _slide(self, fresh: str, held: int) -> None:
        """Drop the oldest pending tokens; the last `held` characters of their text are not returned yet."""
        pending = self._pending[-MAX_PENDING_TOKENS // 2 :]
        if not fresh:  # only special tokens: the context before them still decides on a space
            self._pending = pending
            return
        self._set_context([])
        self._pending = pending
        self._given = max(0, len(self._decode(pending)) - held)
