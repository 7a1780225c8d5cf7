"""Creates and configures a paho client: transport, TLS, credentials, last will. Does not know what it is used for."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, Final

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edgelm.errors import EdgelmError
from edgelm.mqtt.broker_config import BrokerConfig
from edgelm.mqtt.packets import Packet
from edgelm.mqtt.paho_properties import make_will_properties
from edgelm.mqtt.version_negotiation import MqttVersion

CONNECT_TIMEOUT_S: Final = 5.0
RECONNECT_S: Final = (1, 30)


class _Client(paho.Client):
    """A paho client whose sockets can be wrapped. A paho version without `_create_socket` works without the wrapper."""

    wrap_socket: Callable[[Any], Any] | None = None

    def _create_socket(self) -> Any:
        sock = super()._create_socket()
        return sock if self.wrap_socket is None else self.wrap_socket(sock)


def make_paho_client(
    broker: BrokerConfig,
    client_id: str,
    version: MqttVersion,
    *,
    will: Packet | None,
    will_delay_s: int,
    keeps_session: bool,
    wrap_socket: Callable[[Any], Any] | None = None,
) -> paho.Client:
    """Return a client that is ready to connect.

    `wrap_socket` returns the object that paho uses instead of a new socket. Raises `EdgelmError` if a certificate or
    key file cannot be used.
    """
    url = broker.url
    is_mqtt5 = version == "5"
    client = _Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        clean_session=None if is_mqtt5 else not keeps_session,
        protocol=MQTTProtocolVersion.MQTTv5 if is_mqtt5 else MQTTProtocolVersion.MQTTv311,
        transport={"ws": "websockets", "wss": "websockets", "unix": "unix"}.get(url.scheme, "tcp"),  # type: ignore[arg-type]
        manual_ack=True,
    )
    client.wrap_socket = wrap_socket
    client.connect_timeout = CONNECT_TIMEOUT_S
    client.reconnect_delay_set(*RECONNECT_S)
    client.max_inflight_messages_set(0)  # no limit in paho: the outbox applies the broker's limit
    if url.scheme in {"ws", "wss"}:
        client.ws_set_options(path=url.path or "/mqtt")
    if broker.user:
        client.username_pw_set(broker.user, broker.password)
    if url.is_encrypted:
        client.tls_set_context(_make_tls_context(broker))
    if will is not None:
        properties = make_will_properties(will_delay_s) if is_mqtt5 else None
        client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
    return client


def describe_failure(error: BaseException | None) -> str:
    """Return a text that says why a connection failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return "unknown reason"


def _make_tls_context(broker: BrokerConfig) -> ssl.SSLContext:
    """Return a context that trusts the given CA. Raises `EdgelmError` if a file holds no certificate or key."""
    try:
        context = ssl.create_default_context(cafile=broker.cafile)
        if broker.certfile:
            context.load_cert_chain(broker.certfile, broker.keyfile)
    except OSError as error:  # the base class of ssl.SSLError
        raise EdgelmError(f"cafile, certfile, keyfile: not a usable certificate or key: {error}") from error
    return context
