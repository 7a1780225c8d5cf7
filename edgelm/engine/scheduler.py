"""Which request holds which row of key/value memory.

Requests that are being answered hold the rows 0 .. n-1, without gaps, since they are decoded as one batch; those whose
prompts are being read hold the rows behind them. The last row of all is for what passes through.
"""

from __future__ import annotations

from edgelm.engine.sequence import Sequence
from edgelm.runtime.runner import Session


class Rows:
    """The rows of a session, `most` of which can be held."""

    def __init__(self, session: Session, most: int) -> None:
        self.running: list[Sequence] = []
        """Those being answered, by their rows."""
        self.reading: list[Sequence] = []
        """Those whose prompts are being read, the oldest first."""
        self._session = session
        self._most = most
        self._turn = 0

    @property
    def held(self) -> list[Sequence]:
        """Every request that holds a row."""
        return [*self.running, *self.reading]

    @property
    def is_full(self) -> bool:
        """Whether no row is free."""
        return len(self.held) >= self._most

    def take(self, sequence: Sequence) -> None:
        """Give a row to a request whose prompt is to be read."""
        sequence.row = len(self.held)
        self.reading.append(sequence)

    def next_to_read(self) -> Sequence | None:
        """Return whose prompt is read on: the oldest and the one that needs least, by turns.

        So a short prompt does not wait for the end of a long one, and a long one is held up to half of the time.
        """
        self._turn += 1
        if self._turn % 2 and self.reading:
            return self.reading[0]
        return min(self.reading, key=lambda sequence: sequence.length - sequence.computed, default=None)

    def start(self, sequence: Sequence) -> None:
        """Move a request whose prompt has been read to those that are being answered."""
        self.reading.remove(sequence)
        place = len(self.running)
        other = next((one for one in self.reading if one.row == place), None)
        if other is not None:
            self._session.copy_row(place, self._most, other.computed)
            self._session.copy_row(sequence.row, place, sequence.computed)
            self._session.copy_row(self._most, sequence.row, other.computed)
            self._session.forget_row(self._most)
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
            self.reading.remove(sequence)
        last_read = max(self.reading, key=lambda one: one.row, default=None)
        if last_read is not None and last_read.row > gap:
            gap = self._move(last_read, gap)
        self._session.forget_row(gap)

    def clear(self) -> None:
        """Take every row back."""
        self.running.clear()
        self.reading.clear()

    def _move(self, sequence: Sequence, row: int) -> int:
        """Move a request to another row; return the row that it leaves."""
        left, sequence.row = sequence.row, row
        self._session.copy_row(left, row, sequence.computed)
        return left
