"""The text of a tokenizer.json with nothing in it that a bundle's model could not follow.

Files are published as they were last used: with padding or truncation on, or with an added token that the model has no
row for. A stranger's file may hold more: numbers for which libraries allocate as much memory, replacements that make
a long text of a short one. Knows the format, and loads no library.
"""

from __future__ import annotations

import base64
import itertools
import json
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

LENGTHS: Final = re.compile(r'"(?:padding|truncation)"\s*:\s*\{')
IDS: Final = re.compile(r'"id"\s*:\s*(\d+)')
LARGE: Final = re.compile(rb"[:\[,]\s*[0-9]{8,}")
"""A number that may be a token's id, and too large for one."""
ESCAPED: Final = re.compile(rb"\\u00[2-7]")
"""A letter that nobody needs to escape: it would hide a name."""
CHARSMAP: Final = "precompiled_charsmap"
"""A table of SentencePiece's for a normalizer, in base64: the size of its first part, that part, and the rest."""
MAX_TOKEN_ID: Final = 9_999_999
"""Libraries allocate as much memory as the largest id says, and end the process where that fails."""
MAX_ADDED_TOKENS: Final = 64
"""Tokens that a tokenizer puts around every text."""
MAX_GROWTH: Final = 64
"""How many times longer a text may become by what is replaced in it."""


def check_numbers(file: Path) -> None:
    """Raise `ValueError` for a tokenizer.json with an id or a size that is too large, `OSError` for what is no file.

    Only what looks suspicious is parsed: a file of 9 MB takes 0.1 s.
    """
    with file.open("rb") as stream:
        if not file.stat().st_size:
            return
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if not _is_suspicious(content):
                return
    _check_leaves(file.read_text("utf-8"))


def check_numbers_of_text(text: str) -> None:
    """Raise `ValueError` for the text of a tokenizer.json with an id or a size that is too large."""
    if _is_suspicious(text.encode("utf-8", "replace")):
        _check_leaves(text)


def _is_suspicious(content: bytes | mmap.mmap) -> bool:
    numbers, names = LARGE.search(content), ESCAPED.search(content)
    return numbers is not None or names is not None or content.find(CHARSMAP.encode()) >= 0


def _check_leaves(text: str) -> None:
    try:
        whole = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    for name, value in _leaves(whole):
        if isinstance(value, int) and value > MAX_TOKEN_ID:
            raise ValueError(f"it has a token with an id above {MAX_TOKEN_ID}")
        if name == CHARSMAP and isinstance(value, str):
            _check_charsmap(value)


def _check_charsmap(encoded: str) -> None:
    content = base64.b64decode(encoded)
    (size,) = struct.unpack_from("<I", content) if len(content) >= 4 else (0,)
    if size > len(content) - 4:
        raise ValueError(f"its {CHARSMAP} says {size} bytes and has {len(content)}")


def check_replacements(normalizer: bytes | None, decoder: bytes | None) -> None:
    """Raise `ValueError` where parts of a tokenizer.json, as JSON, make texts more than `MAX_GROWTH` times longer."""
    for part in (normalizer, decoder):
        if part is not None and b"Replace" in part and _growth(json.loads(part)) > MAX_GROWTH:
            raise ValueError(f"it makes texts more than {MAX_GROWTH} times longer")


def find_regexes(*parts: bytes | None) -> list[str]:
    """Return the regular expressions in parts of a tokenizer.json."""
    found = [json.loads(part) for part in parts if part is not None and b'"Regex"' in part]
    return [str(value) for name, value in itertools.chain(*map(_leaves, found)) if name == "Regex"]


def _growth(part: Any) -> float:
    """Return how many times longer all replacements in a part may make a text, one after the other."""
    factor, waiting = 1.0, [part]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        elif isinstance(each, dict):
            waiting += each.values()
            if each.get("type") == "Replace":
                pattern = each.get("pattern")
                length = len(str(pattern["String"])) if isinstance(pattern, dict) and "String" in pattern else 1
                factor *= max(1.0, len(str(each.get("content", "")).encode("utf-8", "replace")) / max(1, length))
    return factor


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every value that is no list or object, with its name."""
    waiting = [(None, value)]
    while waiting:
        name, each = waiting.pop()
        if isinstance(each, dict):
            waiting += each.items()
        elif isinstance(each, list):
            waiting += [(name, entry) for entry in each]
        else:
            yield name, each


def sanitize_tokenizer(text: str, vocab_size: int) -> str:
    """Return a tokenizer.json without padding, truncation and added tokens that are no id of [0, vocab_size).

    Such a token is an ordinary text then. The same text comes back where there is nothing to change, and where it is
    not a tokenizer.json: who reads it says so.
    """
    if LENGTHS.search(text) is None and all(int(found[1]) < vocab_size for found in IDS.finditer(text)):
        return text
    try:
        content = json.loads(text)
        added = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    except (ValueError, RecursionError, LookupError, TypeError):
        return text
    return json.dumps({**content, "truncation": None, "padding": None, "added_tokens": added}, ensure_ascii=False)
