"""Tasks: prompts with target completions, and scores of a model's outputs.

Owns the format of a task file and the definition of each score. Knows nothing of models.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edgelm.errors import DataError


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt and its target, both non-empty text; `line` is its line number in the file."""

    prompt: str
    target: str
    line: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Scores of outputs against their targets. All except `n` are fractions in [0, 1].

    Parameters
    ----------
    n
        Number of tasks.
    exact
        Share of outputs that equal the target exactly.
    frame
        Share of outputs that equal the target as parsed JSON (in any key order).
        This and the next two are None unless every target is a JSON object.
    intent
        Share of outputs with the target's `"intent"`. None also if no target has an intent.
    slot_f1
        Micro-averaged F1 over the (name, value) pairs in `"slots"`; each item of a list is one pair.
        None also if no target has slots.
    """

    n: int
    exact: float
    frame: float | None = None
    intent: float | None = None
    slot_f1: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Return the `task` object of `edgelm eval --json`."""
        return asdict(self)


def read_tasks(path: Path) -> list[Task]:
    """Read a JSONL file of `{"prompt", "target"}`; other keys and blank lines are ignored.

    Raises
    ------
    DataError
        If the file cannot be read, has no task, or a line is not such an object; the error names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read tasks from {path}: {error}") from error
    tasks = [_parse(line, path, at) for at, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise DataError(f'{path} has no task: each line must be an object {{"prompt", "target"}}')
    return tasks


def _parse(line: str, path: Path, at: int) -> Task:
    where = f"{path} line {at}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: {type(row).__name__} instead of an object with "prompt" and "target"')
    for key in ("prompt", "target"):
        if not isinstance(row.get(key), str) or not row[key]:
            raise DataError(f"{where}: {key!r} must be a non-empty string")
    return Task(row["prompt"], row["target"], at)


def score_tasks(tasks: Sequence[Task], outputs: Sequence[str]) -> TaskScore:
    """Compare one output per task with its target.

    Raises
    ------
    ValueError
        If there are no tasks, or the numbers of tasks and outputs differ.
    """
    if not tasks or len(tasks) != len(outputs):
        raise ValueError(f"{len(tasks)} tasks and {len(outputs)} outputs: one output per task is needed")
    n = len(tasks)
    exact = sum(task.target == output for task, output in zip(tasks, outputs, strict=True)) / n
    wanted = [_parse_object(task.target) for task in tasks]
    if any(frame is None for frame in wanted):
        return TaskScore(n, exact)
    pairs = [(want, _parse_object(output)) for want, output in zip(wanted, outputs, strict=True) if want is not None]
    with_intent = [(want["intent"], got) for want, got in pairs if "intent" in want]
    return TaskScore(
        n,
        exact,
        frame=sum(want == got for want, got in pairs) / n,
        intent=sum(got is not None and got.get("intent") == want for want, got in with_intent) / len(with_intent)
        if with_intent
        else None,
        slot_f1=_slot_f1(pairs) if any("slots" in want for want, _ in pairs) else None,
    )


def _parse_object(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _slot_f1(pairs: Iterable[tuple[Mapping[str, object], Mapping[str, object] | None]]) -> float:
    """Return micro F1 = 2 * correct / (expected + given); 1 if nothing was expected and nothing was given."""
    right = total = 0
    for want, got in pairs:
        wanted, given = _slots(want), _slots(got or {})
        right += (wanted & given).total()
        total += sum(wanted.values()) + sum(given.values())
    return 2 * right / total if total else 1.0


def _slots(frame: Mapping[str, object]) -> Counter[tuple[str, str]]:
    """Return each slot of a frame as (name, value as JSON), so that values of any type can be compared."""
    slots = frame.get("slots")
    if not isinstance(slots, dict):
        return Counter()
    return Counter(
        (name, json.dumps(item, sort_keys=True))
        for name, value in slots.items()
        for item in (value if isinstance(value, list) else [value])
    )
