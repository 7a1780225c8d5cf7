"""Suggestions for mistyped words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest_match(word: str, known: Iterable[str], cutoff: float = 0.7) -> str:
    """Return a suggestion to append to an error message, or an empty text if no known word is similar."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""
