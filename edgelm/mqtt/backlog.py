"""How much that has arrived its owner has not settled yet."""

from __future__ import annotations

import threading


class Backlog:
    """Bytes of messages on their way from paho's thread to the owner's, bounded where the protocol allows it.

    Parameters
    ----------
    limit
        Bytes beyond which messages of QoS 0 are dropped, as QoS 0 allows (MQTT 5.0, section 4.3.1). Those of
        QoS 1 are bounded by the Receive Maximum.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting = 0
        self._lock = threading.Lock()

    def takes(self, size: int, qos: int) -> bool:
        """Count a message of `size` bytes and return True, or return False where it is to be dropped."""
        with self._lock:
            if qos == 0 and self._waiting + size > self._limit:
                return False
            self._waiting += size
            return True

    def settle(self, size: int) -> None:
        """Free the place of a message that was taken."""
        with self._lock:
            self._waiting -= size
