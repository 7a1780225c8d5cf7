"""Fair order between clients: many items of one client do not delay an item of another.

Knows names and items, neither requests nor threads.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Limits of one client in one engine; None is no limit.

    Parameters
    ----------
    rows
        Requests decoded at the same time, at least 1.
    sessions
        Number of sessions; a further one replaces the client's least recently used one.
    session_bytes
        Bytes of a session's messages, text and tokens. A request that would exceed them is refused.
    all_sessions_bytes
        The same for the sessions of all clients. The client that holds most loses its least recently used one.
    """

    rows: int | None = None
    sessions: int | None = None
    session_bytes: int | None = None
    all_sessions_bytes: int | None = None


NO_CLIENT_LIMITS: Final = ClientLimits()
"""No limits: for a model inside a program, where all requests are its own."""


class FairQueue(Generic[Item]):
    """A queue of named items, in round-robin order between names and first-in-first-out for each name."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        """Return the number of items."""
        return self._count

    def put(self, name: Hashable, item: Item) -> None:
        """Add an item; a name without items gets its turn after the others."""
        self._waiting.setdefault(name, deque()).append(item)
        self._count += 1

    def get(self) -> Item:
        """Remove and return the next item. Raises `IndexError` if the queue is empty."""
        if not self._waiting:
            raise IndexError("the queue is empty")
        name, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[name] = items
        self._count -= 1
        return item


class FairnessPolicy:
    """Chooses the name with the fewest running items, among equals the least recently served; then its oldest item.

    Parameters
    ----------
    max_running
        Maximum number of running items of one name; None is no limit.
    """

    def __init__(self, max_running: int | None = None) -> None:
        self._max_running = max_running
        self._served: OrderedDict[Hashable, None] = OrderedDict()
        """Names that were served, the least recently served first."""

    def choose(
        self, waiting: Iterable[Item], running: Iterable[Hashable], name_of: Callable[[Item], Hashable]
    ) -> Item | None:
        """Return the next of the waiting items; None if none of them may start.

        Parameters
        ----------
        waiting
            Items that could start, the oldest first.
        running
            The name of each running item.
        name_of
            Returns the name of an item.
        """
        counts: dict[Hashable, int] = {}
        for name in running:
            counts[name] = counts.get(name, 0) + 1
        ranks = {name: rank for rank, name in enumerate(self._served, 1)}
        best, best_key = None, (0, 0)
        for item in waiting:
            name = name_of(item)
            count = counts.get(name, 0)
            if self._max_running is not None and count >= self._max_running:
                continue
            key = (count, ranks.get(name, 0))
            if best is None or key < best_key:
                best, best_key = item, key
        return best

    def record_served(self, name: Hashable, waiting: Iterable[Hashable]) -> None:
        """Record that an item of `name` starts. Names that are not in `waiting` are removed from the record."""
        waiting_names = set(waiting)
        self._served.pop(name, None)
        for other in [known for known in self._served if known not in waiting_names]:
            del self._served[other]
        self._served[name] = None
