"""Unigram vocabularies: the pieces that must stay, and the model without some pieces.

Kudo 2018, "Subword Regularization", section 3.2: a text is encoded as the pieces with the highest sum of scores.
Removing pieces that the text does not use keeps its best segmentation. The score of an unknown character depends on the
lowest score of all pieces, so the piece with that score stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class UnigramModel:
    """The Unigram model of a tokenizer.json. A token's id is its index in the list of pieces.

    Parameters
    ----------
    model
        The object "model": vocab as [piece, score], unk_id.
    atoms
        Tokens that have no parts, such as the bytes of a byte fallback.
    """

    def __init__(self, model: Mapping[str, Any], atoms: Iterable[int] = ()) -> None:
        self._model = model
        self._pieces: list[str] = [piece for piece, _ in model["vocab"]]
        self._ids = {piece: token for token, piece in enumerate(self._pieces)}
        self._atoms = set(atoms)

    def required_ids(self) -> set[int]:
        """Return the tokens without which other tokens would be scored or spelled differently."""
        scores = [score for _, score in self._model["vocab"]]
        return {self._model["unk_id"], scores.index(min(scores))}

    def component_ids(self, token: int) -> tuple[int, ...]:
        """Return the one-character pieces that spell a longer piece: the tokens used if it is removed."""
        if token in self._atoms or token >= len(self._pieces) or len(self._pieces[token]) < 2:
            return ()
        return tuple(self._ids[character] for character in self._pieces[token] if character in self._ids)

    def length(self, token: int) -> int:
        """Return the number of characters of a token. Each component has fewer."""
        return len(self._pieces[token]) if token < len(self._pieces) else 0

    def ids_by_merge_order(self) -> list[int]:
        """Return every token id of the model; trained lists of pieces are sorted by score."""
        return list(range(len(self._pieces)))

    def pruned(self, new: Mapping[int, int]) -> dict[str, Any]:
        """Return the object "model" with the kept tokens only; `new` maps their old ids, ascending, to new ones."""
        vocab = [self._model["vocab"][old] for old in new if old < len(self._pieces)]
        return {**self._model, "vocab": vocab, "unk_id": new[self._model["unk_id"]]}
