"""Tokens to text, one at a time: `StreamDecoder` gives out text that never has to be taken back.

Knows how byte-level and byte-fallback vocabularies spread a character over tokens, and what a stop string is.
Knows nothing of models: it needs only something that decodes.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REPLACEMENT: Final = "\ufffd"
"""What decoders put in place of bytes that are not, or not yet, UTF-8."""
MAX_PENDING_TOKENS: Final = 16
"""Tokens decoded together at most, besides the context."""
PROMPT_TAIL_TOKENS: Final = 8
"""Tokens of the prompt looked at: they tell whether a space is due, and which character is half done."""


class TokenDecoder(Protocol):
    """What `StreamDecoder` needs of a tokenizer."""

    @property
    def byte_tokens(self) -> Mapping[int, int]:
        """Tokens that stand for one byte each, in a vocabulary with byte fallback."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones left out."""


class StreamDecoder:
    """Turns the tokens of one answer into pieces of text.

    Pieces joined equal the decoded answer, cut before the first stop string. No piece ends inside a UTF-8
    character or holds part of a stop string: what may become either is held back until it is clear. The cost
    of a token is bounded, whatever came before it. Every broken UTF-8 sequence becomes one U+FFFD.

    Parameters
    ----------
    tokenizer
        Decodes tokens.
    prompt_tail
        The last tokens of the prompt; the last 8 are looked at. The answer is decoded right after them, since
        many decoders drop a space at the start of a text. Their own text is not given out, except a character
        that the answer completes.
    stop
        Texts that end the answer. The one that is complete first counts, the longest where several are.

    Attributes
    ----------
    text
        All pieces so far, joined.
    stopped
        Whether a stop string was met. Later tokens give no text.
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
        self._given = 0  # characters of the pending tokens' text that were returned already
        tail = list(prompt_tail[-PROMPT_TAIL_TOKENS:])
        self._set_context(tail)
        for token in tail:
            self._text_of(token)
        self._set_context(tail)
        self._has_prompt_bytes = bool(self._utf8.getstate()[0])  # bytes of a character, waiting for the rest

    def push(self, token: int) -> str:
        """Take the next token; return the text that is certain now, often empty."""
        return "" if self.is_stopped else self._emit(self._text_of(token))

    def finish(self) -> str:
        """End the answer; return what was held back."""
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
        """Return the text that this token makes certain."""
        byte = self._byte_tokens.get(token)
        if byte is None:
            text = self._text_in_context(token)
            return self._end_bytes() + text if text else ""  # a special token has none and ends nothing
        # Bytes are decoded here: the library turns the whole of a run that is not yet valid into U+FFFD.
        text = self._utf8.decode(bytes((byte,)))
        if not self._decode([*self._context, token]):
            text = ""  # a space that the decoder drops at the start of a text
        self._has_prompt_bytes &= not text
        self._set_context([token])
        return text

    def _end_bytes(self) -> str:
        """Return what becomes of a character that stays half done; nothing where the prompt began it."""
        broken = self._utf8.decode(b"", final=True)
        began, self._has_prompt_bytes = self._has_prompt_bytes, False
        return "" if began else broken

    def _text_in_context(self, token: int) -> str:
        self._pending.append(token)
        fresh = self._fresh_text()
        held = 1 if fresh.endswith(REPLACEMENT) and not self._byte_tokens else 0
        sure = fresh[: len(fresh) - held]
        piece = sure[self._given :]
        self._given = max(self._given, len(sure))
        if fresh and not held:
            self._set_context(self._pending)
        elif len(self._pending) >= MAX_PENDING_TOKENS:
            self._slide(fresh, held)
        return piece

    def _fresh_text(self) -> str:
        """Return the text that the pending tokens add to that of the context."""
        text = self._decode(self._context + self._pending)
        for known in (self._context_text, self._context_text.removesuffix(REPLACEMENT)):
            if text.startswith(known):  # the second: the answer completes a character that the prompt began
                return text[len(known) :]
        return self._decode(self._pending)  # a decoder that rewrites what came before: no context helps

    def _set_context(self, tokens: list[int]) -> None:
        self._context = tokens
        self._context_text = self._decode(tokens)
        self._pending = []
        self._given = 0

    def _slide(self, fresh: str, held: int) -> None:
        """Forget the oldest pending tokens; the last `held` characters of their text are not returned yet."""
        pending = self._pending[-MAX_PENDING_TOKENS // 2 :]
        if not fresh:  # special tokens, which have no text: what came before them still decides on a space
            self._pending = pending
            return
        self._set_context([])
        self._pending = pending
        self._given = max(0, len(self._decode(pending)) - held)


class StopFilter:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    Parameters
    ----------
    stop
        Non-empty strings.

    Attributes
    ----------
    matched
        Whether a stop string was met; nothing passes afterwards.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.matched = False
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text; return what can be given out."""
        if self.matched:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.matched = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = self._count_held(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _count_held(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        for count in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-count:]
            if any(stop.startswith(end) for stop in self._stop):
                return count
        return 0
