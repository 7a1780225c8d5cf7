"""The retained `info` and `status` of a board: published, and published again if another client overwrites them.

Owns these packets, the last will included. Does not know the connection.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from edgelm.mqtt.connection_events import Received
from edgelm.mqtt.inbound_policy import InboundPolicy
from edgelm.mqtt.outbox import Outbox
from edgelm.mqtt.packets import Packet, Properties, write_json
from edgelm.mqtt.topics import BoardTopics

log = logging.getLogger(__name__)

REPUBLISH_INTERVAL_S: Final = 1.0
"""Least time between two corrections of overwritten messages."""


class Announcement:
    """The retained messages that describe one board.

    Parameters
    ----------
    topics
        Topics of the board.
    boot_id
        Id of this run of the service.
    policy
        Reports messages on the board's own topics that it dropped.
    """

    def __init__(self, topics: BoardTopics, boot_id: str, policy: InboundPolicy) -> None:
        self._topics = topics
        self._boot_id = boot_id
        self._policy = policy
        self._packets: tuple[Packet, ...] = ()
        """The packets as published last."""
        self._is_overwritten = self._has_warned = False
        self._republished_at = float("-inf")

    @property
    def watched_topics(self) -> tuple[str, ...]:
        """The topics of the announcement; the board subscribes to them to notice other publishers."""
        return (self._topics.status, self._topics.info)

    def make_last_will(self) -> Packet:
        """Return the packet that the broker publishes if the connection is lost: `offline`."""
        return self.make_status("offline")

    def make_status(self, status: str) -> Packet:
        """Return the packet for `online` or `offline`."""
        properties = Properties(is_text=True, user=(("boot_id", self._boot_id),))
        return Packet(self._topics.status, status.encode(), qos=1, retain=True, properties=properties)

    def publish(self, outbox: Outbox, info: Mapping[str, Any]) -> None:
        """Publish `info`, then `online`."""
        self._packets = (Packet(self._topics.info, write_json(info), qos=1, retain=True), self.make_status("online"))
        self._send(outbox)
        self._policy.pop_own_dropped()

    def on_received(self, event: Received, *, is_mqtt5: bool) -> None:
        """Record that another client published on one of `watched_topics`.

        Over MQTT 3.1.1 the message may be the board's own: then its payload is the published one.
        """
        published = {packet.topic: packet.payload for packet in self._packets}
        if is_mqtt5 or event.payload != published.get(event.topic, event.payload):
            self._is_overwritten = True

    def republish_if_overwritten(self, outbox: Outbox) -> None:
        """Publish the announcement again if another client overwrote it, at most once in `REPUBLISH_INTERVAL_S`."""
        self._is_overwritten |= self._policy.pop_own_dropped()  # a dropped message may have overwritten it
        now = time.monotonic()
        if not self._is_overwritten or not self._packets or now - self._republished_at < REPUBLISH_INTERVAL_S:
            return
        self._republished_at = now
        self._send(outbox)
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "another client publishes on %s or %s: published them again, and will do so without further warning."
                " Forbid it in the broker's ACL; if it is another board of the same name, set --board NAME there",
                *self.watched_topics,
            )

    def _send(self, outbox: Outbox) -> None:
        self._is_overwritten = False
        for packet in self._packets:
            outbox.send(packet)
