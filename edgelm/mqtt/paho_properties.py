"""MQTT 5 properties in paho's form, back, and in bytes (MQTT 5.0, section 2.2.2.2)."""

from __future__ import annotations

import functools

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties

from edgelm.mqtt.packets import Packet, Properties


def make_connect_properties(session_expiry_s: int, receive_maximum: int, packet_bytes: int | None) -> PahoProperties:
    """Return what a CONNECT asks for; without an expiry there is no session to bound."""
    properties = _empty(PacketTypes.CONNECT)
    if session_expiry_s:
        properties.SessionExpiryInterval = session_expiry_s
        properties.ReceiveMaximum = receive_maximum
    if packet_bytes:
        properties.MaximumPacketSize = packet_bytes
    return properties


def will_properties(delay_s: int) -> PahoProperties:
    """Return what a last will carries: how long the broker waits for us before it publishes it."""
    properties = _empty(PacketTypes.WILLMESSAGE)
    properties.WillDelayInterval = delay_s
    return properties


@functools.lru_cache(maxsize=64)  # the chunks of a second share theirs, and paho is slow to make them
def to_paho(properties: Properties) -> PahoProperties:
    """Return what a PUBLISH carries. Shared between calls: not to be changed."""
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
    """Return what a PUBLISH brought of what the protocol uses; MQTT 3.1.1 brings none.

    User properties and the content type stay behind: nothing reads them, and they may take 200 KB.
    """
    get = functools.partial(getattr, properties)
    return Properties(
        response_topic=get("ResponseTopic", None),
        correlation=get("CorrelationData", None),
        expiry_s=get("MessageExpiryInterval", None),
    )


def packet_bytes(packet: Packet, properties: PahoProperties | None) -> int:
    """Return the most bytes that a PUBLISH takes, its fixed header of 5 and its identifier of 2 included."""
    head = 5 + 2 + len(packet.topic.encode()) + 2
    return head + len(packet.payload) + (len(properties.pack()) if properties else 1)  # type: ignore[no-untyped-call]


def _empty(kind: int) -> PahoProperties:
    return PahoProperties(kind)  # type: ignore[no-untyped-call]
