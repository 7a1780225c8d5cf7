"""The connection to a broker: connects, reconnects, subscribes, publishes, and posts what it receives as events.

Events are posted from paho's loop thread; all public methods are called from one other thread, the owner's. Does not
know the meaning of the packets. `version_negotiation` chooses the MQTT version, `paho_client` configures the paho
client, `paho_properties` converts properties.
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
from edgelm.mqtt.paho_client import CONNECT_TIMEOUT_S, RECONNECT_S, describe_failure, make_paho_client
from edgelm.mqtt.paho_properties import from_paho, make_connect_properties, measure_packet_bytes, to_paho
from edgelm.mqtt.version_negotiation import MqttVersion, VersionNegotiation

log = logging.getLogger(__name__)

KEEPALIVE_S: Final = 20
RECEIVE_MAXIMUM: Final = 64
"""Messages of QoS 1 that the broker may send without an acknowledgement."""
MAX_BEST_EFFORT: Final = 64
"""Best-effort packets that may wait for the socket; further ones are dropped."""
MAX_LOOP_RESTARTS: Final = 5

_PUBACK: Final = b"\x40\x02"
_UNSUPPORTED_VERSION: Final = 0x84
_TRANSIENT: Final = frozenset({0x80, 0x83, 0x88, 0x89, 0x97, 0x9C, 0x9D, 0x9F})
"""CONNACK reason codes after which a retry may succeed."""


_Callback = TypeVar("_Callback", bound=Callable[..., None])


def log_exceptions(callback: _Callback) -> _Callback:
    """Wrap a paho callback: its exceptions are logged, since an exception would end paho's loop thread."""

    @functools.wraps(callback)
    def wrapped(*args: Any) -> None:
        try:
            callback(*args)
        except Exception:
            log.exception("%s failed", callback.__name__)

    return wrapped  # type: ignore[return-value]


class PublishHandle:
    """A packet that was passed to paho. The `Published` event of a packet of QoS 1 has the same `mid`."""

    __slots__ = ("_info", "mid")

    def __init__(self, info: paho.MQTTMessageInfo) -> None:
        self._info = info
        self.mid = info.mid

    @property
    def is_over(self) -> bool:
        """Whether the packet was written (QoS 0), acknowledged (QoS 1), or lost with its connection."""
        try:
            return self._info.is_published()
        except (RuntimeError, ValueError):  # paho raises these for a lost packet
            return True


