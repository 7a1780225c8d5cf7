"""How much that has arrived its owner has not settled yet, for each client."""

from __future__ import annotations

import threading
from typing import Final

MESSAGE_BYTES: Final = 2048
"""What a message takes beside its bytes: 1.6 KB were measured for one with a topic of 30 bytes and empty properties."""


class BacklogLimit:
    """Bytes of messages on their way from paho's thread to the owner's, bounded where the protocol allows it.

    Parameters
    ----------
    limit
        Bytes beyond which messages of QoS 0 are dropped, as QoS 0 allows (MQTT 5.0, section 4.3.1). Those of
        QoS 1 are bounded by the Receive Maximum times the Maximum Packet Size.
    share
        The same for one client, so that its messages push out no other's; None is all.
    """

    def __init__(self, limit: int, client_limit_bytes: int | None = None) -> None:
        self._limit = limit
        self._share = limit if client_limit_bytes is None else client_limit_bytes
        self._waiting = 0
        self._of: dict[str | None, int] = {}
        """For each client that has any; no other is remembered."""
        self._lock = threading.Lock()

    def try_add(self, size: int, qos: int, client: str | None = None) -> bool:
        """Count a client's message of `size` bytes and return True, or return False where it is to be dropped."""
        with self._lock:
            mine = self._of.get(client, 0) + size
            if qos == 0 and (self._waiting + size > self._limit or mine > self._share):
                return False
            self._waiting += size
            self._of[client] = mine
            return True

    def has_messages(self, client: str | None) -> bool:
        """Whether something of a client waits."""
        with self._lock:
            return client in self._of

    def release(self, size: int, client: str | None = None) -> None:
        """Free the place of a message that was taken."""
        with self._lock:
            self._waiting -= size
            left = self._of.pop(client, 0) - size
            if left > 0:
                self._of[client] = left
