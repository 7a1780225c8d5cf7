"""Refusals on their way out: at a bounded rate, a bounded number waiting, in turns between clients.

A client that waits for each answer before it asks again is slowed down and hears every refusal; one that does not is
told so much and no more. Called from one thread.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Final

from edgelm.engine.fairness import FairQueue
from edgelm.mqtt.packets import Packet
from edgelm.mqtt.rate_limit import TokenBucket

RATE: Final = 20.0
"""Refusals a second to one client."""
ALL_RATE: Final = 100.0
"""The same to all clients together."""
MOST_WAITING: Final = 100
"""Refusals to one client that wait."""
ALL_WAITING: Final = 200
"""The same to all clients together, beyond which each may have one."""
MOST_OF_ALL: Final = 400
"""Beyond it nobody may: some 1 MB, as a reply topic has 256 bytes and correlation data 1 KB."""
MOST_BUCKETS: Final = 1024
POLL_S: Final = 0.02


class RejectionQueue:
    """What clients are refused with, until it is sent."""

    def __init__(self) -> None:
        self._waiting: FairQueue[tuple[str | None, Packet]] = FairQueue()
        self._of: Counter[str | None] = Counter()
        self._buckets: OrderedDict[str | None, TokenBucket] = OrderedDict()
        self._all = TokenBucket(ALL_RATE, ALL_RATE)

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def add(self, client: str | None, packet: Packet) -> bool:
        """Keep a refusal until its time has come; return False where too many wait, and it is dropped."""
        most = MOST_WAITING if len(self._waiting) < ALL_WAITING else 1
        if len(self._waiting) >= MOST_OF_ALL or self._of.get(client, 0) >= most:
            return False
        self._of[client] += 1
        self._waiting.put(client, (client, packet))
        return True

    def take(self, now: float, most: int) -> list[Packet]:
        """Return those that are to be sent now, at most so many."""
        due: list[Packet] = []
        early: list[tuple[str | None, Packet]] = []
        blocked: set[str | None] = set()
        while len(self._waiting) and len(due) < most and self._all.wait_s(now) == 0:
            client, packet = self._waiting.get()
            if client in blocked or not self._bucket(client).try_take(now):
                blocked.add(client)
                early.append((client, packet))
                continue
            self._all.try_take(now)
            due.append(packet)
            self._of[client] -= 1
            if not self._of[client]:
                del self._of[client]
        rest = [self._waiting.get() for _ in range(len(self._waiting))] if early else []
        for client, packet in [*early, *rest]:
            self._waiting.put(client, (client, packet))
        return due

    def _bucket(self, client: str | None) -> TokenBucket:
        """Return a client's bucket; the one that was used longest ago is forgotten where there are too many."""
        bucket = self._buckets.pop(client, None) or TokenBucket(RATE, RATE)
        self._buckets[client] = bucket
        if len(self._buckets) > MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return bucket

    def next_due(self, now: float) -> float:
        """When `take` may have something, in the seconds of `now`; infinite where none waits."""
        return now + POLL_S if len(self._waiting) else float("inf")
