"""Perplexity and bits per byte of a model on text. Reads no files and prints nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgelm.errors import EdgelmError
from edgelm.model import Model

LongDocuments = Literal["truncate", "window"]


@dataclass(frozen=True, slots=True)
class TextQuality:
    """Perplexity is per token. `truncated` documents were cut at the context, by `skipped` tokens in all."""

    perplexity: float
    bits_per_byte: float
    tokens: int
    documents: int
    truncated: int
    skipped: int


def evaluate_text(
    model: Model,
    documents: Sequence[str],
    *,
    long_documents: LongDocuments = "truncate",
    progress: Callable[[str, int, int], None] | None = None,
) -> TextQuality:
    """Measure perplexity per token and bits per byte.

    Every document begins with the bundle's start token, if it has one, and every token after the first is scored.
    A document longer than the context is cut (`truncate`), or scored in windows that overlap by half, so that each
    later token has at least half a context before it (`window`). Raises `EdgelmError` if there is no token to score.
    """
    context = model.context
    nats, tokens, size, truncated, skipped = 0.0, 0, 0, 0, 0
    for number, document in enumerate(documents):
        if progress is not None:
            progress("document", number, len(documents))
        ids = model.document_tokens(document)
        if len(ids) > context and long_documents == "truncate":
            truncated, skipped = truncated + 1, skipped + len(ids) - context
            size += len(model.tokenizer.decode(ids[:context]).encode())
            ids = ids[:context]
        else:
            size += len(document.encode())
        for window, new in _windows(ids, context):
            scores = model.score_tokens(window)[-new:]
            nats -= float(scores.sum())
            tokens += len(scores)
    if tokens == 0:
        raise EdgelmError("the text is too short: it has no token to score")
    return TextQuality(math.exp(nats / tokens), nats / math.log(2) / size, tokens, len(documents), truncated, skipped)


def _windows(ids: list[int], context: int) -> list[tuple[list[int], int]]:
    """Return windows of tokens, each with the number of its last tokens that no earlier window scores."""
    if len(ids) < 2:
        return []
    windows = [(ids[:context], min(len(ids), context) - 1)]
    end = context
    while end < len(ids):
        start_of_new = end
        end = min(end + max(context // 2, 1), len(ids))
        windows.append((ids[max(0, end - context) : end], end - start_of_new))
    return windows
