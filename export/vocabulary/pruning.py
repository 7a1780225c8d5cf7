"""Chooses the tokens that a domain needs, and builds the tokenizer with only these.

A merge of byte-pair encoding saves one token each time it is applied. Over the domain's text, no token is made more
often than the tokens that it is made of. So the tokens made most often, up to the budget, need no token outside the
choice: the choice that shortens the text most is also consistent. A character counts as several merges, because without
it the model reads bytes that it has hardly seen in training. A budget larger than the text needs is filled with the
earliest merges.

A model knows a text by the tokens that it was trained on: below `PrunedVocabulary.sufficient_size` quality drops fast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import tokenizers
from numpy.typing import NDArray

from edgelm.errors import CheckpointError, DataError, EdgelmError

from .tokenizer_json import TokenizerJson, read_tokenizer_json

MIN_TOKENS: Final = 100
"""Minimum tokens of the domain's text; fewer are not representative."""
CHARACTER_WEIGHT: Final = 5
"""Uses of a merge that one use of a character outweighs. stories260K with 400 to 460 of its 512 tokens, on TinyStories:
4 to 9 % fewer bits per byte than with weight 1, about the same from 3 to 10; 16 to 23 % more if all characters come
first."""
CHUNK: Final = 1 << 16
"""Characters encoded at a time, cut at the next end of a line."""


@dataclass(frozen=True, slots=True)
class PrunedVocabulary:
    """A smaller tokenizer, and the rows of embedding and head that belong to it.

    Parameters
    ----------
    tokenizer_text
        The text of the new tokenizer.json.
    kept_ids
        int64 [size]: the old id of each new id. Ascending, except for added tokens that the old file numbered below
        tokens of its model.
    tokens_before, tokens_after
        Tokens of the domain's text with the old and with the new tokenizer.
    tokens_lost
        How many of `tokens_before` were dropped from the vocabulary, so that their text is now encoded as other tokens.
    sufficient_size
        The smallest size with no such token.
    """

    tokenizer_text: str
    kept_ids: NDArray[np.int64]
    tokens_before: int
    tokens_after: int
    tokens_lost: int
    sufficient_size: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.kept_ids)

    def new_id(self, old: int) -> int | None:
        """Return the new id of a token; None if it was dropped."""
        found = np.flatnonzero(self.kept_ids == old)
        return int(found[0]) if len(found) else None


