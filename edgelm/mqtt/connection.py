"""The connection to a broker.

Runs paho's loop thread and turns what it says into events, posted from that thread; everything else is called
from one other thread, the owner's. Knows packets, not what they mean.
"""

from __future__ import annotations

import functools
import logging
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import paho.mqtt.client as paho
from paho.mqtt.subscribeoptions import SubscribeOptions

from edgelm.errors import EdgelmError
from edgelm.mqtt.backlog_limit import MESSAGE_BYTES, BacklogLimit
from edgelm.mqtt.broker_config import BrokerConfig
from edgelm.mqtt.connection_events import (
    Connected,
    ConnectFailed,
    Disconnected,
    Event,
    Limits,
    MaintenanceNeeded,
    PacketTooLargeError,
    Published,
    Received,
    Subscribed,
)
from edgelm.mqtt.inbound_policy import BACKLOG_BYTES, InboundPolicy, PolicyDecision
from edgelm.mqtt.packet_filter import FilteredSocket, PacketFilter
from edgelm.mqtt.packets import Packet
from edgelm.mqtt.paho_client import CONNECT_TIMEOUT_S, RECONNECT_S, make_paho_client, reason_of
from edgelm.mqtt.paho_properties import from_paho, make_connect_properties, packet_bytes, to_paho
from edgelm.mqtt.version_negotiation import MqttVersion, VersionNegotiation

log = logging.getLogger(__name__)

KEEPALIVE_S: Final = 20
RECEIVE_MAXIMUM: Final = 64
"""Requests of QoS 1 that the broker may have under way to us."""
MOST_TOLD: Final = 64
"""Messages that nobody misses much which may wait for the socket; beyond it they are dropped."""
MAX_LOOP_RESTARTS: Final = 5

_PUBACK: Final = b"\x40\x02"
_UNSUPPORTED_VERSION: Final = 0x84
_TRANSIENT: Final = frozenset({0x80, 0x83, 0x88, 0x89, 0x97, 0x9C, 0x9D, 0x9F})
"""CONNACK reasons that waiting may cure."""


_Callback = TypeVar("_Callback", bound=Callable[..., None])


def log_exceptions(callback: _Callback) -> _Callback:
    """Return the callback with its exceptions logged instead of raised."""

    @functools.wraps(callback)
    def wrapped(*args: Any) -> None:
        try:
            callback(*args)
        except Exception:
            log.exception("%s failed", callback.__name__)

    return wrapped  # type: ignore[return-value]


class PublishHandle:
    """A packet handed to paho. `mid` is what its `Published` will carry."""

    __slots__ = ("_info", "mid")

    def __init__(self, info: paho.MQTTMessageInfo) -> None:
        self._info = info
        self.mid = info.mid

    @property
    def is_over(self) -> bool:
        """Whether it was written (QoS 0) or acknowledged (QoS 1), or was lost with its connection."""
        try:
            return self._info.is_published()
        except (RuntimeError, ValueError):  # how paho says that it is lost
            return True


