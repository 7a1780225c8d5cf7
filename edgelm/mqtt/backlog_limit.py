"""Limit of the backlog: received bytes that are not acknowledged yet, for each client and in all."""

from __future__ import annotations

import threading
from typing import Final

MESSAGE_BYTES: Final = 2048
"""Memory of a message beside its payload: 1.6 KB were measured with a topic of 30 bytes and empty properties."""


class BacklogLimit:
    """Counts the backlog and rejects messages of QoS 0 beyond a limit. Thread-safe.

    Parameters
    ----------
    limit_bytes
        Bytes beyond which messages of QoS 0 are dropped, as QoS 0 allows (MQTT 5.0, section 4.3.1). Messages of
        QoS 1 are always counted: Receive Maximum times Maximum Packet Size bounds them.
    client_limit_bytes
        The same limit for one client, so that its messages do not displace others'; None means `limit_bytes`.
    """

    def __init__(self, limit_bytes: int, client_limit_bytes: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._client_limit_bytes = limit_bytes if client_limit_bytes is None else client_limit_bytes
        self._total_bytes = 0
        self._client_bytes: dict[str | None, int] = {}
        """Backlog of each client that has one."""
        self._lock = threading.Lock()

    def try_add(self, size: int, qos: int, client: str | None = None) -> bool:
        """Count a message of `size` bytes and return True, or return False if it must be dropped."""
        with self._lock:
            mine = self._client_bytes.get(client, 0) + size
            if qos == 0 and (self._total_bytes + size > self._limit_bytes or mine > self._client_limit_bytes):
                return False
            self._total_bytes += size
            self._client_bytes[client] = mine
            return True

    def has_messages(self, client: str | None) -> bool:
        """Return whether the client has a backlog."""
        with self._lock:
            return client in self._client_bytes

    def release(self, size: int, client: str | None = None) -> None:
        """Subtract a message that `try_add` counted."""
        with self._lock:
            self._total_bytes -= size
            left = self._client_bytes.pop(client, 0) - size
            if left > 0:
                self._client_bytes[client] = left
