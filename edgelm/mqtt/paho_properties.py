"""Conversion of MQTT 5 properties to and from paho's classes (MQTT 5.0, section 2.2.2.2)."""

from __future__ import annotations

import functools

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties

from edgelm.mqtt.packets import Packet, Properties


def make_connect_properties(session_expiry_s: int, receive_maximum: int, packet_bytes: int | None) -> PahoProperties:
    """Return the properties of a CONNECT. Without a session expiry no receive maximum is set."""
    properties = _empty(PacketTypes.CONNECT)
    if session_expiry_s:
        properties.SessionExpiryInterval = session_expiry_s
        properties.ReceiveMaximum = receive_maximum
    if packet_bytes:
        properties.MaximumPacketSize = packet_bytes
    return properties


def make_will_properties(delay_s: int) -> PahoProperties:
    """Return the properties of a last will that the broker publishes `delay_s` seconds after the connection is lost."""
    properties = _empty(PacketTypes.WILLMESSAGE)
    properties.WillDelayInterval = delay_s
    return properties


@functools.lru_cache(maxsize=64)  # chunks sent within one second have equal properties, and paho builds them slowly
def to_paho(properties: Properties) -> PahoProperties:
    """Return the properties of a PUBLISH. The result is shared between calls: do not change it."""
    packed = _empty(PacketTypes.PUBLISH)
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


def from_paho(properties: PahoProperties | None) -> Properties:
    """Return those properties of a received PUBLISH that the protocol uses; none over MQTT 3.1.1.

    User properties and the content type are left out: nothing reads them, and they may take 200 KB.
    """
    get = functools.partial(getattr, properties)
    return Properties(
        response_topic=get("ResponseTopic", None),
        correlation=get("CorrelationData", None),
        expiry_s=get("MessageExpiryInterval", None),
    )


def measure_packet_bytes(packet: Packet, properties: PahoProperties | None) -> int:
    """Return an upper bound of a PUBLISH packet's size: 5 bytes of fixed header and 2 of identifier are counted."""
    head = 5 + 2 + len(packet.topic.encode()) + 2
    return head + len(packet.payload) + (len(properties.pack()) if properties else 1)  # type: ignore[no-untyped-call]


def _empty(kind: int) -> PahoProperties:
    return PahoProperties(kind)  # type: ignore[no-untyped-call]
