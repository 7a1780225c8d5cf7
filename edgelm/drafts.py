"""Guesses of the tokens to come, looked up in what was said before: verified in one pass, they save steps.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding; "Inference with reference",
Yang et al. 2023, arXiv:2304.04487): where the last tokens have occurred before, what followed them then is likely to
follow now. A guess is kept only where the sampler, with the logits of the verifying pass, chooses the same token: so an
answer has the distribution, and with a seed the tokens, that it would have without guesses. For a guess that is certain
of itself this accepts as often as speculative sampling does (Leviathan et al. 2023, arXiv:2211.17192, section 2.3).

How many tokens to guess is decided by what a pass of so many tokens was measured to take on this machine, and by how
often guesses were right in this answer. Knows nothing of sessions.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

SIZES: Final = (7, 3, 1)
"""How many tokens are guessed, at most; with the last sampled one a pass has 8, 4 or 2."""

GRAM: Final = 3
"""Tokens that must have occurred before."""

REMEMBERED: Final = 4096
"""Tokens of earlier prompts and answers that are searched."""

FADING: Final = 0.8
"""How much of the earlier estimate stays when a guess was checked."""

FORGETTING: Final = 0.998
"""How much of a measured time stays with every pass, so that what was slow once is tried again."""

HOPE: Final = 0.6
"""Share of guessed tokens that is expected to be right before any was checked."""

EAGERNESS: Final = 0.05
"""What a further token is taken to cost beside the first before it was measured."""

PAUSE: Final = 8
"""Tokens without a guess after guesses that did not pay; doubled each time, up to `LONGEST_PAUSE`."""

LONGEST_PAUSE: Final = 256


class Drafting:
    """How guesses fare in one answer."""

    __slots__ = ("pause", "rate", "wait")

    def __init__(self) -> None:
        self.rate = HOPE
        self.pause = PAUSE
        self.wait = 0

    def expected(self, size: int) -> float:
        """Tokens that a pass with so many guesses is expected to yield, in [1, size + 1]."""
        return float(sum(self.rate**i for i in range(size + 1)))


class Drafter:
    """Looks guesses up and learns what they cost."""

    def __init__(self) -> None:
        self._earlier: Tokens = np.zeros(0, np.int32)
        self._seconds: dict[int, float] = {}
        self._begun: set[int] = set()

    def remember(self, tokens: Tokens) -> None:
        """Add a whole sequence, int32 [n], to what is searched."""
        separator = np.full(1, -1, np.int32)
        self._earlier = np.concatenate([self._earlier, separator, tokens])[-REMEMBERED:]

    def propose(self, drafting: Drafting, tokens: Tokens, most: int) -> Tokens:
        """Return the likely continuation of `tokens`, int32 [n]: at most `most` of them, none where it does not pay."""
        if drafting.wait > 0:
            drafting.wait -= 1
            return tokens[:0]
        size = self._size(drafting, most)
        if size == 0:
            return tokens[:0]
        guess = _continuation(tokens, tokens[-GRAM:], size)
        return guess if len(guess) else _continuation(self._earlier, tokens[-GRAM:], size)

    def learn(self, drafting: Drafting, tokens: int, seconds: float, guessed: int, right: int) -> None:
        """Take note of how long a pass of so many tokens took, and how many of the guessed ones were right."""
        self._took(tokens, seconds)
        if not guessed:
            return
        checked = min(right + 1, guessed)  # those after the first wrong one were not looked at
        for i in range(checked):
            drafting.rate = FADING * drafting.rate + (1 - FADING) * (i < right)
        if right:
            drafting.pause = PAUSE
        if self._size(drafting, SIZES[0]) == 0:
            drafting.wait = drafting.pause
            drafting.pause = min(2 * drafting.pause, LONGEST_PAUSE)
            drafting.rate = max(drafting.rate, HOPE / 2)  # it is tried again some time

    def _took(self, tokens: int, seconds: float) -> None:
        """Take note of how long a pass of so many tokens took; the first one also allocates, and does not count."""
        if tokens not in self._begun:
            self._begun.add(tokens)
            return
        for other in self._seconds:
            self._seconds[other] *= FORGETTING
        known = self._seconds.get(tokens, seconds)
        self._seconds[tokens] = FADING * known + (1 - FADING) * seconds

    def _size(self, drafting: Drafting, most: int) -> int:
        """Return how many tokens to guess: what yields most tokens a second."""
        best, rate = 0, 1 / self._cost(1)
        for size in SIZES:
            if size <= most and drafting.expected(size) / self._cost(size + 1) > rate:
                best, rate = size, drafting.expected(size) / self._cost(size + 1)
        return best

    def _cost(self, tokens: int) -> float:
        """Return the time of a pass; where it was not measured yet, it is taken to be quick, so that it will be."""
        return self._seconds.get(tokens, self._seconds.get(1, 1.0) * (1 + EAGERNESS * (tokens - 1)))


def _continuation(tokens: Tokens, last: Tokens, size: int) -> Tokens:
    """Return up to `size` tokens that followed an earlier occurrence of `last`, within one sequence.

    The latest occurrence that so many tokens followed; where none did, the first.
    """
    starts = len(tokens) - len(last)
    if len(last) < GRAM or starts < 1:
        return tokens[:0]
    alike = tokens[:starts] == last[0]
    for i in range(1, len(last)):
        alike &= tokens[i : starts + i] == last[i]
    found = np.flatnonzero(alike)
    if not len(found):
        return tokens[:0]
    followed = int(np.searchsorted(found, starts - size, side="right"))
    at = int(found[max(followed - 1, 0)]) + len(last)
    guess = tokens[at : at + size]
    ends = np.flatnonzero(guess < 0)
    return guess[: ends[0]] if len(ends) else guess
