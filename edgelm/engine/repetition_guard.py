"""Detects answers that repeat one passage without end, as small models produce, above all with greedy decoding."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD: Final = 96
"""Maximum length of a repeated passage, in tokens."""

MIN_COPIES: Final = 4
"""Consecutive copies of a passage from which it counts as a loop."""

MIN_LOOP_TOKENS: Final = 64
"""Minimum total length of the copies, in tokens, so that short lists and laughter do not count."""


class LoopDetector:
    """Gets an answer token by token and detects that its end is one repeated passage.

    An answer is a loop with a period of p tokens, 1 to `MAX_PERIOD`, if its last `max(MIN_LOOP_TOKENS, MIN_COPIES * p)`
    tokens are copies of one passage of p tokens. Takes some microseconds per token.
    """

    def __init__(self) -> None:
        self._runs = np.zeros(MAX_PERIOD, np.int32)
        periods = np.arange(1, MAX_PERIOD + 1)
        self._min_runs = np.maximum(MIN_LOOP_TOKENS, MIN_COPIES * periods) - periods

    def detect(self, answer: NDArray[np.int32]) -> bool:
        """Return whether the answer, int32 [n], is a loop. It must be one token longer than at the last call."""
        size = answer.size
        before = answer[max(0, size - 1 - MAX_PERIOD) : size - 1][::-1]
        same = before == answer[-1]
        self._runs[: same.size] = np.where(same, self._runs[: same.size] + 1, 0)
        return bool((self._runs >= self._min_runs).any())
