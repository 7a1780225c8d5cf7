"""Choice of the MQTT version: 5, or 3.1.1 if the broker does not support 5. Does not import paho.

A 3.1.1 broker may refuse a CONNECT of MQTT 5, close the connection, or not answer. Once a broker has accepted a
version, that version is kept, so a broker that goes away during a CONNECT is not taken for an older one.
"""

from __future__ import annotations

import logging
import time
from typing import Final, Literal

log = logging.getLogger(__name__)

CONNACK_TIMEOUT_S: Final = 3.0
CHANGE_INTERVAL_S: Final = 2.0
"""Least time between two changes. A broker that closes both versions' connections is retried at paho's intervals."""

MqttVersion = Literal["5", "3.1.1"]


class VersionNegotiation:
    """State machine of the MQTT version. The connection reports its events to the `on_` methods."""

    def __init__(self, version: MqttVersion) -> None:
        self.version: MqttVersion = version
        self._needs_reconnect = False
        """The version was changed and the paho client still uses the former one."""
        self._sent_at: float | None = None
        self._changed_at = float("-inf")
        self._is_accepted = False

    @property
    def needs_reconnect(self) -> bool:
        """Whether the version was changed since the last `on_reconnect`."""
        return self._needs_reconnect

    def on_reconnect(self) -> None:
        """Record that a new paho client uses the current version."""
        self._needs_reconnect = False

    def on_connect_sent(self) -> None:
        """Record that a CONNECT is sent."""
        self._sent_at = time.monotonic()

    def on_accepted(self) -> None:
        """Record that the broker accepted the current version."""
        self._sent_at, self._is_accepted = None, True

    def on_refused(self, *, for_version: bool) -> bool:
        """Record a refusing CONNACK; return whether the version was changed."""
        self._sent_at = None
        if not for_version or self.version != "5":
            return False
        self._is_accepted = False
        return self._change("the broker refused that version")

    def on_closed(self) -> bool:
        """Record that the connection was closed; return whether the version was changed.

        The version is changed if the broker had not answered the CONNECT.
        """
        sent_at, self._sent_at = self._sent_at, None
        return sent_at is not None and self._change("the broker closed the connection")

    def check_time(self) -> None:
        """Change the version if the broker did not answer a CONNECT within `CONNACK_TIMEOUT_S`."""
        if self._sent_at is not None and time.monotonic() - self._sent_at > CONNACK_TIMEOUT_S:
            self._sent_at = None
            self._change("the broker did not answer")

    def _change(self, why: str) -> bool:
        now = time.monotonic()
        if self._is_accepted or self._needs_reconnect or now - self._changed_at < CHANGE_INTERVAL_S:
            return False
        self._changed_at = now
        former = self.version
        self.version = "3.1.1" if former == "5" else "5"
        self._needs_reconnect = True
        log.info("connecting with MQTT %s failed: %s; trying MQTT %s", former, why, self.version)
        return True
