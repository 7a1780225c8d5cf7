"""Which version of MQTT a broker is greeted with: 5, or 3.1.1 where it knows no other.

A broker of 3.1.1 may refuse 5, close the connection at its greeting, or misread it and wait for more. One that has
accepted a version keeps it, so that a broker which goes away in mid-greeting is not taken for an old one.
"""

from __future__ import annotations

import logging
import time
from typing import Final, Literal

log = logging.getLogger(__name__)

ANSWER_WITHIN_S: Final = 3.0
CHANGE_EVERY_S: Final = 2.0
"""A broker that closes the connection at either greeting is not asked again at once, but when paho would."""

MqttVersion = Literal["5", "3.1.1"]


class VersionNegotiation:
    """The version in use, and whether it should be the other one."""

    def __init__(self, version: MqttVersion) -> None:
        self.version: MqttVersion = version
        self.needs_reconnect = False
        """The version was changed; what speaks the former one must go."""
        self._sent_at: float | None = None
        self._changed_at = float("-inf")
        self._has_met = False

    def send(self) -> None:
        """Note that the greeting goes out."""
        self._sent_at = time.monotonic()

    def accept(self) -> None:
        """Note that the broker speaks this version."""
        self._sent_at, self._has_met = None, True

    def refuse(self, *, for_version: bool) -> bool:
        """Note that the broker answered no; return whether the version was changed."""
        self._sent_at = None
        if not for_version or self.version != "5":
            return False
        self._has_met = False
        return self._change("it refused that version")

    def close(self) -> bool:
        """Note that the connection closed; return whether that was for the greeting, and the version was changed."""
        sent_at, self._sent_at = self._sent_at, None
        return sent_at is not None and self._change("it closed the connection at the greeting")

    def check_time(self) -> None:
        """Change the version where the broker gave no answer in time."""
        if self._sent_at is not None and time.monotonic() - self._sent_at > ANSWER_WITHIN_S:
            self._sent_at = None
            self._change("it gave no answer to the greeting")

    def _change(self, why: str) -> bool:
        now = time.monotonic()
        if self._has_met or self.needs_reconnect or now - self._changed_at < CHANGE_EVERY_S:
            return False
        self._changed_at = now
        former = self.version
        self.version = "3.1.1" if former == "5" else "5"
        self.needs_reconnect = True
        log.info("greeted the broker with MQTT %s: %s; trying %s", former, why, self.version)
        return True
