"""The text of a tokenizer.json with nothing in it that a bundle's model could not follow.

Files are published as they were last used: with padding or truncation on, or with an added token that the model has no
row for. Knows the format, and loads no library.
"""

from __future__ import annotations

import json
import re
from typing import Final

LENGTHS: Final = re.compile(r'"(?:padding|truncation)"\s*:\s*\{')
IDS: Final = re.compile(r'"id"\s*:\s*(\d+)')


def usable_text(text: str, vocab_size: int) -> str:
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
