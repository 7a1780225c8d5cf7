"""Assigns rows of the KV cache to sequences.

Running sequences hold rows 0 .. n-1 without gaps, because they are decoded as one batch; prefilling ones hold the rows
after them. The last row is scratch space.
"""

from __future__ import annotations

from edgelm.engine.sequence import Sequence
from edgelm.runtime.runner import Runner


class Scheduler:
    """The rows of a runner, of which at most `max_active` are held."""

    def __init__(self, runner: Runner, max_active: int) -> None:
        self.running: list[Sequence] = []
        """Sequences that are decoded, in order of their rows."""
        self.prefilling: list[Sequence] = []
        """Sequences whose prompts are computed, the oldest first."""
        self._runner = runner
        self._max_active = max_active
        self._prefill_round = 0

    @property
    def held(self) -> list[Sequence]:
        """Every sequence that holds a row."""
        return [*self.running, *self.prefilling]

    @property
    def is_full(self) -> bool:
        """Whether no row is free."""
        return len(self.held) >= self._max_active

    def assign_row(self, sequence: Sequence) -> None:
        """Assign a free row to a sequence, which becomes prefilling."""
        sequence.row = len(self.held)
        self.prefilling.append(sequence)

    def choose_prefill(self) -> Sequence | None:
        """Return the sequence to prefill next: alternately the oldest, and the one with the fewest tokens left.

        A short prompt does not wait for the end of a long one, and a long one gets at least half of the steps.
        """
        self._prefill_round += 1
        if self._prefill_round % 2 and self.prefilling:
            return self.prefilling[0]
        return min(self.prefilling, key=lambda sequence: sequence.length - sequence.computed_tokens, default=None)

    def start(self, sequence: Sequence) -> None:
        """Make a prefilled sequence a running one."""
        self.prefilling.remove(sequence)
        row = len(self.running)
        other = next((one for one in self.prefilling if one.row == row), None)
        if other is not None:
            self._runner.copy_row(row, self._max_active, other.computed_tokens)
            self._runner.copy_row(sequence.row, row, sequence.computed_tokens)
            self._runner.copy_row(self._max_active, sequence.row, other.computed_tokens)
            self._runner.release_row(self._max_active)
            other.row, sequence.row = sequence.row, row
        self.running.append(sequence)

    def release(self, sequence: Sequence) -> None:
        """Free the row of a sequence, close the gap with the last sequences, and release the row that becomes free."""
        gap = sequence.row
        if sequence in self.running:
            self.running.remove(sequence)
            if gap < len(self.running):
                last = self.running.pop()
                self.running.insert(gap, last)
                gap = self._move(last, gap)
        else:
            self.prefilling.remove(sequence)
        last_prefilling = max(self.prefilling, key=lambda one: one.row, default=None)
        if last_prefilling is not None and last_prefilling.row > gap:
            gap = self._move(last_prefilling, gap)
        self._runner.release_row(gap)

    def clear(self) -> None:
        """Free all rows."""
        self.running.clear()
        self.prefilling.clear()

    def _move(self, sequence: Sequence, row: int) -> int:
        """Move a sequence to another row; return the row that it leaves."""
        old_row, sequence.row = sequence.row, row
        self._runner.copy_row(old_row, row, sequence.computed_tokens)
        return old_row
