"""What is to be published and must arrive: kept in order, a bounded number under way at a time.

paho counts neither what the broker's Receive Maximum allows nor what it holds over a lost connection. Called
from one thread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edgelm.mqtt.connection import Connection
from edgelm.mqtt.connection_events import Connected, PacketTooLargeError, Published
from edgelm.mqtt.packets import Packet

log = logging.getLogger(__name__)

TooLarge = Callable[[str], Packet | None]
"""Given why a packet cannot go, returns what to send in its place."""


@dataclass(frozen=True, slots=True)
class _Entry:
    packet: Packet
    too_large: TooLarge | None


class Outbox:
    """Sends packets of QoS 1 while the connection is there, and holds them while it is not."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[_Entry] = deque()
        self._under_way: dict[int, _Entry] = {}
        self._window = 0

    def __len__(self) -> int:
        """Packets that the broker has not acknowledged."""
        return len(self._waiting) + len(self._under_way)

    def send(self, packet: Packet, too_large: TooLarge | None = None) -> None:
        """Publish now or later; `too_large` makes the substitute for a packet that the broker would not take."""
        self._waiting.append(_Entry(packet, too_large))
        self._pump()

    def on_connected(self, event: Connected) -> None:
        """Go on after a new connection: paho sends again what was under way, unless it is a new client."""
        self._window = event.limits.in_flight
        if event.is_new:
            self._waiting.extendleft(reversed(self._under_way.values()))
            self._under_way.clear()
        self._pump()

    def on_published(self, event: Published) -> None:
        """Note an acknowledgement."""
        entry = self._under_way.pop(event.mid, None)
        if entry is None:  # a message of QoS 0
            return
        if event.reason >= 0x80:
            log.warning("the broker refused a message on %s (reason %d)", entry.packet.topic, event.reason)
        self._pump()
        if not self._under_way:
            self._connection.tells_published = False

    def _pump(self) -> None:
        while self._waiting and len(self._under_way) < self._window:
            entry = self._waiting[0]
            try:
                sending = self._connection.publish(entry.packet)
            except PacketTooLargeError as error:
                self._waiting.popleft()
                log.warning("on %s: %s", entry.packet.topic, error)
                substitute = entry.too_large(str(error)) if entry.too_large else None
                if substitute is not None:
                    self._waiting.appendleft(_Entry(substitute, None))
                continue
            if sending is None:
                return
            self._waiting.popleft()
            self._under_way[sending.mid] = entry
