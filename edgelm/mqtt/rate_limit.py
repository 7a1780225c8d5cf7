"""Rate limits: token buckets, one for each client.

Reads no clock: `now` is an argument, in seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

IDLE_S: Final = 60.0
"""A client that was idle for this long may lose its bucket to another client."""
NEW_CLIENTS_RATE: Final = 2.0
NEW_CLIENTS_BURST: Final = 32.0
"""Clients that get an own bucket: rate per second, and burst."""


class TokenBucket:
    """Holds at most `burst` tokens and gains `rate` tokens a second; full at first."""

    __slots__ = ("_burst", "_filled_at", "_level", "_rate", "seen_at")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = self._level = burst
        self._filled_at = self.seen_at = float("-inf")

    def try_take(self, now: float, cost: float = 1.0) -> bool:
        """Take `cost` tokens and return True, or return False if there are fewer.

        A cost above `burst` counts as `burst`.
        """
        if self._fill(now) < min(cost, self._burst):
            return False
        self._level -= min(cost, self._burst)
        return True

    def wait_s(self, now: float, cost: float = 1.0) -> float:
        """Return the seconds until there are `cost` tokens."""
        return max(0.0, min(cost, self._burst) - self._fill(now)) / self._rate

    def _fill(self, now: float) -> float:
        if now > self._filled_at:
            if self._filled_at != float("-inf"):
                self._level = min(self._burst, self._level + (now - self._filled_at) * self._rate)
            self._filled_at = now
        return self._level


class ClientRateLimits:
    """One bucket for each of at most `max_clients` clients; the others share two buckets, one for each QoS.

    Without an ACL at the broker a client can use any number of names. So few new names a second get an own bucket,
    only while there is room, and keep it until they were idle for `IDLE_S`: a client with many names takes nothing
    from the buckets of clients that were there before. QoS 0 and QoS 1 do not share a bucket, so that a flood at QoS 0
    does not delay clients that use QoS 1.
    """

    def __init__(self, rate: float, burst: float, max_clients: int = 64) -> None:
        self._rate = rate
        self._burst = burst
        self._max_clients = max_clients
        self._buckets: OrderedDict[str | None, TokenBucket] = OrderedDict()
        """Ordered from the least to the most recently seen client."""
        self._shared = {is_qos1: TokenBucket(rate, burst) for is_qos1 in (False, True)}
        self._new_clients = TokenBucket(NEW_CLIENTS_RATE, NEW_CLIENTS_BURST)

    def __len__(self) -> int:
        """Return how many clients have an own bucket."""
        return len(self._buckets)

    def has_bucket(self, client: str | None) -> bool:
        """Return whether the client has an own bucket."""
        return client in self._buckets

    def try_take(self, client: str | None, now: float, cost: float = 1.0, *, is_qos1: bool = False) -> bool:
        """Take `cost` tokens for the client and return True, or return False if it may not send now."""
        bucket = self._buckets.get(client)
        if bucket is None:
            if not self._shared[is_qos1].try_take(now, cost):
                return False
            if self._has_room(now) and self._new_clients.try_take(now):
                bucket = self._buckets[client] = TokenBucket(self._rate, self._burst)
                bucket.seen_at = now
                bucket.try_take(now, cost)
            return True
        self._buckets.move_to_end(client)
        bucket.seen_at = now
        return bucket.try_take(now, cost)

    def wait_s(self, client: str | None, now: float) -> float:
        """Return the seconds until the client may send again."""
        return self._buckets.get(client, self._shared[True]).wait_s(now)

    def _has_room(self, now: float) -> bool:
        """Return whether one more client may have an own bucket; removes an idle client's if all are taken."""
        if len(self._buckets) < self._max_clients:
            return True
        oldest = next(iter(self._buckets))
        if now - self._buckets[oldest].seen_at < IDLE_S:
            return False
        del self._buckets[oldest]
        return True
