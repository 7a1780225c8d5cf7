"""Quality of a model on text and tasks: perplexity, bits per byte, exact match. Reads no files and prints nothing."""

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
    """Perplexity is per token; `truncated` documents lost `skipped` tokens past the context."""

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

    Every document starts with the bundle's start token, where it has one, and every token after the first counts.
    A document longer than the context is cut there (`truncate`), or scored to its end in windows that overlap by half,
    so that each further token is predicted from at least half a context (`window`). Raises `EdgelmError` for text
    without a single token to score.
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
        for window, fresh in _windows(ids, context):
            scores = model.score_tokens(window)[-fresh:]
            nats -= float(scores.sum())
            tokens += len(scores)
    if tokens == 0:
        raise EdgelmError("the text is too short: it has no token to predict")
    return TextQuality(math.exp(nats / tokens), nats / math.log(2) / size, tokens, len(documents), truncated, skipped)


def _windows(ids: list[int], context: int) -> list[tuple[list[int], int]]:
    """Cut tokens into windows, each with the number of its last tokens that no window before has scored."""
    if len(ids) < 2:
        return []
    windows = [(ids[:context], min(len(ids), context) - 1)]
    end = context
    while end < len(ids):
        start_of_new = end
        end = min(end + max(context // 2, 1), len(ids))
        windows.append((ids[max(0, end - context) : end], end - start_of_new))
    return windows
