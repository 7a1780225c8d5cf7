"""The SNIPS data (Coucke et al. 2018, arXiv:1805.10190, CC0) as spoken commands and JSON answers.

Defines the form of the answer and the tokens that spell it. Knows nothing of training. `python -m
edgelm_export.distill.snips dev.jsonl > tasks.jsonl` makes tasks for `edgelm eval --task`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import DataError
from edgelm.evaluation.tasks import Task


@dataclass(frozen=True, slots=True)
class Utterance:
    """A sentence in pieces.

    Parameters
    ----------
    intent
        The intent, such as "PlayMusic".
    pieces
        The sentence as (slot name or None, text); the joined texts are the sentence.
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
        """Return the sentence and its answer: slots in text order, a list for a name that occurs twice."""
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
        The file cannot be read, or a line is not such an object; the error names the line.
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
            raise ValueError(f"slot {slot['name']!r} is not at its position in the text")
        pieces.append((None, text[end : slot["start"]]))
        pieces.append((slot["name"], slot["value"]))
        end = slot["end"]
    pieces.append((None, text[end:]))
    return Utterance(intent, tuple((name, piece) for name, piece in pieces if piece))


def answer_pieces(utterances: Sequence[Utterance]) -> list[str]:
    """Return the texts around the values in the JSON answers; each becomes one token.

    An answer is a start with the intent, then for each slot a name, its value, and a separator or the end: `{"intent":
    "PlayMusic", "slots": {"` `artist": "` Miles Davis `", "` `service": "` spotify `"}}`.
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
