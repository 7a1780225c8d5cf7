"""Byte-pair encoding by its merges: the tokens that a token is made of, and the model without some tokens.

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2: the encoder joins the
adjacent pair of lowest rank until none is left. The merges inside a finished token do not depend on the text around it,
so encoding its own text alone gives all tokens that it was made of. If all of them are kept and merges are only
removed, a text whose tokens are all kept is encoded as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any


class BpeModel:
    """The BPE model of a tokenizer.json. Ids are those of that file.

    Parameters
    ----------
    model
        The object "model": vocab, merges as pairs.
    atoms
        Tokens that no merge makes and that have no parts, such as the bytes of a byte fallback.
    """

    def __init__(self, model: Mapping[str, Any], atoms: Iterable[int] = ()) -> None:
        self._model = model
        self._vocab: dict[str, int] = model["vocab"]
        self._names = {token: name for name, token in self._vocab.items()}
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
        self._parts: dict[int, tuple[int, ...]] = dict.fromkeys(atoms, ())

    def component_ids(self, token: int) -> tuple[int, ...]:
        """Return the tokens that its encoding makes on the way, with repetitions, without the token itself.

        Empty for a single symbol, and for a token that no merges make: that one is matched whole or not at all.
        """
        if token not in self._parts:
            name = self._names.get(token, "")
            steps = self._derive(name) if all(symbol in self._vocab for symbol in name) else []
            reached = bool(steps) and steps[-1] == name
            self._parts[token] = tuple(self._vocab[step] for step in steps[:-1]) if reached else ()
        return self._parts[token]

    def length(self, token: int) -> int:
        """Return the number of symbols of a token. Each component has fewer."""
        return len(self._names.get(token, ""))

    def ids_by_merge_order(self) -> list[int]:
        """Return every token id of the model, in the order of merges; tokens that no merge makes are last."""
        made: dict[str, int] = {}
        for (left, right), rank in self._ranks.items():
            made.setdefault(left + right, rank)
        never = len(self._ranks)
        return sorted(self._names, key=lambda token: (made.get(self._names[token], never), token))

    def pruned(self, new: Mapping[int, int]) -> dict[str, Any]:
        """Return the object "model" with the kept tokens only; `new` maps their old ids, ascending, to new ones."""
        vocab = {self._names[old]: token for old, token in new.items() if old in self._names}
        merges = [
            [left, right] for left, right in self._ranks if left in vocab and right in vocab and left + right in vocab
        ]
        return {**self._model, "vocab": vocab, "merges": merges}

    def _derive(self, name: str) -> list[str]:
        """Encode a text alone; return its symbols, then each token made, in order. Empty if it stays several tokens."""
        symbols = list(name)
        steps = list(symbols)
        never = len(self._ranks)
        ranks = [self._ranks.get(pair, never) for pair in pairwise(symbols)]
        while ranks and (best := min(ranks)) < never:
            i = ranks.index(best)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            steps.append(symbols[i])
            del ranks[i]
            for j in (i - 1, i):
                if 0 <= j < len(ranks):
                    ranks[j] = self._ranks.get((symbols[j], symbols[j + 1]), never)
        return steps if len(symbols) == 1 else []
