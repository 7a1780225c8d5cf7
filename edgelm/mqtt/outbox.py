"""Queue of packets of QoS 1: sent in order, with at most the broker's Receive Maximum in flight. Used from one thread.

paho ignores the broker's Receive Maximum and does not count the packets that it keeps over a lost connection.
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

MakeSubstitute = Callable[[str], Packet | None]
"""Receives the reason why a packet cannot be sent; returns the packet to send instead, or None."""


@dataclass(frozen=True, slots=True)
class _Entry:
    packet: Packet
    make_substitute: MakeSubstitute | None


class Outbox:
    """Sends packets of QoS 1 while the connection is up, and holds them while it is down."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[_Entry] = deque()
        self._in_flight: dict[int, _Entry] = {}
        self._window = 0

    def __len__(self) -> int:
        """Return the number of packets that the broker has not acknowledged."""
        return len(self._waiting) + len(self._in_flight)

    def send(self, packet: Packet, make_substitute: MakeSubstitute | None = None) -> None:
        """Publish now or later. `make_substitute` returns a substitute for a packet beyond the broker's size limit."""
        self._waiting.append(_Entry(packet, make_substitute))
        self._pump()

    def on_connected(self, event: Connected) -> None:
        """Continue after a reconnect: paho sends packets in flight again, unless the paho client is new."""
        self._window = event.limits.in_flight
        if event.is_new:
            self._waiting.extendleft(reversed(self._in_flight.values()))
            self._in_flight.clear()
        self._pump()

    def on_published(self, event: Published) -> None:
        """Record an acknowledgement and send the next packet."""
        entry = self._in_flight.pop(event.mid, None)
        if entry is None:  # a packet of QoS 0
            return
        if event.reason >= 0x80:
            log.warning("the broker refused a message to %s (reason code %d)", entry.packet.topic, event.reason)
        self._pump()
        if not self._in_flight:
            self._connection.stop_reporting_published()

    def _pump(self) -> None:
        while self._waiting and len(self._in_flight) < self._window:
            entry = self._waiting[0]
            try:
                handle = self._connection.publish(entry.packet)
            except PacketTooLargeError as error:
                self._waiting.popleft()
                log.warning("cannot publish on %s: %s", entry.packet.topic, error)
                substitute = entry.make_substitute(str(error)) if entry.make_substitute else None
                if substitute is not None:
                    self._waiting.appendleft(_Entry(substitute, None))
                continue
            if handle is None:
                return
            self._waiting.popleft()
            self._in_flight[handle.mid] = entry
