"""How many bytes of text one token can stand for: what a text that is too long is refused by before it is encoded.

Known for the tokenizers of nearly all models: BPE over bytes, or with bytes to fall back on. Where a step could drop
text (one that strips or collapses white space, an unknown token for a whole word), nothing is said. Takes the
tokenizers library's objects, and does not import it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

NFC_SHRINKS: Final = 4
"""NFC takes at most this many bytes to one (a Hangul syllable of three letters, the Kelvin sign: three)."""
KEEPING_NORMALIZERS: Final = frozenset({"Sequence", "Prepend", "Replace", "NFC", "ByteLevel"})
KEEPING_SPLITTERS: Final = frozenset({"Sequence", "ByteLevel", "Digits", "Split", "Metaspace"})


@dataclass(frozen=True, slots=True)
class TokenSizeBound:
    """What is known of a tokenizer: the most bytes of text that one token stands for, and bytes that have no token."""

    max_bytes: int
    dropped: bytes = b""

    def min_tokens(self, text: str) -> int:
        """Return a number of tokens that the text has at least."""
        return -(-len(text.encode("utf-8", "replace").translate(None, self.dropped)) // self.max_bytes)


def measure_token_size(inner: Any) -> TokenSizeBound | None:
    """Return what is known of a `tokenizers.Tokenizer`; None where a text may have any number of tokens."""
    model = inner.model
    normalizers, splitters = _parts(inner.normalizer), _parts(inner.pre_tokenizer)
    if type(model).__name__ != "BPE" or not all(map(_keeps_text, normalizers)):
        return None
    if not all(part["type"] in KEEPING_SPLITTERS and part.get("behavior") != "Removed" for part in splitters):
        return None
    added = inner.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):  # it swallows any number of spaces
        return None
    dropped = b""
    vocab = inner.get_vocab(with_added_tokens=False)
    if any(part["type"] == "ByteLevel" for part in (*normalizers, *splitters)):
        dropped = bytes(sorted(byte for letter, byte in UNICODE_TO_BYTE.items() if letter not in vocab))
        longest = max(map(len, vocab))  # a letter is a byte
    elif model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        longest = max(len(piece.encode("utf-8", "replace")) for piece in vocab)
    else:
        return None
    if model.unk_token is not None and dropped:
        return None
    longest = max([longest, *(len(token.content.encode("utf-8", "replace")) for token in added)])
    if any(part["type"] == "NFC" for part in normalizers):
        return None if dropped else TokenSizeBound(longest * NFC_SHRINKS)
    return TokenSizeBound(longest, dropped)


def _keeps_text(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer makes no text shorter, but for NFC."""
    if normalizer["type"] != "Replace":
        return normalizer["type"] in KEEPING_NORMALIZERS
    pattern = normalizer["pattern"].get("String")  # a regular expression may match anything
    return pattern is not None and len(pattern.encode()) <= len(normalizer["content"].encode())


def _parts(step: Any) -> list[dict[str, Any]]:
    """Return what a step of the tokenizer consists of, as in tokenizer.json."""
    if step is None:
        return []
    found: list[dict[str, Any]] = []
    left = [json.loads(step.__getstate__())]
    while left:
        part = left.pop()
        found.append(part)
        left += part.get("normalizers") or part.get("pretokenizers") or []
    return found


def _byte_letters() -> dict[str, int]:
    """Return the letters that stand for bytes in byte-level vocabularies, as GPT-2 chose them, and these bytes."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


UNICODE_TO_BYTE: Final = _byte_letters()
