"""Checks and cleans the text of a tokenizer.json.

Published files often have padding or truncation enabled, or an added token without a row in the model. An untrusted
file may also have numbers for which libraries allocate as much memory, or replacements that make texts much longer.
Knows the file format; loads no library.
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

PADDING_OR_TRUNCATION: Final = re.compile(r'"(?:padding|truncation)"\s*:\s*\{')
IDS: Final = re.compile(r'"id"\s*:\s*(\d+)')
LARGE_NUMBER: Final = re.compile(rb"[:\[,]\s*[0-9]{8,}")
"""A number of at least 8 digits: too large for a token id."""
ESCAPED_LETTER: Final = re.compile(rb"\\u00[2-7]")
"""An escaped ASCII letter: no writer needs it, and it could hide a key."""
CHARSMAP: Final = "precompiled_charsmap"
"""Key of SentencePiece's normalizer table in base64: uint32 size of the first part, that part, the rest."""
MAX_TOKEN_ID: Final = 9_999_999
"""Libraries allocate memory in proportion to the largest id, and abort the process if that fails."""
MAX_ADDED_TOKENS: Final = 64
"""Tokens that a tokenizer may add around every text."""
MAX_GROWTH: Final = 64
"""Factor by which replacements may make a text longer."""


def check_numbers(file: Path) -> None:
    """Raise `ValueError` if a tokenizer.json has an id or a size that is too large, `OSError` if it cannot be read.

    Only a suspicious file is parsed: a file of 9 MB takes 0.1 s.
    """
    with file.open("rb") as stream:
        if not file.stat().st_size:
            return
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if not _is_suspicious(content):
                return
    _check_leaves(file.read_text("utf-8"))


def check_numbers_of_text(text: str) -> None:
    """Raise `ValueError` if the text of a tokenizer.json has an id or a size that is too large."""
    if _is_suspicious(text.encode("utf-8", "replace")):
        _check_leaves(text)


def _is_suspicious(content: bytes | mmap.mmap) -> bool:
    numbers, names = LARGE_NUMBER.search(content), ESCAPED_LETTER.search(content)
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
        raise ValueError(f"its {CHARSMAP} needs {size} bytes after its first 4, it has {len(content)} in all")


def check_replacements(normalizer: bytes | None, decoder: bytes | None) -> None:
    """Raise `ValueError` if parts of a tokenizer.json, as JSON, make texts more than `MAX_GROWTH` times longer."""
    for part in (normalizer, decoder):
        if part is not None and b"Replace" in part and _growth(json.loads(part)) > MAX_GROWTH:
            raise ValueError(f"it makes texts more than {MAX_GROWTH} times longer")


def find_regexes(*parts: bytes | None) -> list[str]:
    """Return the regular expressions in parts of a tokenizer.json."""
    found = [json.loads(part) for part in parts if part is not None and b'"Regex"' in part]
    return [str(value) for name, value in itertools.chain(*map(_leaves, found)) if name == "Regex"]


def _growth(part: Any) -> float:
    """Return the factor by which all replacements of a part together may make a text longer."""
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
    """Yield (key, value) of every value that is not a list or object; items of a list have the list's key."""
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
    """Return a tokenizer.json without padding, truncation and added tokens outside [0, vocab_size).

    The text of such a token becomes ordinary text. Returns the input if there is nothing to change, and if it is not a
    valid tokenizer.json: the library reports that.
    """
    if PADDING_OR_TRUNCATION.search(text) is None and all(int(found[1]) < vocab_size for found in IDS.finditer(text)):
        return text
    try:
        content = json.loads(text)
        added = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    except (ValueError, RecursionError, LookupError, TypeError):
        return text
    return json.dumps({**content, "truncation": None, "padding": None, "added_tokens": added}, ensure_ascii=False)
