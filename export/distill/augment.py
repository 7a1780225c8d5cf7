"""Augmentation: new utterances from given ones, with slots still marked, so that the answers stay right."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .snips import Utterance

SHARED: Final = {
    "artist": "artist",
    "city": "city",
    "country": "country",
    "state": "state",
    "playlist": "playlist",
}
"""Slots whose values have the same meaning in every intent; values of other slots stay within their intent."""

FREE_TEXT_SLOTS: Final = frozenset(
    {"album", "artist", "entity_name", "movie_name", "object_name", "playlist", "restaurant_name", "track"}
)
"""Slots that can hold any words, so that a blend of two values is a valid value."""

PREFIXES: Final = ("please ", "hey ", "ok ", "hi, ", "Please ", "Hey, ")
SUFFIXES: Final = (" please", " thanks", ", please", " thank you")


@dataclass(frozen=True, slots=True)
class AugmentationRates:
    """Probability of each change, 0 to 1.

    Parameters
    ----------
    swap
        Replace a slot's value by another value seen in that slot.
    blend
        Replace a swapped title by the beginning of one value and the end of another.
    case
        Change the sentence's case: mostly to lower, else upper, capitalized, or every word capitalized.
    mark
        Remove or add the closing punctuation mark.
    polite
        Add a word of courtesy before or after.
    """

    swap: float = 0.5
    blend: float = 0.15
    case: float = 0.35
    mark: float = 0.25
    polite: float = 0.06


Pieces = list[tuple[str | None, str]]


class Augmenter:
    """Makes new utterances from given ones. Slots stay marked, so the answer stays right."""

    def __init__(self, utterances: Sequence[Utterance], noise: AugmentationRates) -> None:
        self.noise = noise
        self._seen: dict[str, list[str]] = {}
        for utterance in utterances:
            for name, value in utterance.slots:
                self._seen.setdefault(self._slot_key(utterance.intent, name), []).append(value)
        self._distinct = {pool: sorted(set(values)) for pool, values in self._seen.items()}

    @staticmethod
    def _slot_key(intent: str, name: str) -> str:
        return SHARED.get(name) or f"{intent}.{name}"

    def __call__(self, utterance: Utterance, rng: np.random.Generator) -> Utterance:
        """Return a changed copy; every value of its answer is still in its text."""
        pieces: Pieces = [
            (name, self._swap(utterance.intent, name, text, rng)) if name else (None, text)
            for name, text in utterance.pieces
        ]
        if rng.random() < self.noise.polite:
            pieces = _polite(pieces, rng)
        if rng.random() < self.noise.mark:
            pieces = _mark(pieces, rng)
        if rng.random() < self.noise.case:
            pieces = _case(pieces, rng)
        return Utterance(utterance.intent, tuple(piece for piece in pieces if piece[1]))

    def _swap(self, intent: str, name: str, value: str, rng: np.random.Generator) -> str:
        if rng.random() >= self.noise.swap:
            return value
        pool = self._slot_key(intent, name)
        # Half of the time by frequency, else each distinct value with equal probability: common values stay common,
        # and rare ones occur.
        values = (self._seen if rng.random() < 0.5 else self._distinct)[pool]
        chosen = values[rng.integers(len(values))]
        if name in FREE_TEXT_SLOTS and rng.random() < self.noise.blend:
            other = values[rng.integers(len(values))].split(" ")
            words = chosen.split(" ")
            cut = rng.integers(1, len(words) + 1)
            chosen = " ".join([*words[:cut], *other[rng.integers(len(other)) :]]).strip()
        return chosen


def _polite(pieces: Pieces, rng: np.random.Generator) -> Pieces:
    if rng.random() < 0.5:
        return [(None, PREFIXES[rng.integers(len(PREFIXES))]), *pieces]
    name, last = pieces[-1]
    bare = last.rstrip(".?!") if name is None else last
    return [*pieces[:-1], (name, bare.rstrip()), (None, SUFFIXES[rng.integers(len(SUFFIXES))])]


def _mark(pieces: Pieces, rng: np.random.Generator) -> Pieces:
    name, last = pieces[-1]
    if name is None and last.rstrip()[-1:] in {".", "?", "!"}:
        return [*pieces[:-1], (name, last.rstrip()[:-1].rstrip())]
    return [*pieces, (None, ".?!."[rng.integers(4)])]


def _case(pieces: Pieces, rng: np.random.Generator) -> Pieces:
    kind = rng.random()
    if kind < 0.7:
        return [(name, text.lower()) for name, text in pieces]
    if kind < 0.8:
        return [(name, text.upper()) for name, text in pieces]
    if kind < 0.9:
        return [(name, string.capwords(text, " ")) for name, text in pieces]
    name, first = pieces[0]
    return [(name, first[:1].upper() + first[1:]), *pieces[1:]]
