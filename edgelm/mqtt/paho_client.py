"""How a broker is reached: paho's client for a URL and an identity, and why a connection failed, in words."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, Final

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edgelm.errors import EdgelmError
from edgelm.mqtt.broker_config import BrokerConfig
from edgelm.mqtt.packets import Packet
from edgelm.mqtt.paho_properties import will_properties
from edgelm.mqtt.version_negotiation import MqttVersion

CONNECT_TIMEOUT_S: Final = 5.0
RECONNECT_S: Final = (1, 30)


class _Client(paho.Client):
    """paho's client with another socket under it. A paho that makes its sockets elsewhere works too, unwrapped."""

    wrap: Callable[[Any], Any] | None = None

    def _create_socket(self) -> Any:
        sock = super()._create_socket()
        return sock if self.wrap is None else self.wrap(sock)


def make_paho_client(
    broker: BrokerConfig,
    client_id: str,
    version: MqttVersion,
    *,
    will: Packet | None,
    will_delay_s: int,
    keeps_session: bool,
    wrap: Callable[[Any], Any] | None = None,
) -> paho.Client:
    """Return a client that is ready to connect; raise `EdgelmError` for a file that holds no certificate or key.

    `wrap` returns what stands in for a new connection's socket.
    """
    url = broker.url
    old = version != "5"
    client = _Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        clean_session=not keeps_session if old else None,
        protocol=MQTTProtocolVersion.MQTTv311 if old else MQTTProtocolVersion.MQTTv5,
        transport={"ws": "websockets", "wss": "websockets", "unix": "unix"}.get(url.scheme, "tcp"),  # type: ignore[arg-type]
        manual_ack=True,
    )
    client.wrap = wrap
    client.connect_timeout = CONNECT_TIMEOUT_S
    client.reconnect_delay_set(*RECONNECT_S)
    client.max_inflight_messages_set(0)  # counted by the outbox, which also knows the broker's limit
    if url.scheme in {"ws", "wss"}:
        client.ws_set_options(path=url.path or "/mqtt")
    if broker.user:
        client.username_pw_set(broker.user, broker.password)
    if url.is_encrypted:
        client.tls_set_context(_tls_context(broker))
    if will is not None:
        properties = None if old else will_properties(will_delay_s)
        client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
    return client


def reason_of(error: BaseException | None) -> str:
    """Return why a connection failed, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return "unknown reason"


def _tls_context(broker: BrokerConfig) -> ssl.SSLContext:
    """Return a context that trusts the given CA; raise `EdgelmError` for a file that holds no certificate or key."""
    try:
        context = ssl.create_default_context(cafile=broker.cafile)
        if broker.certfile:
            context.load_cert_chain(broker.certfile, broker.keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise EdgelmError(f"cafile, certfile, keyfile: not a usable certificate or key: {error}") from error
    return context
