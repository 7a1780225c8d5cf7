"""Queue of rejections to send: limited in rate and length, served in turn between clients. Used from one thread.

A client that waits for each response before its next request gets every rejection, only later. For a client that does
not wait, rejections beyond the limits are dropped.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Final

from edgelm.engine.fairness import FairQueue
from edgelm.mqtt.packets import Packet
from edgelm.mqtt.rate_limit import TokenBucket

RATE: Final = 20.0
"""Rejections a second to one client."""
ALL_RATE: Final = 100.0
"""The same to all clients together."""
MAX_WAITING: Final = 100
"""Waiting rejections to one client."""
CROWDED_AT: Final = 200
"""Waiting rejections in all, from which on each client may have one."""
MAX_ALL_WAITING: Final = 400
"""Waiting rejections in all: about 1 MB, since a response topic has up to 256 bytes and correlation data 1 KiB."""
MAX_BUCKETS: Final = 1024
POLL_INTERVAL_S: Final = 0.02


class RejectionQueue:
    """Holds rejections until they may be sent."""

    def __init__(self) -> None:
        self._waiting: FairQueue[tuple[str | None, Packet]] = FairQueue()
        self._counts: Counter[str | None] = Counter()
        self._buckets: OrderedDict[str | None, TokenBucket] = OrderedDict()
        self._all = TokenBucket(ALL_RATE, ALL_RATE)

    def __len__(self) -> int:
        """Return the number of waiting rejections."""
        return len(self._waiting)

    def add(self, client: str | None, packet: Packet) -> bool:
        """Queue a rejection and return True, or return False if too many wait and it is dropped."""
        max_waiting = MAX_WAITING if len(self._waiting) < CROWDED_AT else 1
        if len(self._waiting) >= MAX_ALL_WAITING or self._counts.get(client, 0) >= max_waiting:
            return False
        self._counts[client] += 1
        self._waiting.put(client, (client, packet))
        return True

    def take(self, now: float, max_count: int) -> list[Packet]:
        """Remove and return the rejections to send now, at most `max_count`."""
        due: list[Packet] = []
        early: list[tuple[str | None, Packet]] = []
        blocked: set[str | None] = set()
        while len(self._waiting) and len(due) < max_count and self._all.wait_s(now) == 0:
            client, packet = self._waiting.get()
            if client in blocked or not self._bucket(client).try_take(now):
                blocked.add(client)
                early.append((client, packet))
                continue
            self._all.try_take(now)
            due.append(packet)
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]
        rest = [self._waiting.get() for _ in range(len(self._waiting))] if early else []
        for client, packet in [*early, *rest]:
            self._waiting.put(client, (client, packet))
        return due

    def _bucket(self, client: str | None) -> TokenBucket:
        """Return the client's bucket; remove the least recently used one if there are too many."""
        bucket = self._buckets.pop(client, None) or TokenBucket(RATE, RATE)
        self._buckets[client] = bucket
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return bucket

    def next_due(self, now: float) -> float:
        """Return when to call `take` next, in the clock of `now`; infinity if no rejection waits."""
        return now + POLL_INTERVAL_S if len(self._waiting) else float("inf")
