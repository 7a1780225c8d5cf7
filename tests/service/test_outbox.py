"""The outbox: packets of QoS 1 arrive in order, with a limited number in flight, also after a lost connection."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from broker import Broker
from mqtt_client import Client

from edgelm.mqtt.broker_config import BrokerConfig, BrokerUrl
from edgelm.mqtt.connection import Connection
from edgelm.mqtt.connection_events import Connected, Event, MaintenanceNeeded, PacketTooLargeError, Published
from edgelm.mqtt.outbox import Outbox
from edgelm.mqtt.packets import Packet

PATIENCE_S = 40.0
WINDOW = 3


class Sender:
    """A connection and its outbox; the test handles its events one by one."""

    def __init__(self, broker: Broker) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        self.connection = Connection(BrokerConfig(url=BrokerUrl.parse(broker.url)), "sender", self._events.put)
        self.outbox = Outbox(self.connection)

    def handle(self) -> Event:
        """Wait for an event and pass it to the outbox."""
        event = self._events.get(timeout=PATIENCE_S)
        if isinstance(event, Connected):
            self.outbox.on_connected(event)
        elif isinstance(event, Published):
            self.outbox.on_published(event)
        elif isinstance(event, MaintenanceNeeded):
            self.connection.maintain()
        return event

    def connect(self) -> Connected:
        """Handle events until `Connected`."""
        while not isinstance(event := self.handle(), Connected):
            pass
        return event


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path, f"max_inflight_messages {WINDOW}", "max_packet_size 2000").start()
    yield broker
    broker.stop()


@pytest.fixture
def sender(narrow: Broker) -> Iterator[Sender]:
    made = Sender(narrow)
    made.connection.start()
    yield made
    made.connection.stop()


def test_packets_in_flight_are_limited_to_the_brokers_receive_maximum(narrow: Broker, sender: Sender) -> None:
    with Client(narrow.port, "many") as client:
        sender.outbox.send(Packet("many", b"0", qos=1))  # before the connection
        event = sender.connect()
        assert (event.limits.in_flight, event.limits.packet_bytes) == (WINDOW, 2000)
        for number in range(1, 50):
            sender.outbox.send(Packet("many", b"%d" % number, qos=1))
        assert len(sender.outbox) == 50
        while len(sender.outbox):
            assert len(sender.outbox._in_flight) <= WINDOW
            sender.handle()
        client.wait(lambda heard: len(heard) == 50)
        assert [int(message.payload) for message in client.heard] == list(range(50))


def test_a_too_large_packet_is_replaced_or_dropped(narrow: Broker, sender: Sender) -> None:
    with Client(narrow.port, "sizes") as client:
        sender.connect()
        large = Packet("sizes", b"x" * 3000, qos=1)
        with pytest.raises(PacketTooLargeError, match="2000"):
            sender.connection.publish(large)
        sender.outbox.send(large, lambda why: Packet("sizes", why.encode(), qos=1))
        sender.outbox.send(large)
        sender.outbox.send(Packet("sizes", b"last", qos=1))
        client.wait(lambda heard: heard[-1:] and heard[-1].payload == b"last")
        assert [b"2000" in message.payload for message in client.heard] == [True, False]


def test_packets_in_flight_are_sent_again_after_a_lost_connection(narrow: Broker, sender: Sender) -> None:
    sender.connect()
    narrow.kill()
    for number in range(10):
        sender.outbox.send(Packet("again", b"%d" % number, qos=1, retain=number == 9))
    narrow.start()
    until = time.monotonic() + PATIENCE_S
    while len(sender.outbox):
        assert time.monotonic() < until
        sender.handle()
    with Client(narrow.port, "again") as client:
        client.wait(lambda heard: heard)
        assert client.heard[0].payload == b"9"
