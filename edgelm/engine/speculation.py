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

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgelm.types import UNCACHED_OWNER, Owner

Tokens = NDArray[np.int32]

DRAFT_LENGTHS: Final = (7, 3, 1)
"""How many tokens are guessed, at most; with the last sampled one a pass has 8, 4 or 2."""

NGRAM_SIZE: Final = 3
"""Tokens that must have occurred before."""

HISTORY_TOKENS: Final = 4096
"""Tokens of earlier prompts and answers that are searched, at least."""

MAX_OWNERS: Final = 16
"""Owners whose earlier tokens are kept."""

SEPARATOR: Final = -1
"""Stands between earlier sequences; no token."""

NO_DRAFT: Final = np.zeros(0, np.int32)

EMA_DECAY: Final = 0.8
"""How much of the earlier estimate stays when a guess was checked."""

GLOBAL_EMA_DECAY: Final = 0.98
"""The same for the estimate over all answers, with which the next one begins."""

PASS_TIME_DECAY: Final = 0.998
"""How much of a measured time stays with every pass, so that what was slow once is tried again."""

PRIOR_ACCEPT_RATE: Final = 0.6
"""Share of guessed tokens that is expected to be right before any was checked."""

PRIOR_TOKEN_COST: Final = 0.05
"""What a further token is taken to cost beside the first before it was measured."""

PAUSE: Final = 8
"""Tokens without a guess after guesses that did not pay; doubled each time, up to `MAX_PAUSE`."""

MAX_PAUSE: Final = 256


class NgramIndex:
    """What followed three tokens the last time."""

    __slots__ = ("_following", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._following: dict[tuple[int, ...], int] = {}

    def add(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        known = self.tokens
        for token in tokens:
            self._following[tuple(known[-NGRAM_SIZE:])] = len(known)
            known.append(token)

    def find(self, last: Sequence[int]) -> int | None:
        """Return where the token is that followed `last` the last time."""
        return self._following.get(tuple(last)) if len(last) == NGRAM_SIZE else None


class DraftState:
    """How guesses fare in one answer; `accept_rate` is the share of guessed tokens that is expected to be right."""

    __slots__ = ("accept_rate", "lookup", "pause", "paused_tokens_left")

    def __init__(self) -> None:
        self.lookup = NgramIndex()
        self.accept_rate: float | None = None
        self.pause = PAUSE
        self.paused_tokens_left = 0


class Speculator:
    """Looks guesses up and learns what they cost."""

    def __init__(self) -> None:
        self._earlier: OrderedDict[Owner, NgramIndex] = OrderedDict()
        """What each owner's sequences were, the least recently added to first: a right guess makes an answer quicker,
        and so would tell what another owner's were."""
        self._pass_time_s: dict[int, float] = {}
        self._begun: set[int] = set()
        self._rate = PRIOR_ACCEPT_RATE

    def add_sequence(self, tokens: Tokens, owner: Owner = None) -> None:
        """Add a whole sequence, int32 [n], to what is searched for its owner."""
        if owner == UNCACHED_OWNER:
            return
        earlier = self._earlier.pop(owner, None) or NgramIndex()
        if len(earlier.tokens) > 2 * HISTORY_TOKENS:
            kept, earlier = earlier.tokens[-HISTORY_TOKENS:], NgramIndex()
            earlier.add(kept)
        earlier.add([SEPARATOR, *tokens[-HISTORY_TOKENS:].tolist()])
        self._earlier[owner] = earlier
        if len(self._earlier) > MAX_OWNERS:
            self._earlier.popitem(last=False)

    def propose(self, draft_state: DraftState, tokens: Tokens, most: int, owner: Owner = None) -> Tokens:
        """Return the likely continuation of `tokens`, int32 [n]: at most `most` of them, none where it does not pay.

        It is searched for in these tokens and in what the same owner's earlier sequences were.
        """
        if draft_state.accept_rate is None:
            draft_state.accept_rate = self._rate
        if draft_state.paused_tokens_left > 0:
            draft_state.paused_tokens_left -= 1
            return NO_DRAFT
        size = self._size(draft_state.accept_rate, most)
        if size == 0:
            return NO_DRAFT
        own = draft_state.lookup
        own.add(tokens[len(own.tokens) :].tolist())
        return np.array(_continuation(own, self._earlier.get(owner), size), np.int32)

    def record_pass(self, draft_state: DraftState, tokens: int, elapsed_s: float, guessed: int, right: int) -> None:
        """Take note of how long a pass of so many tokens took, and how many of the guessed ones were right."""
        self._took(tokens, elapsed_s)
        if not guessed:
            return
        rate = self._rate if draft_state.accept_rate is None else draft_state.accept_rate
        for i in range(min(right + 1, guessed)):  # those after the first wrong one were not looked at
            rate = EMA_DECAY * rate + (1 - EMA_DECAY) * (i < right)
            self._rate = GLOBAL_EMA_DECAY * self._rate + (1 - GLOBAL_EMA_DECAY) * (i < right)
        if right:
            draft_state.pause = PAUSE
        if self._size(rate, DRAFT_LENGTHS[0]) == 0:
            draft_state.paused_tokens_left = draft_state.pause
            draft_state.pause = min(2 * draft_state.pause, MAX_PAUSE)
            rate = max(rate, PRIOR_ACCEPT_RATE / 2)  # it is tried again some time
        draft_state.accept_rate = rate

    def _took(self, tokens: int, elapsed_s: float) -> None:
        """Take note of how long a pass of so many tokens took; the first one also allocates, and does not count."""
        if tokens not in self._begun:
            self._begun.add(tokens)
            return
        for other in self._pass_time_s:
            self._pass_time_s[other] *= PASS_TIME_DECAY
        known = self._pass_time_s.get(tokens, elapsed_s)
        self._pass_time_s[tokens] = EMA_DECAY * known + (1 - EMA_DECAY) * elapsed_s

    def _size(self, rate: float, most: int) -> int:
        """Return how many tokens to guess: what yields most tokens a second."""
        best, speed = 0, 1 / self._cost(1)
        for size in DRAFT_LENGTHS:
            found = expected(rate, size) / self._cost(size + 1)
            if size <= most and found > speed:
                best, speed = size, found
        return best

    def _cost(self, tokens: int) -> float:
        """Return the time of a pass; where it was not measured yet, it is taken to be quick, so that it will be."""
        return self._pass_time_s.get(tokens, self._pass_time_s.get(1, 1.0) * (1 + PRIOR_TOKEN_COST * (tokens - 1)))


def _continuation(own: NgramIndex, earlier: NgramIndex | None, size: int) -> list[int]:
    """Return up to `size` tokens that followed in this sequence, else in an earlier one.

    What is this sequence's end is repeated; an earlier one's end is an end.
    """
    last = own.tokens[-NGRAM_SIZE:]
    at = own.find(last)
    if at is not None:
        found = own.tokens[at : at + size]
        return [found[i % len(found)] for i in range(size)]
    at = None if earlier is None else earlier.find(last)
    if earlier is None or at is None:
        return []
    found = earlier.tokens[at : at + size]
    return found[: found.index(SEPARATOR)] if SEPARATOR in found else found


def expected(rate: float, size: int) -> float:
    """Return how many tokens a pass with `size` guesses yields, each right with probability `rate`: [1, size + 1]."""
    return size + 1.0 if rate >= 1 else (1 - rate ** (size + 1)) / (1 - rate)
