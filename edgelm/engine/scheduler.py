"""Which request holds which row of key/value memory.

Requests that are being answered hold the rows 0 .. n-1, without gaps, since they are decoded as one batch; those whose
prompts are being read hold the rows behind them. The last row of all is for what passes through.
"""

from __future__ import annotations

from edgelm.engine.sequence import Sequence
from edgelm.runtime.runner import Runner


class Scheduler:
    """The rows of a session, `max_active` of which can be held."""

    def __init__(self, runner: Runner, max_active: int) -> None:
        self.running: list[Sequence] = []
        """Those being answered, by their rows."""
        self.prefilling: list[Sequence] = []
        """Those whose prompts are being read, the oldest first."""
        self._runner = runner
        self._max_active = max_active
        self._prefill_round = 0

    @property
    def held(self) -> list[Sequence]:
        """Every request that holds a row."""
        return [*self.running, *self.prefilling]

    @property
    def is_full(self) -> bool:
        """Whether no row is free."""
        return len(self.held) >= self._max_active

    def take(self, sequence: Sequence) -> None:
        """Give a row to a request whose prompt is to be read."""
        sequence.row = len(self.held)
        self.prefilling.append(sequence)

    def choose_prefill(self) -> Sequence | None:
        """Return whose prompt is read on: the oldest and the one that needs least, by turns.

        So a short prompt does not wait for the end of a long one, and a long one is held up to half of the time.
        """
        self._prefill_round += 1
        if self._prefill_round % 2 and self.prefilling:
            return self.prefilling[0]
        return min(self.prefilling, key=lambda sequence: sequence.length - sequence.computed_tokens, default=None)

    def start(self, sequence: Sequence) -> None:
        """Move a request whose prompt has been read to those that are being answered."""
        self.prefilling.remove(sequence)
        place = len(self.running)
        other = next((one for one in self.prefilling if one.row == place), None)
        if other is not None:
            self._runner.copy_row(place, self._max_active, other.computed_tokens)
            self._runner.copy_row(sequence.row, place, sequence.computed_tokens)
            self._runner.copy_row(self._max_active, sequence.row, other.computed_tokens)
            self._runner.release_row(self._max_active)
            other.row, sequence.row = sequence.row, place
        self.running.append(sequence)

    def release(self, sequence: Sequence) -> None:
        """Free a row, close the gap with the last ones, and give back the row that this leaves."""
        gap = sequence.row
        if sequence in self.running:
            self.running.remove(sequence)
            if gap < len(self.running):
                last = self.running.pop()
                self.running.insert(gap, last)
                gap = self._move(last, gap)
        else:
            self.prefilling.remove(sequence)
        last_read = max(self.prefilling, key=lambda one: one.row, default=None)
        if last_read is not None and last_read.row > gap:
            gap = self._move(last_read, gap)
        self._runner.release_row(gap)

    def clear(self) -> None:
        """Take every row back."""
        self.running.clear()
        self.prefilling.clear()

    def _move(self, sequence: Sequence, row: int) -> int:
        """Move a request to another row; return the row that it leaves."""
        left, sequence.row = sequence.row, row
        self._runner.copy_row(left, row, sequence.computed_tokens)
        return left
