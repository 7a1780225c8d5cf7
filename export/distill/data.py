"""Training data: tokens of prompt and target, packed into rows of equal length.

Most examples are much shorter than a row, so several share one. Attention does not cross examples (`Batch.segments`
identifies them) and each starts at position 0, so a packed example gets exactly the logits that it gets alone. Does not
import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import DataError
from edgelm.evaluation.tasks import Task

IGNORED_LABEL: Final = -100
"""The label of a position that is not trained on: prompts and padding."""

PADDING_SEGMENT: Final = -1
"""The segment of padding."""

OPEN_ROWS: Final = 32
"""Number of unfinished rows that an example may be added to: more pack tighter, fewer keep the shuffled order."""


class Encoding(Protocol):
    """The result of a tokenizer."""

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        ...


class Encoder(Protocol):
    """The part of `tokenizers.Tokenizer` that is used here."""

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> list[Encoding]:
        """Tokenize each text."""
        ...


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """A teacher's k best tokens at each target token. All other tokens share the remaining probability.

    Parameters
    ----------
    log_probs
        float32 [n, k], softened by the temperature, best first.
    tokens
        int32 [n, k].
    """

    log_probs: NDArray[np.float32]
    tokens: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One example as tokens: prompt, target, end token.

    Parameters
    ----------
    tokens
        int32 [n].
    target_start
        Index of the target's first token; at least 1, since nothing predicts the first token.
    teacher_targets
        One entry per target token, if the teacher was run before training.
    """

    tokens: NDArray[np.int32]
    target_start: int
    teacher_targets: TeacherTargets | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows, all int64 [rows, length].

    Parameters
    ----------
    tokens
        The model's input; padding is token 0.
    labels
        The next token if it belongs to a target, otherwise `IGNORED_LABEL`.
    positions
        From 0 within each example.
    segments
        Index of the position's example in its row; `PADDING_SEGMENT` for padding.
    teacher_targets
        One entry per label, in the order of rows and positions, if every example has them.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    teacher_targets: TeacherTargets | None = None


def encode_tasks(encoder: Encoder, tasks: Sequence[Task], end_token: int, length: int) -> list[EncodedExample]:
    """Tokenize each task as prompt (with the tokenizer's own special tokens), target, end token.

    Raises
    ------
    DataError
        A task has more than `length` tokens, or its prompt none; the error names its line.
    """
    prompts = encoder.encode_batch([task.prompt for task in tasks], add_special_tokens=True)
    targets = encoder.encode_batch([task.target for task in tasks], add_special_tokens=False)
    encoded = []
    for at, (task, prompt, target) in enumerate(zip(tasks, prompts, targets, strict=True), 1):
        where = f"line {task.line}" if task.line else f"example {at}"
        tokens = np.array([*prompt.ids, *target.ids, end_token], np.int32)
        if len(tokens) > length:
            raise DataError(f"{where} has {len(tokens)} tokens, a row holds {length}: shorten it or use longer rows")
        if not prompt.ids:
            raise DataError(f"{where}: the prompt has no tokens")
        encoded.append(EncodedExample(tokens, len(prompt.ids)))
    return encoded


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Distribute examples over rows: first fit into the last `OPEN_ROWS` rows, in the given order.

    Parameters
    ----------
    lengths
        Tokens of each example, 1 to `row_length`.
    row_length
        Tokens that fit into a row.

    Returns
    -------
    list of list of int
        For each row the indices of its examples; every index occurs once.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index, length in enumerate(lengths):
        first = max(0, len(rows) - OPEN_ROWS)
        at = next((row for row in range(first, len(rows)) if free[row] >= length), None)
        if at is None:
            rows.append([])
            free.append(row_length)
            at = len(rows) - 1
        rows[at].append(index)
        free[at] -= length
    return rows


def collate(rows: Iterable[Sequence[EncodedExample]], length: int) -> Batch:
    """Pack examples into rows with `length` positions; see `Batch`."""
    listed = list(rows)
    shape = (len(listed), length)
    soft = [
        example.teacher_targets for examples in listed for example in examples if example.teacher_targets is not None
    ]
    batch = Batch(
        tokens=np.zeros(shape, np.int64),
        labels=np.full(shape, IGNORED_LABEL, np.int64),
        positions=np.zeros(shape, np.int64),
        segments=np.full(shape, PADDING_SEGMENT, np.int64),
        teacher_targets=TeacherTargets(
            np.concatenate([s.log_probs for s in soft]), np.concatenate([s.tokens for s in soft])
        )
        if soft and len(soft) == sum(map(len, listed))
        else None,
    )
    for row, examples in enumerate(listed):
        start = 0
        for segment, example in enumerate(examples):
            count = len(example.tokens)
            here = slice(start, start + count)
            batch.tokens[row, here] = example.tokens
            batch.positions[row, here] = np.arange(count)
            batch.segments[row, here] = segment
            learned = slice(start + example.target_start - 1, start + count - 1)
            batch.labels[row, learned] = example.tokens[example.target_start :]
            start += count
    return batch


def make_batches(
    examples: Sequence[EncodedExample], row_length: int, rows_per_batch: int, rng: np.random.Generator
) -> list[Batch]:
    """Shuffle, pack and split into batches; the same `rng` state gives the same batches."""
    shuffled = [examples[index] for index in rng.permutation(len(examples))]
    rows = pack_rows([len(example.tokens) for example in shuffled], row_length)
    order = rng.permutation(len(rows))
    return [
        collate(
            ([shuffled[index] for index in rows[row]] for row in order[start : start + rows_per_batch]),
            row_length,
        )
        for start in range(0, len(rows), rows_per_batch)
    ]