class Connection:
    """One client at one broker, which comes back by itself.

    Parameters
    ----------
    broker
        Where, and as whom.
    client_id
        Fixed for a board, so that its session survives a short absence.
    post
        Receives every event, on paho's thread; must not block.
    will
        What the broker publishes when we are gone without a word for `will_delay_s`.
    session_expiry_s
        How long the broker keeps subscriptions and QoS 1 messages for us; 0 is a clean start.
    packet_bytes
        The largest packet to be sent to us (MQTT 5).
    gate
        Judges every message before it is parsed; None takes all, up to `BACKLOG_BYTES` that wait for the owner.
    protocol
        "5", which falls back to 3.1.1 where the broker knows no other, or "3.1.1".
    """

    def __init__(
        self,
        broker: BrokerConfig,
        client_id: str,
        post: Callable[[Event], None],
        *,
        will: Packet | None = None,
        will_delay_s: int = 0,
        session_expiry_s: int = 0,
        packet_bytes: int | None = None,
        gate: InboundPolicy | None = None,
        protocol: MqttVersion = "5",
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._post = post
        self._will = will
        self._will_delay_s = will_delay_s
        self._session_expiry_s = session_expiry_s
        self._packet_bytes = packet_bytes
        self._policy = gate
        self._negotiation = VersionNegotiation(protocol)
        self.tells_published = False
        """Whether `Published` is posted; set by a publish of QoS 1, reset by the owner when none is under way."""
        self._limits = Limits()
        self._connected = False
        self._was_announced = False
        self._is_new = True
        self._loop_restarts = 0
        self._connection_number = 0
        self._connection_number_lock = (
            threading.Lock()
        )  # never held around publish: paho calls back with its own locks held
        self._backlog = BacklogLimit(BACKLOG_BYTES)  # where there is no gate
        self._best_effort_handles: deque[PublishHandle] = deque()
        self._loop_thread: threading.Thread | None = None
        self._client = self._make_client()

    # -- the owner's side -------------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether a publish can go out now."""
        return self._connected

    @property
    def is_mqtt5(self) -> bool:
        """Whether messages carry properties."""
        return self._negotiation.version == "5"

    def start(self) -> None:
        """Begin to connect, and go on until `stop`."""
        url = self._broker.url
        properties = None
        if self.is_mqtt5:
            properties = make_connect_properties(self._session_expiry_s, RECEIVE_MAXIMUM, self._packet_bytes)
        self._client.connect_async(
            url.host,
            url.port or 1883,  # a Unix socket has none, and paho wants one
            keepalive=KEEPALIVE_S,
            clean_start=self._session_expiry_s == 0,
            properties=properties,
        )
        self._client.loop_start()

    def maintain(self) -> None:
        """Do what a callback cannot: change the version, and replace a loop thread that died. Call it now and then.

        Raises
        ------
        EdgelmError
            When the loop thread dies again and again.
        """
        self._negotiation.check_time()
        thread = self._loop_thread
        died = thread is not None and not thread.is_alive() and not self._negotiation.needs_reconnect
        if died:
            self._loop_restarts += 1
            log.error("the MQTT loop thread died; starting another (%d of %d)", self._loop_restarts, MAX_LOOP_RESTARTS)
            if self._loop_restarts > MAX_LOOP_RESTARTS:
                raise EdgelmError("the MQTT loop thread keeps dying; see the log")
        if died or self._negotiation.needs_reconnect:
            self.stop()
            self._negotiation.needs_reconnect = False
            self._is_new = True
            self._client = self._make_client()
            self.start()

    def stop(self, timeout_s: float = 2 * CONNECT_TIMEOUT_S) -> None:
        """Take leave of the broker and end the loop thread, waiting `timeout_s` at most."""
        self._client.disconnect()
        if self._loop_thread is not None:
            self._loop_thread.join(timeout_s)
        if self._loop_thread is None or not self._loop_thread.is_alive():
            self._client.loop_stop()
        self._loop_thread = None
        self._connected = False

    def set_fast_reconnect(self, is_hurried: bool) -> None:
        """Set whether a lost connection is sought again within a second, or only now and then."""
        self._client.reconnect_delay_set(*(RECONNECT_S if is_hurried else (RECONNECT_S[1], RECONNECT_S[1])))

    def subscribe(self, filters: tuple[tuple[str, int], ...], watched_topics: tuple[str, ...] = ()) -> None:
        """Ask for topics; the answer is a `Subscribed` with their reasons in this order.

        Of the topics `watched_topics` we get what others publish from now on, at QoS 0; over MQTT 3.1.1 also what is
        retained, and what we publish ourselves.
        """
        if self.is_mqtt5:
            wanted = [(topic, SubscribeOptions(qos=qos)) for topic, qos in filters]
            wanted += [(topic, SubscribeOptions(qos=0, noLocal=True, retainHandling=2)) for topic in watched_topics]
            self._client.subscribe(wanted)
        else:
            self._client.subscribe([*filters, *((topic, 0) for topic in watched_topics)])

    def publish(self, packet: Packet) -> PublishHandle | None:
        """Send a packet; return None where it cannot go now. A `Published` follows one of QoS 1.

        Raises
        ------
        PacketTooLargeError
            When the broker would not take it.
        """
        if not self._connected:
            return None
        properties = to_paho(packet.properties) if self.is_mqtt5 else None
        limit = self._limits.packet_bytes
        if limit is not None:
            size = packet_bytes(packet, properties)
            if size > limit:
                raise PacketTooLargeError(f"a packet of {size} bytes exceeds the broker's limit of {limit}")
        if packet.qos == 1:
            self.tells_published = True
        info = self._client.publish(packet.topic, packet.payload, packet.qos, packet.retain, properties)
        if packet.qos == 0 and info.rc != paho.MQTT_ERR_SUCCESS:
            return None
        return PublishHandle(info)  # QoS 1 that met a dying connection: paho sends it on the next one

    def tell(self, packet: Packet) -> None:
        """Send a packet of QoS 0 that nobody misses much; drop it where others of its kind wait for the socket."""
        while self._best_effort_handles and self._best_effort_handles[0].is_over:
            self._best_effort_handles.popleft()
        if len(self._best_effort_handles) >= MOST_TOLD:
            return
        with suppress(PacketTooLargeError):
            sending = self.publish(packet)
            if sending is not None:
                self._best_effort_handles.append(sending)

    def settle(self, received: Received) -> None:
        """Acknowledge a message, unless its connection is gone, and free its place."""
        if self._policy is None:
            self._backlog.release(received.decision.cost)
        else:
            self._policy.release(received.decision)
        if received.qos == 1:
            with self._connection_number_lock:
                if received.connection_number == self._connection_number:
                    self._client.ack(received.mid, received.qos)

    # -- paho's side: each on its loop thread -------------------------------------------------------------------

    def _make_client(self) -> paho.Client:
        client = make_paho_client(
            self._broker,
            self._client_id,
            self._negotiation.version,
            will=self._will,
            will_delay_s=self._will_delay_s,
            keeps_session=self._session_expiry_s > 0,
            wrap=None if self._policy is None else self._wrap_socket,
        )
        client.on_pre_connect = self._on_pre_connect
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        return client

    def _on_pre_connect(self, *_: Any) -> None:
        self._loop_thread = threading.current_thread()

    @log_exceptions
    def _on_socket_open(self, _client: paho.Client, _data: Any, sock: Any) -> None:
        self._negotiation.send()
        plain = getattr(sock, "_socket", sock)  # paho's wrapper of a web socket hides the real one
        with suppress(OSError, AttributeError):  # a Unix socket has no such option
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _wrap_socket(self, sock: Any) -> Any:
        if self._policy is None:
            return sock
        packet_filter = PacketFilter(
            self._policy.decide,
            is_mqtt5=self.is_mqtt5,
            count_dropped=self._policy.count_dropped,
            acknowledge=self._acknowledge_dropped,
        )
        return FilteredSocket(sock, packet_filter)

    def _acknowledge_dropped(self, dropped: Sequence[int]) -> None:
        """Acknowledge messages that paho does not see, in one write: a broker that waits drops what others send."""
        packets = b"".join(_PUBACK + mid.to_bytes(2, "big") for mid in dropped)
        self._client._packet_queue(paho.PUBACK, packets, 0, 0)  # noqa: SLF001  `ack` takes one, and wakes paho for each

    @log_exceptions
    def _on_socket_close(self, *_: Any) -> None:
        if self._policy is not None:
            self._policy.release_pending()
        self._connected = False
        with self._connection_number_lock:
            self._connection_number += 1

    @log_exceptions
    def _on_connect(self, _c: paho.Client, _d: Any, _flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            if self._negotiation.refuse(for_version=reason.value == _UNSUPPORTED_VERSION):
                self._request_maintenance()
            else:
                self._post(ConnectFailed(f"the broker refused: {reason}", reason.value not in _TRANSIENT))
            return
        self._negotiation.accept()
        self._limits = Limits(
            packet_bytes=getattr(properties, "MaximumPacketSize", None),
            in_flight=min(20, getattr(properties, "ReceiveMaximum", 20)),
        )
        self._connected = self._was_announced = True
        is_new, self._is_new = self._is_new, False
        self._post(Connected(self._negotiation.version, self._limits, is_new))

    @log_exceptions
    def _on_connect_fail(self, *_: Any) -> None:
        error = sys.exc_info()[1]  # paho calls this while it handles the OSError
        self._post(ConnectFailed(reason_of(error), is_final=False))

    @log_exceptions
    def _on_disconnect(self, _c: paho.Client, _d: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        was_announced, self._was_announced = self._was_announced, False
        if self._negotiation.close():
            self._request_maintenance()
        elif was_announced:
            self._post(Disconnected(str(reason), is_taken_over=reason.value == 0x8E))

    def _request_maintenance(self) -> None:
        self._client.disconnect()  # else paho would go on with the former version
        self._post(MaintenanceNeeded())

    @log_exceptions
    def _on_subscribe(self, _c: paho.Client, _d: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        self._post(Subscribed(tuple(reason.value for reason in reasons)))

    @log_exceptions
    def _on_publish(self, _c: paho.Client, _d: Any, mid: int, reason: Any, _properties: Any) -> None:
        if self.tells_published:  # paho calls this for QoS 0 too, and every event wakes the owner
            self._post(Published(mid, reason.value))

    @log_exceptions
    def _on_message(self, _c: paho.Client, _d: Any, message: paho.MQTTMessage) -> None:
        decision = self._ticket(message)
        if decision is None:
            if message.qos == 1:
                self._client.ack(message.mid, 1)
            return
        properties = from_paho(message.properties)
        at, payload = time.monotonic(), bytes(message.payload)
        self._post(
            Received(
                message.topic,
                payload,
                message.qos,
                message.retain,
                properties,
                at,
                message.mid,
                self._connection_number,
                decision,
            )
        )

    def _ticket(self, message: paho.MQTTMessage) -> PolicyDecision | None:
        """Return what was decided of a message, by now at the latest; None where it is dropped."""
        size = len(message.payload)
        if self._policy is None:
            decision = PolicyDecision(None, size + MESSAGE_BYTES)
            return decision if self._backlog.try_add(decision.cost, message.qos) else None
        ticket_before = self._policy.decision()
        if ticket_before is not None:
            return ticket_before
        self._policy.decide(message.topic.encode(), message.qos, size)  # this paho let it pass by the sieve
        return self._policy.decision()
