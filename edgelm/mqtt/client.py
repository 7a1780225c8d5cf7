"""The connection to a broker: the only importer of paho.

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
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties

from edgelm.config import BrokerConfig
from edgelm.errors import EdgelmError
from edgelm.mqtt.events import (
    Connected,
    ConnectFailed,
    Disconnected,
    Event,
    Limits,
    NeedsCare,
    PacketTooLargeError,
    Published,
    Received,
    Subscribed,
)
from edgelm.mqtt.greeting import Greeting, Version
from edgelm.mqtt.transport import reason_of, tls_context
from edgelm.mqtt.wire import Packet, Properties

log = logging.getLogger(__name__)

KEEPALIVE_S: Final = 20
CONNECT_TIMEOUT_S: Final = 5.0
RECONNECT_S: Final = (1, 30)
RECEIVE_MAXIMUM: Final = 64
"""Requests of QoS 1 that the broker may have under way to us."""
BACKLOG_BYTES: Final = 16 * 1024 * 1024
"""What may wait for the owner; beyond it messages of QoS 0 are dropped, as QoS 0 allows."""
MAX_REVIVALS: Final = 5

_UNSUPPORTED_VERSION: Final = 0x84
_TRANSIENT: Final = frozenset({0x80, 0x83, 0x88, 0x89, 0x97, 0x9C, 0x9D, 0x9F})
"""CONNACK reasons that waiting may cure."""


class Sending:
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


_Callback = TypeVar("_Callback", bound=Callable[..., None])


def _guarded(callback: _Callback) -> _Callback:
    """Keep an exception from ending paho's loop thread."""

    @functools.wraps(callback)
    def wrapped(*args: Any) -> None:
        try:
            callback(*args)
        except Exception:
            log.exception("%s failed", callback.__name__)

    return wrapped  # type: ignore[return-value]


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
        protocol: Version = "5",
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._post = post
        self._will = will
        self._will_delay_s = will_delay_s
        self._session_expiry_s = session_expiry_s
        self._packet_bytes = packet_bytes
        self._greeting = Greeting(protocol)
        self.tells_published = False
        """Whether `Published` is posted; set by a publish of QoS 1, reset by the owner when none is under way."""
        self._limits = Limits()
        self._connected = False
        self._was_announced = False
        self._is_new = True
        self._revivals = 0
        self._epoch = 0
        self._epoch_lock = threading.Lock()  # never held around publish: paho calls back with its own locks held
        self._backlog_bytes = 0
        self._backlog_lock = threading.Lock()
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
        return self._greeting.version == "5"

    def start(self) -> None:
        """Begin to connect, and go on until `stop`."""
        url = self._broker.url
        properties = None
        if self.is_mqtt5:
            properties = _paho_properties(PacketTypes.CONNECT)
            if self._session_expiry_s:
                properties.SessionExpiryInterval = self._session_expiry_s
                properties.ReceiveMaximum = RECEIVE_MAXIMUM
            if self._packet_bytes:
                properties.MaximumPacketSize = self._packet_bytes
        self._client.connect_async(
            url.host,
            url.port or 1883,  # a Unix socket has none, and paho wants one
            keepalive=KEEPALIVE_S,
            clean_start=self._session_expiry_s == 0,
            properties=properties,
        )
        self._client.loop_start()

    def tend(self) -> None:
        """Do what a callback cannot: change the version, and replace a loop thread that died. Call it now and then.

        Raises
        ------
        EdgelmError
            When the loop thread dies again and again.
        """
        self._greeting.check_time()
        thread = self._loop_thread
        died = thread is not None and not thread.is_alive() and not self._greeting.wants_change
        if died:
            self._revivals += 1
            log.error("the MQTT loop thread died; starting another (%d of %d)", self._revivals, MAX_REVIVALS)
            if self._revivals > MAX_REVIVALS:
                raise EdgelmError("the MQTT loop thread keeps dying; see the log")
        if died or self._greeting.wants_change:
            self.stop()
            self._greeting.wants_change = False
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

    def subscribe(self, filters: tuple[tuple[str, int], ...]) -> None:
        """Ask for topics; the answer is a `Subscribed`."""
        self._client.subscribe(list(filters))

    def publish(self, packet: Packet) -> Sending | None:
        """Send a packet; return None where it cannot go now. A `Published` follows one of QoS 1.

        Raises
        ------
        PacketTooLargeError
            When the broker would not take it.
        """
        if not self._connected:
            return None
        properties = _to_paho(packet.properties) if self.is_mqtt5 else None
        limit = self._limits.packet_bytes
        if limit is not None:
            fixed = 5 + 2 + len(packet.topic.encode()) + 2
            size = fixed + len(packet.payload) + (len(properties.pack()) if properties else 1)  # type: ignore[no-untyped-call]
            if size > limit:
                raise PacketTooLargeError(f"a packet of {size} bytes exceeds the broker's limit of {limit}")
        if packet.qos == 1:
            self.tells_published = True
        info = self._client.publish(packet.topic, packet.payload, packet.qos, packet.retain, properties)
        if packet.qos == 0 and info.rc != paho.MQTT_ERR_SUCCESS:
            return None
        return Sending(info)  # QoS 1 that met a dying connection: paho sends it on the next one

    def tell(self, packet: Packet) -> None:
        """Send a packet of QoS 0 that nobody misses much."""
        with suppress(PacketTooLargeError):
            self.publish(packet)

    def settle(self, received: Received) -> None:
        """Acknowledge a message, unless its connection is gone, and free its place."""
        with self._backlog_lock:
            self._backlog_bytes -= len(received.payload)
        if received.qos == 1:
            with self._epoch_lock:
                if received.epoch == self._epoch:
                    self._client.ack(received.mid, received.qos)

    # -- paho's side: each on its loop thread -------------------------------------------------------------------

    def _make_client(self) -> paho.Client:
        url = self._broker.url
        old = not self.is_mqtt5
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=self._session_expiry_s == 0 if old else None,
            protocol=MQTTProtocolVersion.MQTTv311 if old else MQTTProtocolVersion.MQTTv5,
            transport={"ws": "websockets", "wss": "websockets", "unix": "unix"}.get(url.scheme, "tcp"),  # type: ignore[arg-type]
            manual_ack=True,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.reconnect_delay_set(*RECONNECT_S)
        client.max_inflight_messages_set(0)  # counted by the outbox, which also knows the broker's limit
        if url.scheme in {"ws", "wss"}:
            client.ws_set_options(path=url.path or "/mqtt")
        if self._broker.user:
            client.username_pw_set(self._broker.user, self._broker.password)
        if url.is_encrypted:
            client.tls_set_context(tls_context(self._broker))
        if self._will is not None:
            properties = None
            if self.is_mqtt5:
                properties = _paho_properties(PacketTypes.WILLMESSAGE)
                properties.WillDelayInterval = self._will_delay_s
            client.will_set(self._will.topic, self._will.payload, self._will.qos, self._will.retain, properties)
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

    @_guarded
    def _on_socket_open(self, _client: paho.Client, _data: Any, sock: Any) -> None:
        self._greeting.send()
        plain = getattr(sock, "_socket", sock)  # paho's wrapper of a web socket hides the real one
        with suppress(OSError, AttributeError):  # a Unix socket has no such option
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @_guarded
    def _on_socket_close(self, *_: Any) -> None:
        self._connected = False
        with self._epoch_lock:
            self._epoch += 1

    @_guarded
    def _on_connect(self, _c: paho.Client, _d: Any, _flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            if self._greeting.refuse(for_version=reason.value == _UNSUPPORTED_VERSION):
                self._ask_for_care()
            else:
                self._post(ConnectFailed(f"the broker refused: {reason}", reason.value not in _TRANSIENT))
            return
        self._greeting.accept()
        self._limits = Limits(
            packet_bytes=getattr(properties, "MaximumPacketSize", None),
            in_flight=min(20, getattr(properties, "ReceiveMaximum", 20)),
        )
        self._connected = self._was_announced = True
        is_new, self._is_new = self._is_new, False
        self._post(Connected(self._greeting.version, self._limits, is_new))

    @_guarded
    def _on_connect_fail(self, *_: Any) -> None:
        error = sys.exc_info()[1]  # paho calls this while it handles the OSError
        self._post(ConnectFailed(reason_of(error), is_final=False))

    @_guarded
    def _on_disconnect(self, _c: paho.Client, _d: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        was_announced, self._was_announced = self._was_announced, False
        if self._greeting.close():
            self._ask_for_care()
        elif was_announced:
            self._post(Disconnected(str(reason), is_taken_over=reason.value == 0x8E))

    def _ask_for_care(self) -> None:
        self._client.disconnect()  # else paho would go on with the former version
        self._post(NeedsCare())

    @_guarded
    def _on_subscribe(self, _c: paho.Client, _d: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        self._post(Subscribed(tuple(reason.value for reason in reasons)))

    @_guarded
    def _on_publish(self, _c: paho.Client, _d: Any, mid: int, reason: Any, _properties: Any) -> None:
        if self.tells_published:  # paho calls this for QoS 0 too, and every event wakes the owner
            self._post(Published(mid, reason.value))

    @_guarded
    def _on_message(self, _c: paho.Client, _d: Any, message: paho.MQTTMessage) -> None:
        topic, payload = message.topic, bytes(message.payload)
        with self._backlog_lock:
            if message.qos == 0 and self._backlog_bytes + len(payload) > BACKLOG_BYTES:
                return
            self._backlog_bytes += len(payload)
        properties = _from_paho(message.properties)
        received = Received(
            topic, payload, message.qos, message.retain, properties, time.monotonic(), message.mid, self._epoch
        )
        self._post(received)


def _paho_properties(kind: int) -> PahoProperties:
    return PahoProperties(kind)  # type: ignore[no-untyped-call]


@functools.lru_cache(maxsize=64)  # the chunks of a second share theirs, and paho is slow to make them
def _to_paho(properties: Properties) -> PahoProperties:
    packed = _paho_properties(PacketTypes.PUBLISH)
    if properties.response_topic is not None:
        packed.ResponseTopic = properties.response_topic
    if properties.correlation is not None:
        packed.CorrelationData = properties.correlation
    if properties.expiry_s is not None:
        packed.MessageExpiryInterval = properties.expiry_s
    if properties.content_type is not None:
        packed.ContentType = properties.content_type
    if properties.is_text:
        packed.PayloadFormatIndicator = 1
    if properties.user:
        packed.UserProperty = list(properties.user)
    return packed


def _from_paho(properties: PahoProperties | None) -> Properties:
    get = functools.partial(getattr, properties)
    return Properties(
        response_topic=get("ResponseTopic", None),
        correlation=get("CorrelationData", None),
        expiry_s=get("MessageExpiryInterval", None),
        content_type=get("ContentType", None),
        is_text=bool(get("PayloadFormatIndicator", 0)),
        user=tuple((str(key), str(value)) for key, value in get("UserProperty", ())),
    )