class Connection:
    """One MQTT client at one broker. Reconnects by itself.

    Parameters
    ----------
    broker
        Broker URL and credentials.
    client_id
        MQTT client id. The broker keeps the session of an id for `session_expiry_s`.
    post
        Receives every event, on paho's thread; must not block.
    will
        The last will: published by the broker when the connection is lost for `will_delay_s` without a DISCONNECT.
    session_expiry_s
        Seconds for which the broker keeps subscriptions and messages of QoS 1 after a lost connection; 0 means a clean
        start.
    packet_bytes
        Maximum size of packets that the broker may send (MQTT 5).
    policy
        Decides about every message before paho parses it. None admits all messages up to a backlog of `BACKLOG_BYTES`.
    protocol
        "5", with a fallback to 3.1.1 if the broker does not support 5; or "3.1.1".
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
        policy: InboundPolicy | None = None,
        protocol: MqttVersion = "5",
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._post = post
        self._will = will
        self._will_delay_s = will_delay_s
        self._session_expiry_s = session_expiry_s
        self._packet_bytes = packet_bytes
        self._policy = policy
        self._negotiation = VersionNegotiation(protocol)
        self._reports_published = False
        """Whether `Published` is posted. See `stop_reporting_published`."""
        self._limits = Limits()
        self._connected = False
        self._was_announced = False
        self._is_new = True
        self._loop_restarts = 0
        self._connection_number = 0
        self._connection_number_lock = threading.Lock()
        """Never held around a publish: paho calls back while it holds its own locks."""
        self._backlog = BacklogLimit(BACKLOG_BYTES)
        """Used if there is no policy."""
        self._best_effort_handles: deque[PublishHandle] = deque()
        self._loop_thread: threading.Thread | None = None
        self._client = self._make_client()

    # -- called by the owner ----------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether packets can be published now."""
        return self._connected

    @property
    def is_mqtt5(self) -> bool:
        """Whether the MQTT version in use is 5, so that packets have properties."""
        return self._negotiation.version == "5"

    def start(self) -> None:
        """Start to connect; reconnect until `stop`."""
        url = self._broker.url
        properties = None
        if self.is_mqtt5:
            properties = make_connect_properties(self._session_expiry_s, RECEIVE_MAXIMUM, self._packet_bytes)
        self._client.connect_async(
            url.host,
            url.port or 1883,  # a Unix socket has no port, but paho requires one
            keepalive=KEEPALIVE_S,
            clean_start=self._session_expiry_s == 0,
            properties=properties,
        )
        self._client.loop_start()

    def maintain(self) -> None:
        """Change the MQTT version if needed, and replace a loop thread that died. Call it at least once a second.

        Raises
        ------
        EdgelmError
            If the loop thread died more than `MAX_LOOP_RESTARTS` times.
        """
        self._negotiation.check_time()
        thread = self._loop_thread
        died = thread is not None and not thread.is_alive() and not self._negotiation.needs_reconnect
        if died:
            self._loop_restarts += 1
            log.error("the MQTT loop thread died; restart %d of %d", self._loop_restarts, MAX_LOOP_RESTARTS)
            if self._loop_restarts > MAX_LOOP_RESTARTS:
                raise EdgelmError(f"the MQTT loop thread died more than {MAX_LOOP_RESTARTS} times; see the log")
        if died or self._negotiation.needs_reconnect:
            self.stop()
            self._negotiation.on_reconnect()
            self._is_new = True
            self._client = self._make_client()
            self.start()

    def stop(self, timeout_s: float = 2 * CONNECT_TIMEOUT_S) -> None:
        """Disconnect and end the loop thread; wait for it for at most `timeout_s`."""
        self._client.disconnect()
        if self._loop_thread is not None:
            self._loop_thread.join(timeout_s)
        if self._loop_thread is None or not self._loop_thread.is_alive():
            self._client.loop_stop()
        self._loop_thread = None
        self._connected = False

    def set_fast_reconnect(self, is_fast: bool) -> None:
        """Set whether the first reconnect comes after 1 s (with growing delays) or every reconnect after 30 s."""
        self._client.reconnect_delay_set(*(RECONNECT_S if is_fast else (RECONNECT_S[1], RECONNECT_S[1])))

    def subscribe(self, filters: tuple[tuple[str, int], ...], watched_topics: tuple[str, ...] = ()) -> None:
        """Subscribe to `filters`, pairs of a topic filter and a QoS, and to `watched_topics` at QoS 0.

        A `Subscribed` event follows, with the reason codes in this order. Over MQTT 5 `watched_topics` yield only new
        messages of other clients; over MQTT 3.1.1 also retained messages and those of this client.
        """
        if self.is_mqtt5:
            options = [(topic, SubscribeOptions(qos=qos)) for topic, qos in filters]
            options += [(topic, SubscribeOptions(qos=0, noLocal=True, retainHandling=2)) for topic in watched_topics]
            self._client.subscribe(options)
        else:
            self._client.subscribe([*filters, *((topic, 0) for topic in watched_topics)])

    def publish(self, packet: Packet) -> PublishHandle | None:
        """Send a packet; return None if it cannot be sent now. A `Published` event follows a packet of QoS 1.

        Raises
        ------
        PacketTooLargeError
            If the packet exceeds the broker's limit.
        """
        if not self._connected:
            return None
        properties = to_paho(packet.properties) if self.is_mqtt5 else None
        limit = self._limits.packet_bytes
        if limit is not None:
            size = measure_packet_bytes(packet, properties)
            if size > limit:
                raise PacketTooLargeError(f"a packet of {size} bytes exceeds the broker's limit of {limit}")
        if packet.qos == 1:
            self._reports_published = True  # before the publish: the acknowledgement may come before it returns
        info = self._client.publish(packet.topic, packet.payload, packet.qos, packet.retain, properties)
        if packet.qos == 0 and info.rc != paho.MQTT_ERR_SUCCESS:
            return None
        return PublishHandle(info)  # paho sends a packet of QoS 1 again after a reconnect

    def publish_best_effort(self, packet: Packet) -> None:
        """Send a packet of QoS 0; drop it if `MAX_BEST_EFFORT` others wait for the socket."""
        while self._best_effort_handles and self._best_effort_handles[0].is_over:
            self._best_effort_handles.popleft()
        if len(self._best_effort_handles) >= MAX_BEST_EFFORT:
            return
        with suppress(PacketTooLargeError):
            handle = self.publish(packet)
            if handle is not None:
                self._best_effort_handles.append(handle)

    def stop_reporting_published(self) -> None:
        """Post no `Published` events until the next publish of QoS 1. Call it when none is in flight.

        paho also reports packets of QoS 0, and every event wakes the owner.
        """
        self._reports_published = False

    def acknowledge(self, received: Received) -> None:
        """Acknowledge a message unless its connection is lost, and remove it from the backlog."""
        if self._policy is None:
            self._backlog.release(received.decision.backlog_bytes)
        else:
            self._policy.release(received.decision)
        if received.qos == 1:
            with self._connection_number_lock:
                if received.connection_number == self._connection_number:
                    self._client.ack(received.mid, received.qos)

    # -- called by paho, on its loop thread ---------------------------------------------------------------------

    def _make_client(self) -> paho.Client:
        client = make_paho_client(
            self._broker,
            self._client_id,
            self._negotiation.version,
            will=self._will,
            will_delay_s=self._will_delay_s,
            keeps_session=self._session_expiry_s > 0,
            wrap_socket=None if self._policy is None else self._wrap_socket,
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
        self._negotiation.on_connect_sent()
        inner = getattr(sock, "_socket", sock)  # paho wraps the socket of a web socket connection
        with suppress(OSError, AttributeError):  # a Unix socket does not have this option
            inner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

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
        """Acknowledge dropped messages in one write: a broker that waits for them drops messages of other clients."""
        packets = b"".join(_PUBACK + mid.to_bytes(2, "big") for mid in dropped)
        self._client._packet_queue(paho.PUBACK, packets, 0, 0)  # noqa: SLF001  `ack` sends one and wakes paho each time

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
            if self._negotiation.on_refused(for_version=reason.value == _UNSUPPORTED_VERSION):
                self._request_maintenance()
            else:
                self._post(
                    ConnectFailed(f"the broker refused the connection: {reason}", reason.value not in _TRANSIENT)
                )
            return
        self._negotiation.on_accepted()
        self._limits = Limits(
            packet_bytes=getattr(properties, "MaximumPacketSize", None),
            in_flight=min(20, getattr(properties, "ReceiveMaximum", 20)),
        )
        self._connected = self._was_announced = True
        is_new, self._is_new = self._is_new, False
        self._post(Connected(self._negotiation.version, self._limits, is_new))

    @log_exceptions
    def _on_connect_fail(self, *_: Any) -> None:
        error = sys.exc_info()[1]  # paho calls this while it handles the exception
        self._post(ConnectFailed(describe_failure(error), is_final=False))

    @log_exceptions
    def _on_disconnect(self, _c: paho.Client, _d: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        was_announced, self._was_announced = self._was_announced, False
        if self._negotiation.on_closed():
            self._request_maintenance()
        elif was_announced:
            self._post(Disconnected(str(reason), is_taken_over=reason.value == 0x8E))

    def _request_maintenance(self) -> None:
        self._client.disconnect()  # otherwise paho reconnects with the former version
        self._post(MaintenanceNeeded())

    @log_exceptions
    def _on_subscribe(self, _c: paho.Client, _d: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        self._post(Subscribed(tuple(reason.value for reason in reasons)))

    @log_exceptions
    def _on_publish(self, _c: paho.Client, _d: Any, mid: int, reason: Any, _properties: Any) -> None:
        if self._reports_published:
            self._post(Published(mid, reason.value))

    @log_exceptions
    def _on_message(self, _c: paho.Client, _d: Any, message: paho.MQTTMessage) -> None:
        decision = self._decide(message)
        if decision is None:
            if message.qos == 1:
                self._client.ack(message.mid, 1)
            return
        properties = from_paho(message.properties)
        self._post(
            Received(
                topic=message.topic,
                payload=bytes(message.payload),
                qos=message.qos,
                retain=message.retain,
                properties=properties,
                received_at=time.monotonic(),
                mid=message.mid,
                connection_number=self._connection_number,
                decision=decision,
            )
        )

    def _decide(self, message: paho.MQTTMessage) -> PolicyDecision | None:
        """Return the decision about a message, or None if it must be dropped."""
        size = len(message.payload)
        if self._policy is None:
            decision = PolicyDecision(None, size + MESSAGE_BYTES)
            return decision if self._backlog.try_add(decision.backlog_bytes, message.qos) else None
        filtered = self._policy.pop_decision()
        if filtered is not None:
            return filtered
        self._policy.decide(message.topic.encode(), message.qos, size)  # this paho version has no packet filter
        return self._policy.pop_decision()
