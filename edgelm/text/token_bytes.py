"""An upper bound on the bytes of text per token: it allows refusing a text that is too long before encoding it.

Known for nearly all models' tokenizers: byte-level BPE, or BPE with byte fallback. Unknown if a step could drop text
(stripped or collapsed white space, an unknown token for a whole word). Uses objects of the tokenizers library without
importing it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

NFC_SHRINKS: Final = 4
"""NFC replaces at most this many bytes by one (three for a Hangul syllable of three letters and the Kelvin sign)."""
LOSSLESS_NORMALIZERS: Final = frozenset({"Sequence", "Prepend", "Replace", "NFC", "ByteLevel"})
LOSSLESS_SPLITTERS: Final = frozenset({"Sequence", "ByteLevel", "Digits", "Split", "Metaspace"})


@dataclass(frozen=True, slots=True)
class TokenSizeBound:
    """Largest number of text bytes that one token stands for; `dropped` are the bytes without a token."""

    max_bytes: int
    dropped: bytes = b""

    def min_tokens(self, text: str) -> int:
        """Return a lower bound on the number of tokens of a text."""
        return -(-len(text.encode("utf-8", "replace").translate(None, self.dropped)) // self.max_bytes)


def measure_token_size(inner: Any) -> TokenSizeBound | None:
    """Return the bound for a `tokenizers.Tokenizer`; None if there is none."""
    model = inner.model
    normalizers, splitters = _parts(inner.normalizer), _parts(inner.pre_tokenizer)
    if type(model).__name__ != "BPE" or not all(map(_keeps_text, normalizers)):
        return None
    if not all(part["type"] in LOSSLESS_SPLITTERS and part.get("behavior") != "Removed" for part in splitters):
        return None
    added = inner.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):  # such a token removes any number of spaces
        return None
    dropped = b""
    vocab = inner.get_vocab(with_added_tokens=False)
    if any(part["type"] == "ByteLevel" for part in (*normalizers, *splitters)):
        dropped = bytes(sorted(byte for letter, byte in UNICODE_TO_BYTE.items() if letter not in vocab))
        longest = max(map(len, vocab))  # one letter stands for one byte
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
    """Whether a normalizer, except NFC, never makes a text shorter."""
    if normalizer["type"] != "Replace":
        return normalizer["type"] in LOSSLESS_NORMALIZERS
    pattern = normalizer["pattern"].get("String")  # a regular expression may match anything
    return pattern is not None and len(pattern.encode()) <= len(normalizer["content"].encode())


def _parts(step: Any) -> list[dict[str, Any]]:
    """Return the parts of a tokenizer step as in tokenizer.json."""
    if step is None:
        return []
    found: list[dict[str, Any]] = []
    waiting = [json.loads(step.__getstate__())]
    while waiting:
        part = waiting.pop()
        found.append(part)
        waiting += part.get("normalizers") or part.get("pretokenizers") or []
    return found


def _build_unicode_to_byte() -> dict[str, int]:
    """Return GPT-2's mapping of letters to bytes, which all byte-level vocabularies use."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


UNICODE_TO_BYTE: Final = _build_unicode_to_byte()
