"""Turns between those who wait: whose is next, so that many of one never keep one of another waiting.

Knows names and what waits under them, neither requests nor threads.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """What one client may have of an engine at a time; None is as much as there is.

    Parameters
    ----------
    rows
        Requests that are decoded at once, at least 1.
    sessions
        Sessions that are kept; one more takes the place of its own that was used longest ago.
    session_bytes
        Bytes of a session's messages, text and tokens. A request that would exceed them is refused.
    all_sessions_bytes
        The same for all clients' sessions together. Who holds most loses what it used longest ago.
    """

    rows: int | None = None
    sessions: int | None = None
    session_bytes: int | None = None
    all_sessions_bytes: int | None = None


NO_CLIENT_LIMITS: Final = ClientLimits()
"""Whoever comes may have all: a model within a program of one's own."""


class FairQueue(Generic[Item]):
    """Items that wait under names, in turns: each name's oldest, one of every name before the next of the same."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        """Return how many items wait."""
        return self._count

    def put(self, name: Hashable, item: Item) -> None:
        """Add an item; a name that has none waiting comes behind the others."""
        self._waiting.setdefault(name, deque()).append(item)
        self._count += 1

    def get(self) -> Item:
        """Return the next item. Raises `IndexError` where none waits."""
        if not self._waiting:
            raise IndexError("nothing waits")
        name, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[name] = items
        self._count -= 1
        return item


class FairnessPolicy:
    """Whose is next: the name with the fewest running, of equals the one served longest ago; then its oldest request.

    Parameters
    ----------
    most
        How many of one name may run at a time; None is as many as there are.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._served: OrderedDict[Hashable, None] = OrderedDict()
        """Names that were served, the one of longest ago first."""

    def choose(
        self, waiting: Iterable[Item], running: Iterable[Hashable], name_of: Callable[[Item], Hashable]
    ) -> Item | None:
        """Return which of `waiting`, the oldest first, is next; None where none may begin.

        Parameters
        ----------
        waiting
            Those that could begin, the oldest first.
        running
            The names of those that run, one for each.
        name_of
            Returns an item's name.
        """
        counts: dict[Hashable, int] = {}
        for name in running:
            counts[name] = counts.get(name, 0) + 1
        ranks = {name: rank for rank, name in enumerate(self._served, 1)}
        best, least = None, (0, 0)
        for item in waiting:
            name = name_of(item)
            count = counts.get(name, 0)
            if self._most is not None and count >= self._most:
                continue
            key = (count, ranks.get(name, 0))
            if best is None or key < least:
                best, least = item, key
        return best

    def record_served(self, name: Hashable, waiting: Iterable[Hashable]) -> None:
        """Note that a request of `name` begins while others of the names `waiting` wait; other names are forgotten."""
        kept = set(waiting)
        self._served.pop(name, None)
        for other in [known for known in self._served if known not in kept]:
            del self._served[other]
        self._served[name] = None