def prune_vocabulary(
    tokenizer_json: str | Path,
    text: str,
    size: int,
    *,
    model_vocab_size: int,
    required: Collection[int] = (),
    contents: str | None = None,
) -> PrunedVocabulary:
    """Choose `size` tokens for the domain of a text and build the tokenizer with only these.

    Every text still encodes, as bytes if nothing longer is left, and decodes as before. A text whose tokens were all
    kept is encoded to the same tokens. Added tokens, special or not, stay if the model has rows for them. Rows without
    a token, which some models have as padding, are dropped.

    Parameters
    ----------
    tokenizer_json
        The file: byte-level BPE, BPE with byte fallback, or Unigram with byte fallback.
    text
        Text of the domain, at least `MIN_TOKENS` tokens.
    size
        Tokens to keep, at most the tokenizer's own number. Bytes and special tokens count.
    model_vocab_size
        Rows of the embedding.
    required
        Ids that must stay, such as those of the configuration and of the chat template.
    contents
        The text of the tokenizer.json if it was read already; `tokenizer_json` is then only its name in messages.

    Raises
    ------
    CheckpointError
        The tokenizer cannot be read or pruned, or does not belong to the model.
    DataError
        The text is too short, or holds lone surrogates.
    EdgelmError
        `size` is too small for the tokens that must stay, or above the tokenizer's own.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the vocabulary's text is not valid Unicode: {error.reason}") from error
    document = read_tokenizer_json(tokenizer_json, contents)
    stay = _required_ids(document, model_vocab_size, required)
    extra = [token for token in document.added_ids if token in stay and token not in document.model_ids]
    counts = _count(document.tokenizer, text)
    if sum(counts.values()) < MIN_TOKENS:
        raise DataError(
            f"the vocabulary's text has {sum(counts.values())} tokens; at least {MIN_TOKENS} are required, better 1 MB"
        )
    limit = len(document.model_ids) + len(extra)
    if size > limit:
        raise EdgelmError(
            f"the vocabulary size {size} is too large: {document.path} has {limit} tokens;"
            " choose a smaller size, or keep the vocabulary"
        )
    chosen = _choose_ids(document, counts, stay, size)
    sufficient = len(_with_parts(document, stay | set(counts)))
    lost = sum(count for token, count in counts.items() if token not in chosen)
    kept = [*sorted(chosen - set(extra)), *extra]
    new = {old: token for token, old in enumerate(kept)}
    pruned = document.pruned(new)
    inner = tokenizers.Tokenizer.from_str(pruned)
    inner.no_truncation()
    inner.no_padding()
    if inner.get_vocab(with_added_tokens=True) != {name: new[old] for name, old in document.ids.items() if old in new}:
        raise CheckpointError(f"{document.path}: the tokenizers library numbers its tokens in an unknown way")
    after = sum(_count(inner, text).values())
    return PrunedVocabulary(pruned, np.array(kept, np.int64), sum(counts.values()), after, lost, sufficient)


def _required_ids(document: TokenizerJson, rows: int, required: Collection[int]) -> set[int]:
    """Return the ids that must stay: bytes, added tokens with a row in the model, referenced and required ids."""
    tokens = set(document.ids.values())
    if max(document.model_ids) >= rows:
        raise CheckpointError(
            f"{document.path} has tokens up to {max(document.model_ids)}, the model {rows} rows:"
            " they do not belong together"
        )
    needed = {*document.required_ids, *document.referenced_ids(), *required}
    for token in sorted(needed):
        if token not in tokens:
            raise CheckpointError(f"the token {token}, which must stay, is not in {document.path}")
        if token >= rows:
            raise CheckpointError(f"the token {token}, which must stay, has no row in a model of {rows}")
    return needed | {token for token in document.added_ids if token < rows}


def _choose_ids(document: TokenizerJson, counts: Counter[int], stay: set[int], size: int) -> set[int]:
    """Return `size` ids; each with the tokens that it is made of."""
    model = document.model
    kept = _with_parts(document, stay)
    if len(kept) > size:
        raise EdgelmError(
            f"a vocabulary of {size} is too small for bytes, special tokens and the tokens they are made of:"
            f" choose at least {len(kept)}"
        )
    applied: Counter[int] = Counter()
    for token, count in counts.items():
        for part in (token, *model.component_ids(token)):
            applied[part] += count * (CHARACTER_WEIGHT if model.length(part) == 1 else 1)
    used = sorted(applied, key=lambda token: (-applied[token], model.length(token), token))
    for token in _without_end(used, model.ids_by_merge_order()):
        if len(kept) == size:
            break
        added = {token, *model.component_ids(token)} - kept
        if len(kept) + len(added) <= size:
            kept |= added
    return kept


def _with_parts(document: TokenizerJson, tokens: Collection[int]) -> set[int]:
    """Return tokens and all tokens that they are made of."""
    return {part for token in tokens for part in (token, *document.model.component_ids(token))}


def _without_end(used: Iterable[int], others: Collection[int]) -> Iterator[int]:
    """Yield the used tokens once, then the others repeatedly: a token that did not fit may fit later."""
    yield from used
    while True:
        yield from others


def _count(inner: tokenizers.Tokenizer, text: str) -> Counter[int]:
    """Return how often each token occurs in a text."""
    counts: Counter[int] = Counter()
    start = 0
    while start < len(text):
        end = text.find("\n", start + CHUNK) + 1 or len(text)
        counts.update(inner.encode(text[start:end], add_special_tokens=False).ids)
        start = end
    return counts
