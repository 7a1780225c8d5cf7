"""Text for calibration and measurement: documents, separated by lines `<|endoftext|>`, as token ids."""

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
"""Maximum tokens of one calibration sequence."""

MAX_CALIBRATION_TOKENS: Final = 128 * CALIBRATION_DOCUMENT_TOKENS
"""Maximum calibration tokens. GPTQ (arXiv:2210.17323, section 4) also uses 128 segments, of 2,048 tokens each."""

CALIBRATION_WORK: Final = 1.75e12
"""Maximum of weights times calibration tokens, to limit the time; but at least 12,288 tokens are used."""

EVALUATION_DOCUMENT_TOKENS: Final = 1024
"""Maximum tokens of one sequence to measure on; its logits are in memory."""

MAX_EVALUATION_TOKENS: Final = 64 * EVALUATION_DOCUMENT_TOKENS
"""Maximum tokens to measure on: minutes for a model with 10^9 weights."""

MAX_READ_RATIO: Final = 16
"""Tokens read of a long text, as a multiple of the calibration tokens that are chosen from them."""

MIN_CALIBRATION_TOKENS: Final = 512
"""Fewer calibration tokens are refused."""

CHUNK_POSITIONS: Final = 64
"""Positions compared at a time; limits the logits in memory."""

Document = NDArray[np.int64]


def calibration_token_count(parameters: int) -> int:
    """Return the number of calibration tokens for a model with this many weights."""
    wanted = int(CALIBRATION_WORK / max(parameters, 1)) // CALIBRATION_DOCUMENT_TOKENS * CALIBRATION_DOCUMENT_TOKENS
    return min(max(wanted, MAX_CALIBRATION_TOKENS * 3 // 16), MAX_CALIBRATION_TOKENS)


def calibration_documents(
    text: str, tokenizer: Tokenizer, bos: int | None, context: int, limit: int, option: str = "--calibrate"
) -> list[Document]:
    """Cut documents into sequences of at most `CALIBRATION_DOCUMENT_TOKENS`; return about `limit` tokens of them.

    A longer text is sampled at even distances. `option` names the text in errors. Raises `EdgelmError` if the text has
    fewer than `MIN_CALIBRATION_TOKENS` tokens.
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
            f"{option}: the text has {total} tokens; at least {MIN_CALIBRATION_TOKENS} are required,"
            f" at most {limit} are used"
        )
    if total <= limit:
        return found
    count = max(1, len(found) * limit // total)
    return [found[i * len(found) // count] for i in range(count)]


def position_ranges(document: Document) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of a document's positions with a next token, `CHUNK_POSITIONS` at a time."""
    for start in range(0, len(document) - 1, CHUNK_POSITIONS):
        yield start, min(start + CHUNK_POSITIONS, len(document) - 1)


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """Sequences to measure on, and the number of the text's tokens that are not in them."""

    documents: list[Document]
    left_out_tokens: int


def evaluation_documents(text: str, tokenizer: Tokenizer, bos: int | None, context: int) -> EvaluationText:
    """Cut documents into sequences of at most `EVALUATION_DOCUMENT_TOKENS` tokens, each with a token to predict.

    Sequences are chosen at even distances if the text has more than `MAX_EVALUATION_TOKENS` tokens. Each begins with
    the start token if there is one. Raises `EdgelmError` if no sequence is left.
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
