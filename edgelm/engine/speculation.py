"""Speculation: proposes draft tokens from earlier text, which are verified in one pass and save decode steps.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding; "Inference with reference",
Yang et al. 2023, arXiv:2304.04487): if the last tokens have occurred before, the tokens that followed them are likely
to follow again. A draft token is accepted only if the sampler, with the logits of the verifying pass, chooses the same
token. So an answer has the same distribution, and with a seed the same tokens, as without speculation. For a draft with
probability 1 this accepts as often as speculative sampling (Leviathan et al. 2023, arXiv:2211.17192, section 2.3).

The number of draft tokens depends on the measured time of a pass with so many tokens on this machine, and on the
acceptance rate in this answer. Knows nothing of requests or of the graph.
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
"""Possible numbers of draft tokens; with the last sampled token, a pass has 8, 4 or 2."""

NGRAM_SIZE: Final = 3
"""Number of last tokens that are looked up."""

HISTORY_TOKENS: Final = 4096
"""Minimum number of tokens of earlier sequences that are searched."""

MAX_OWNERS: Final = 16
"""Maximum number of owners whose earlier sequences are kept."""

SEPARATOR: Final = -1
"""Stands between earlier sequences; not a token id."""

NO_DRAFT: Final = np.zeros(0, np.int32)

EMA_DECAY: Final = 0.8
"""Decay of an answer's acceptance rate for each verified draft token."""

GLOBAL_EMA_DECAY: Final = 0.98
"""Decay of the acceptance rate over all answers, which is the initial rate of the next answer."""

PASS_TIME_DECAY: Final = 0.998
"""Decay of every measured pass time for each pass, so that a size that was slow once is tried again."""

PRIOR_ACCEPT_RATE: Final = 0.6
"""Assumed acceptance rate before any draft token was verified."""

PRIOR_TOKEN_COST: Final = 0.05
"""Assumed time of each further token of a pass, relative to the first, before it was measured."""

INITIAL_PAUSE: Final = 8
"""Tokens without speculation after it did not save time; doubled each time, up to `MAX_PAUSE`."""

MAX_PAUSE: Final = 256
"""Upper limit of a pause, in tokens."""


class NgramIndex:
    """Maps the last `NGRAM_SIZE` tokens to the position of the token that followed them most recently."""

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
        """Return the position of the token that most recently followed `last`, or None."""
        return self._following.get(tuple(last)) if len(last) == NGRAM_SIZE else None


class DraftState:
    """Speculation state of one answer; `accept_rate` is the expected share of draft tokens that are accepted."""

    __slots__ = ("accept_rate", "index", "pause", "paused_tokens_left")

    def __init__(self) -> None:
        self.index = NgramIndex()
        self.accept_rate: float | None = None
        self.pause = INITIAL_PAUSE
        self.paused_tokens_left = 0


class Speculator:
    """Proposes draft tokens, and measures acceptance rates and pass times."""

    def __init__(self) -> None:
        self._earlier: OrderedDict[Owner, NgramIndex] = OrderedDict()
        """Earlier sequences by owner, the least recently extended first. Owners share nothing, because an accepted
        draft makes an answer faster and would reveal another owner's text."""
        self._pass_time_s: dict[int, float] = {}
        self._measured_sizes: set[int] = set()
        self._accept_rate = PRIOR_ACCEPT_RATE

    def add_sequence(self, tokens: Tokens, owner: Owner = None) -> None:
        """Add a finished sequence, int32 [n], to those that are searched for its owner."""
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

    def propose(self, draft_state: DraftState, tokens: Tokens, max_tokens: int, owner: Owner = None) -> Tokens:
        """Return draft tokens after `tokens`, int32 [n]: at most `max_tokens`, none if speculation does not save time.

        They are looked up in these tokens and in earlier sequences of the same owner.
        """
        if draft_state.accept_rate is None:
            draft_state.accept_rate = self._accept_rate
        if draft_state.paused_tokens_left > 0:
            draft_state.paused_tokens_left -= 1
            return NO_DRAFT
        length = self._choose_length(draft_state.accept_rate, max_tokens)
        if length == 0:
            return NO_DRAFT
        own = draft_state.index
        own.add(tokens[len(own.tokens) :].tolist())
        return np.array(_continuation(own, self._earlier.get(owner), length), np.int32)

    def record_pass(self, draft_state: DraftState, tokens: int, elapsed_s: float, drafted: int, accepted: int) -> None:
        """Record the time of a pass with `tokens` tokens, and how many of its draft tokens were accepted."""
        self._record_time(tokens, elapsed_s)
        if not drafted:
            return
        rate = self._accept_rate if draft_state.accept_rate is None else draft_state.accept_rate
        for i in range(min(accepted + 1, drafted)):  # those after the first rejected one were not verified
            rate = EMA_DECAY * rate + (1 - EMA_DECAY) * (i < accepted)
            self._accept_rate = GLOBAL_EMA_DECAY * self._accept_rate + (1 - GLOBAL_EMA_DECAY) * (i < accepted)
        if accepted:
            draft_state.pause = INITIAL_PAUSE
        if self._choose_length(rate, DRAFT_LENGTHS[0]) == 0:
            draft_state.paused_tokens_left = draft_state.pause
            draft_state.pause = min(2 * draft_state.pause, MAX_PAUSE)
            rate = max(rate, PRIOR_ACCEPT_RATE / 2)  # so that it is tried again later
        draft_state.accept_rate = rate

    def _record_time(self, tokens: int, elapsed_s: float) -> None:
        """Record the time of a pass. The first pass of a size also allocates memory, and is not counted."""
        if tokens not in self._measured_sizes:
            self._measured_sizes.add(tokens)
            return
        for other in self._pass_time_s:
            self._pass_time_s[other] *= PASS_TIME_DECAY
        known = self._pass_time_s.get(tokens, elapsed_s)
        self._pass_time_s[tokens] = EMA_DECAY * known + (1 - EMA_DECAY) * elapsed_s

    def _choose_length(self, rate: float, max_tokens: int) -> int:
        """Return the number of draft tokens that gives the most tokens per second; 0 for none."""
        best, best_speed = 0, 1 / self._expected_time_s(1)
        for length in DRAFT_LENGTHS:
            speed = expected_tokens(rate, length) / self._expected_time_s(length + 1)
            if length <= max_tokens and speed > best_speed:
                best, best_speed = length, speed
        return best

    def _expected_time_s(self, tokens: int) -> float:
        """Return the time of a pass. An optimistic one is assumed if it was not measured yet, so that it will be."""
        return self._pass_time_s.get(tokens, self._pass_time_s.get(1, 1.0) * (1 + PRIOR_TOKEN_COST * (tokens - 1)))


def _continuation(own: NgramIndex, earlier: NgramIndex | None, length: int) -> list[int]:
    """Return up to `length` tokens that followed the last ones in this sequence, otherwise in an earlier one.

    At the end of this sequence its tokens repeat; at the end of an earlier one the draft ends.
    """
    last = own.tokens[-NGRAM_SIZE:]
    at = own.find(last)
    if at is not None:
        found = own.tokens[at : at + length]
        return [found[i % len(found)] for i in range(length)]
    at = None if earlier is None else earlier.find(last)
    if earlier is None or at is None:
        return []
    found = earlier.tokens[at : at + length]
    return found[: found.index(SEPARATOR)] if SEPARATOR in found else found


def expected_tokens(rate: float, length: int) -> float:
    """Return the expected tokens of a pass with `length` draft tokens, each accepted with probability `rate`."""
    return length + 1.0 if rate >= 1 else (1 - rate ** (length + 1)) / (1 - rate)
