"""How often: buckets of tokens that fill with time, one for each client, as many clients as are remembered.

Pure: the time is an argument, in seconds of one clock that does not go back.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

IDLE_S: Final = 60.0
"""How long a client keeps its bucket without being seen, where others want one."""
NEWCOMERS_RATE: Final = 2.0
NEWCOMERS_BURST: Final = 32.0
"""Clients that get a bucket of their own, a second and at once."""


class TokenBucket:
    """Holds `burst` tokens at most and gains `rate` of them a second; full at first."""

    __slots__ = ("_at", "_burst", "_level", "_rate", "seen_at")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = self._level = burst
        self._at = self.seen_at = float("-inf")

    def try_take(self, now: float, cost: float = 1.0) -> bool:
        """Take `cost` tokens and return True, or return False where there are not so many.

        What costs more than a full bucket holds takes a full one.
        """
        if self._fill(now) < min(cost, self._burst):
            return False
        self._level -= min(cost, self._burst)
        return True

    def wait_s(self, now: float, cost: float = 1.0) -> float:
        """Return in how many seconds there will be `cost` tokens."""
        return max(0.0, min(cost, self._burst) - self._fill(now)) / self._rate

    def _fill(self, now: float) -> float:
        if now > self._at:
            if self._at != float("-inf"):
                self._level = min(self._burst, self._level + (now - self._at) * self._rate)
            self._at = now
        return self._level


class ClientRateLimits:
    """A bucket for each of `most` clients; all others share one.

    Names cost nothing where no broker's ACL vouches for them. So a name gets a bucket of its own only while there is
    room, few of them a second, and keeps it until it was not seen for `IDLE_S`: who comes with a new name each time, or
    with a thousand, takes nothing from the buckets of those who were there before. Those who take care that their
    messages arrive (QoS 1) do not share with those who do not.
    """

    def __init__(self, rate: float, burst: float, most: int = 64) -> None:
        self._rate = rate
        self._burst = burst
        self._most = most
        self._buckets: OrderedDict[str | None, TokenBucket] = OrderedDict()
        """The one of the client that was not seen for longest first."""
        self._shared = {is_qos1: TokenBucket(rate, burst) for is_qos1 in (False, True)}
        self._newcomers = TokenBucket(NEWCOMERS_RATE, NEWCOMERS_BURST)

    def __len__(self) -> int:
        """Return how many clients have a bucket of their own."""
        return len(self._buckets)

    def knows(self, client: str | None) -> bool:
        """Whether a client has a bucket of its own."""
        return client in self._buckets

    def try_take(self, client: str | None, now: float, cost: float = 1.0, *, is_qos1: bool = False) -> bool:
        """Whether a client may send something of that cost now; counts it where it may."""
        bucket = self._buckets.get(client)
        if bucket is None:
            if not self._shared[is_qos1].try_take(now, cost):
                return False
            if self._has_room(now) and self._newcomers.try_take(now):
                bucket = self._buckets[client] = TokenBucket(self._rate, self._burst)
                bucket.seen_at = now
                bucket.try_take(now, cost)
            return True
        self._buckets.move_to_end(client)
        bucket.seen_at = now
        return bucket.try_take(now, cost)

    def wait_s(self, client: str | None, now: float) -> float:
        """Return in how many seconds a client may send again."""
        return self._buckets.get(client, self._shared[True]).wait_s(now)

    def _has_room(self, now: float) -> bool:
        """Whether one more client may have a bucket; forgets one that was not seen for long."""
        if len(self._buckets) < self._most:
            return True
        oldest = next(iter(self._buckets))
        if now - self._buckets[oldest].seen_at < IDLE_S:
            return False
        del self._buckets[oldest]
        return True
