"""Answers that go round in circles, as small models' do, above all without chance: found while they grow."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD: Final = 96
"""Tokens of the longest passage whose repetition is looked for."""

MIN_COPIES: Final = 4
"""How often a passage stands behind itself before it counts as a loop."""

MIN_LOOP_TOKENS: Final = 64
"""Tokens that the copies of a passage have together at least: short lists and laughter pass."""


class LoopDetector:
    """Sees an answer's tokens one by one, and tells when its end is one passage over and over.

    With a period of p tokens, 1 to `MAX_PERIOD`, that is the case once the last
    `max(MIN_LOOP_TOKENS, MIN_COPIES * p)` tokens repeat those p places before them. It takes some microseconds a token.
    """

    def __init__(self) -> None:
        self._runs = np.zeros(MAX_PERIOD, np.int32)
        periods = np.arange(1, MAX_PERIOD + 1)
        self._enough = np.maximum(MIN_LOOP_TOKENS, MIN_COPIES * periods) - periods

    def detect(self, answer: NDArray[np.int32]) -> bool:
        """Take the answer so far, int32 [n], which is one token longer than at the last call."""
        size = answer.size
        before = answer[max(0, size - 1 - MAX_PERIOD) : size - 1][::-1]
        same = before == answer[-1]
        self._runs[: same.size] = np.where(same, self._runs[: same.size] + 1, 0)
        return bool((self._runs >= self._enough).any())
