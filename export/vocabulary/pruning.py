"""Which tokens a domain needs, and the tokenizer that has only those.

A merge of byte-pair encoding saves one token wherever it is applied. Over the domain's text, no token is made more
often than any that it is made of, so those made most often, up to the budget, need nothing outside themselves: the
choice that shortens the text most is also a sound one. A character counts for several merges, since without it the
model reads bytes that it has hardly seen. A budget above what the text uses is filled with the earliest merges.

A model knows a text by the tokens that it was trained on: below `PrunedVocabulary.sufficient_size` quality falls fast.
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
"""Fewer tokens of text say nothing of a domain."""
CHARACTER_WEIGHT: Final = 5
"""Uses of a merge that one use of a character outweighs. stories260K with 400 to 460 of its 512 tokens, on TinyStories:
4 to 9 % fewer bits a byte than at weight 1, alike from 3 to 10; 16 to 23 % more with all characters first."""
CHUNK: Final = 1 << 16
"""Characters encoded at once, cut at the next end of a line."""


@dataclass(frozen=True, slots=True)
class PrunedVocabulary:
    """A smaller tokenizer, and the rows of the embedding and of the head that belong to it.

    Parameters
    ----------
    tokenizer
        The text of the new tokenizer.json.
    kept
        int64 [size]: the old id of each new id. Ascending, but for added tokens that the old file had numbered below
        tokens of its model.
    tokens_before, tokens_after
        How many tokens the domain's text takes with the old and with the new tokenizer.
    tokens_lost
        How many of the first were dropped from the vocabulary, so that their text is now spelled in other tokens.
    sufficient_size
        The least size at which none would be.
    """

    tokenizer: str
    kept: NDArray[np.int64]
    tokens_before: int
    tokens_after: int
    tokens_lost: int
    sufficient_size: int

    @property
    def size(self) -> int:
        """How many tokens are left."""
        return len(self.kept)

    def new_id(self, old: int) -> int | None:
        """Return where a token went; None when it was dropped."""
        found = np.flatnonzero(self.kept == old)
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
    """Choose `size` tokens for the domain of a text and write the tokenizer that has only them.

    Every text still encodes, through bytes where nothing longer is left, and decodes as before. A text whose tokens
    were all kept is encoded to the same ones. Added tokens, special or not, stay as long as the model has rows for
    them; rows that no token has, which models carry as padding, are dropped.

    Parameters
    ----------
    tokenizer_json
        The file: byte-level BPE, BPE with byte fallback, or Unigram with byte fallback.
    text
        Of the domain: `MIN_TOKENS` tokens at least.
    size
        Tokens to keep, at most as many as there are. Bytes and special tokens count.
    model_vocab_size
        Rows of the embedding.
    required
        Ids that must survive, such as those of the configuration and of the chat template.
    contents
        Those of the tokenizer.json where they have been read: `tokenizer_json` is then only what messages call it.

    Raises
    ------
    CheckpointError
        When the tokenizer cannot be read or pruned, or does not belong to the model.
    DataError
        When the text is too short, or holds lone surrogates.
    EdgelmError
        When `size` is too small for what must stay, or above the tokenizer's own.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the vocabulary's text is not valid Unicode: {error.reason}") from error
    document = read_tokenizer_json(tokenizer_json, contents)
    stay = _required_ids(document, model_vocab_size, required)
    extra = [token for token in document.added if token in stay and token not in document.base]
    counts = _count(document.inner, text)
    if sum(counts.values()) < MIN_TOKENS:
        raise DataError(
            f"the vocabulary's text has {sum(counts.values())} tokens; give at least {MIN_TOKENS}, better a megabyte"
        )
    limit = len(document.base) + len(extra)
    if size > limit:
        raise EdgelmError(
            f"a vocabulary of {size} was asked for, but {document.path} has only {limit} tokens:"
            " choose fewer, or leave the vocabulary as it is"
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
        raise CheckpointError(
            f"{document.path}: the tokenizers library numbers its tokens in a way that we do not know"
        )
    after = sum(_count(inner, text).values())
    return PrunedVocabulary(pruned, np.array(kept, np.int64), sum(counts.values()), after, lost, sufficient)


def _required_ids(document: TokenizerJson, rows: int, required: Collection[int]) -> set[int]:
    """Return the bytes, the added tokens that the model has rows for, and what is named or required."""
    tokens = set(document.ids.values())
    if max(document.base) >= rows:
        raise CheckpointError(
            f"{document.path} has tokens up to {max(document.base)}, the model {rows} rows: they do not belong together"
        )
    needed = {*document.basis, *document.named(), *required}
    for token in sorted(needed):
        if token not in tokens:
            raise CheckpointError(f"the token {token}, which has to stay, is not in {document.path}")
        if token >= rows:
            raise CheckpointError(f"the token {token}, which has to stay, has no row in a model of {rows}")
    return needed | {token for token in document.added if token < rows}


def _choose_ids(document: TokenizerJson, counts: Counter[int], stay: set[int], size: int) -> set[int]:
    """Return `size` ids, with every token also those it is made of."""
    model = document.model
    kept = _with_parts(document, stay)
    if len(kept) > size:
        raise EdgelmError(
            f"a vocabulary of {size} cannot hold the bytes, the special tokens and what they are made of:"
            f" choose at least {len(kept)}"
        )
    applied: Counter[int] = Counter()
    for token, count in counts.items():
        for part in (token, *model.parts(token)):
            applied[part] += count * (CHARACTER_WEIGHT if model.length(part) == 1 else 1)
    used = sorted(applied, key=lambda token: (-applied[token], model.length(token), token))
    for token in _without_end(used, model.ids_by_merge_order()):
        if len(kept) == size:
            break
        added = {token, *model.parts(token)} - kept
        if len(kept) + len(added) <= size:
            kept |= added
    return kept


def _with_parts(document: TokenizerJson, tokens: Collection[int]) -> set[int]:
    """Return tokens and all that they are made of."""
    return {part for token in tokens for part in (token, *document.model.parts(token))}


def _without_end(used: Iterable[int], others: Collection[int]) -> Iterator[int]:
    """Yield the used tokens once, then the others again and again: one that did not fit may do so later."""
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
