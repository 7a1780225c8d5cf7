"""The SNIPS data (Coucke et al. 2018, arXiv:1805.10190, CC0) as spoken commands and JSON answers.

Owns the form of the answer, the tokens that spell it, and the augmentation. Knows nothing of training.
`python -m edgelm_export.distill.snips dev.jsonl > tasks.jsonl` makes the tasks that `edgelm eval --task` reads.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from edgelm.errors import DataError
from edgelm.tasks import Task


@dataclass(frozen=True, slots=True)
class Utterance:
    """A sentence in pieces.

    Parameters
    ----------
    intent
        What is wanted, such as "PlayMusic".
    pieces
        The sentence cut into (slot name or None, text); joined texts give the sentence.
    """

    intent: str
    pieces: tuple[tuple[str | None, str], ...]

    @property
    def text(self) -> str:
        """The whole sentence."""
        return "".join(text for _, text in self.pieces)

    @property
    def slots(self) -> list[tuple[str, str]]:
        """The named pieces in text order."""
        return [(name, text) for name, text in self.pieces if name is not None]

    def to_task(self) -> Task:
        """Return the sentence and its answer: slots in text order, a list where a name occurs twice."""
        values: dict[str, list[str]] = {}
        for name, value in self.slots:
            values.setdefault(name, []).append(value)
        slots = {name: found if len(found) > 1 else found[0] for name, found in values.items()}
        return Task(self.text, json.dumps({"intent": self.intent, "slots": slots}, ensure_ascii=False))


def read_utterances(path: Path) -> list[Utterance]:
    """Read JSONL of `{"text", "intent", "slots": [{"name", "value", "start", "end"}]}`.

    Raises
    ------
    DataError
        The file cannot be read or a line is not such an object; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read utterances from {path}: {error}") from error
    utterances = []
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            utterances.append(_parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} line {at}: not a SNIPS utterance ({error})") from error
    if not utterances:
        raise DataError(f"{path} holds no utterance")
    return utterances


def _parse(row: dict[str, object]) -> Utterance:
    text, intent, slots = row["text"], row["intent"], row["slots"]
    if not isinstance(text, str) or not isinstance(intent, str) or not isinstance(slots, list):
        raise TypeError("text and intent must be strings, slots a list")
    pieces: list[tuple[str | None, str]] = []
    end = 0
    for slot in slots:
        if slot["start"] < end or text[slot["start"] : slot["end"]] != slot["value"]:
            raise ValueError(f"slot {slot['name']!r} does not lie where it says")
        pieces.append((None, text[end : slot["start"]]))
        pieces.append((slot["name"], slot["value"]))
        end = slot["end"]
    pieces.append((None, text[end:]))
    return Utterance(intent, tuple((name, piece) for name, piece in pieces if piece))


def answer_pieces(utterances: Sequence[Utterance]) -> list[str]:
    """Return the texts that spell the JSON around the values, each to become one token.

    An answer is an opening that states the intent, then for each slot a name, its value and a joint or the end:
    `{"intent": "PlayMusic", "slots": {"` `artist": "` Miles Davis `", "` `service": "` spotify `"}}`.
    """
    intents = sorted({utterance.intent for utterance in utterances})
    names = sorted({name for utterance in utterances for name, _ in utterance.slots})
    openings = [json.dumps({"intent": intent, "slots": {"": ""}})[: -len('": ""}}')] for intent in intents]
    return [
        *openings,
        *(f'{name}": "' for name in names),
        *(f'{name}": ["' for name in names),
        '", "',
        '"], "',
        '"}}',
        '"]}}',
    ]


SHARED: Final = {
    "artist": "artist",
    "city": "city",
    "country": "country",
    "state": "state",
    "playlist": "playlist",
}
"""Slots whose values mean the same in every intent; the values of other slots stay within their intent."""

TITLES: Final = frozenset(
    {"album", "artist", "entity_name", "movie_name", "object_name", "playlist", "restaurant_name", "track"}
)
"""Slots that can hold any words, so that a blend of two values is as good as a value."""

PREFIXES: Final = ("please ", "hey ", "ok ", "hi, ", "Please ", "Hey, ")
SUFFIXES: Final = (" please", " thanks", ", please", " thank you")


@dataclass(frozen=True, slots=True)
class Noise:
    """How often each change is made, 0 to 1.

    Parameters
    ----------
    swap
        Of a slot's value for another value seen in that slot.
    blend
        Of a swapped title for the beginning of one value and the end of another.
    case
        Of the sentence's case: lower mostly, else upper, capitalized, or every word capitalized.
    mark
        Of the closing mark: taken away, or one put there.
    polite
        Of a word of courtesy put before or after.
    """

    swap: float = 0.5
    blend: float = 0.15
    case: float = 0.35
    mark: float = 0.25
    polite: float = 0.06


Pieces = list[tuple[str | None, str]]


class Augmenter:
    """Makes new utterances from those given; slots stay marked, so the answer stays right."""

    def __init__(self, utterances: Sequence[Utterance], noise: Noise) -> None:
        self.noise = noise
        self._seen: dict[str, list[str]] = {}
        for utterance in utterances:
            for name, value in utterance.slots:
                self._seen.setdefault(self._pool(utterance.intent, name), []).append(value)
        self._distinct = {pool: sorted(set(values)) for pool, values in self._seen.items()}

    @staticmethod
    def _pool(intent: str, name: str) -> str:
        return SHARED.get(name) or f"{intent}.{name}"

    def __call__(self, utterance: Utterance, rng: np.random.Generator) -> Utterance:
        """Return a changed copy; every value of its answer still stands in its text."""
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
        pool = self._pool(intent, name)
        # As often as seen half of the time, each distinct value alike the other half: a common value stays
        # common, a rare one is met.
        values = (self._seen if rng.random() < 0.5 else self._distinct)[pool]
        chosen = values[rng.integers(len(values))]
        if name in TITLES and rng.random() < self.noise.blend:
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


def main() -> int:
    """Print the utterances of a file as tasks."""
    parser = argparse.ArgumentParser(prog="python -m edgelm_export.distill.snips", description=main.__doc__)
    parser.add_argument("file", type=Path, help="JSONL of SNIPS utterances")
    try:
        for utterance in read_utterances(parser.parse_args().file):
            task = utterance.to_task()
            sys.stdout.write(json.dumps({"prompt": task.prompt, "target": task.target}, ensure_ascii=False) + "\n")
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
