"""Text to calibrate on and to measure with: documents, divided by lines that hold only `<|endoftext|>`, as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgelmError
from edgelm.text.documents import split_documents
from edgelm.text.tokenizer import Tokenizer

CALIBRATION_DOCUMENT_TOKENS: Final = 512
"""Tokens of one calibration sequence."""

MAX_CALIBRATION_TOKENS: Final = 128 * CALIBRATION_DOCUMENT_TOKENS
"""Calibration tokens put to use at most; GPTQ (arXiv:2210.17323, section 4) takes 128 segments too, of 2,048 each."""

CALIBRATION_WORK: Final = 1.75e12
"""Weights times tokens from which on fewer tokens are put to use, for the sake of time: at least 12,288 of them."""

EVALUATION_DOCUMENT_TOKENS: Final = 1024
"""Tokens of one sequence to measure on: logits of a whole one are in memory."""

MAX_EVALUATION_TOKENS: Final = 64 * EVALUATION_DOCUMENT_TOKENS
"""Tokens measured on at most: minutes with a model of a billion weights."""

MAX_READ_RATIO: Final = 16
"""So many times the calibration tokens are read of a long text, to be chosen from."""

MIN_CALIBRATION_TOKENS: Final = 512
"""Fewer say too little of what a model sees."""

CHUNK_POSITIONS: Final = 64
"""Positions compared at once: bounds the logits in memory."""

Document = NDArray[np.int64]


def calibration_token_count(parameters: int) -> int:
    """Return how many tokens a model of so many weights is calibrated on."""
    wanted = int(CALIBRATION_WORK / max(parameters, 1)) // CALIBRATION_DOCUMENT_TOKENS * CALIBRATION_DOCUMENT_TOKENS
    return min(max(wanted, MAX_CALIBRATION_TOKENS * 3 // 16), MAX_CALIBRATION_TOKENS)


def calibration_documents(
    text: str, tokenizer: Tokenizer, bos: int | None, context: int, limit: int, option: str = "--calibrate"
) -> list[Document]:
    """Cut documents into sequences of at most 512 tokens, and return those of `limit` tokens.

    Where there are more, sequences are taken evenly from the whole text. `option` names the text in errors. Raises
    `EdgelmError` for a text of fewer than `MIN_CALIBRATION_TOKENS` tokens.
    """
    length = min(CALIBRATION_DOCUMENT_TOKENS, context)
    found: list[Document] = []
    total = 0
    for ids in _tokens(split_documents(text), tokenizer, bos):
        found += [ids[start : start + length] for start in range(0, len(ids), length)]
        total += len(ids)
        if total >= MAX_READ_RATIO * limit:
            break
    if total < MIN_CALIBRATION_TOKENS:
        raise EdgelmError(
            f"{option}: the text has {total} tokens; at least {MIN_CALIBRATION_TOKENS} are needed, and"
            f" {limit} are put to use"
        )
    if total <= limit:
        return found
    count = max(1, len(found) * limit // total)
    return [found[i * len(found) // count] for i in range(count)]


def position_ranges(document: Document) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of a document's positions that have a next token, `CHUNK_POSITIONS` at a time."""
    for start in range(0, len(document) - 1, CHUNK_POSITIONS):
        yield start, min(start + CHUNK_POSITIONS, len(document) - 1)


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """Sequences to measure on, and how many tokens of the text are not among them."""

    documents: list[Document]
    left_out: int


def evaluation_documents(text: str, tokenizer: Tokenizer, bos: int | None, context: int) -> EvaluationText:
    """Cut documents into sequences of at most `EVALUATION_DOCUMENT_TOKENS` tokens, each with one to predict.

    Of more than `MAX_EVALUATION_TOKENS` tokens, sequences are taken evenly from the whole text. Each begins with the
    start
    token where there is one. Raises `EdgelmError` when nothing is left.
    """
    first = [] if bos is None else [bos]
    length = min(EVALUATION_DOCUMENT_TOKENS, context) - len(first)
    found: list[Document] = []
    for ids in _tokens(split_documents(text), tokenizer, None):
        pieces = (ids[start : start + length] for start in range(0, len(ids), max(length, 1)))
        found += [np.array([*first, *piece], np.int64) for piece in pieces if len(piece) + len(first) > 1]
    if not found:
        raise EdgelmError("--verify: the text is too short: it has no token to predict")
    total = sum(map(len, found))
    count = max(1, len(found) * MAX_EVALUATION_TOKENS // max(total, MAX_EVALUATION_TOKENS))
    taken = [found[i * len(found) // count] for i in range(count)]
    return EvaluationText(taken, total - sum(map(len, taken)))


def document_starts(text: str, tokenizer: Tokenizer, bos: int | None, length: int) -> list[Document]:
    """Return the first `length` tokens of each document that has a token to predict."""
    return [ids[:length] for ids in _tokens(split_documents(text), tokenizer, bos) if len(ids) > 1]


def _tokens(documents: Sequence[str], tokenizer: Tokenizer, bos: int | None) -> Iterator[Document]:
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False)
        yield np.array(ids if bos is None else [bos, *ids], np.int64)
