"""Unigram vocabularies: the pieces that are kept, and why the others may go.

Kudo 2018, "Subword Regularization", section 3.2: a text becomes the pieces of the highest summed score. Taking away
pieces that a text does not use leaves its best segmentation the best. The score of an unknown character hangs on the
lowest score of all, so the piece that has it stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class UnigramModel:
    """The model of a tokenizer.json in the library's own form. A token's id is its place in the list of pieces.

    Parameters
    ----------
    model
        Its "model" object: vocab as [piece, score], unk_id.
    atoms
        Tokens that are made of nothing, such as the bytes of a byte fallback.
    """

    def __init__(self, model: Mapping[str, Any], atoms: Iterable[int] = ()) -> None:
        self._model = model
        self._pieces: list[str] = [piece for piece, _ in model["vocab"]]
        self._ids = {piece: token for token, piece in enumerate(self._pieces)}
        self._atoms = set(atoms)

    def basis(self) -> set[int]:
        """Return the tokens without which the others would be scored or spelled differently."""
        scores = [score for _, score in self._model["vocab"]]
        return {self._model["unk_id"], scores.index(min(scores))}

    def parts(self, token: int) -> tuple[int, ...]:
        """Return the pieces of one character that spell a longer one: what it falls back to."""
        if token in self._atoms or token >= len(self._pieces) or len(self._pieces[token]) < 2:
            return ()
        return tuple(self._ids[character] for character in self._pieces[token] if character in self._ids)

    def length(self, token: int) -> int:
        """Return the characters in a token; every part of it has fewer."""
        return len(self._pieces[token]) if token < len(self._pieces) else 0

    def ids_by_merge_order(self) -> list[int]:
        """Return every token of the model; the list of pieces is sorted by score where it was trained."""
        return list(range(len(self._pieces)))

    def pruned(self, new: Mapping[int, int]) -> dict[str, Any]:
        """Return the "model" object of the kept tokens alone; `new` maps their ids, ascending, to the new ones."""
        vocab = [self._model["vocab"][old] for old in new if old < len(self._pieces)]
        return {**self._model, "vocab": vocab, "unk_id": new[self._model["unk_id"]]}
