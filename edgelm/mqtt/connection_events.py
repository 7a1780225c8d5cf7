"""What a connection tells its owner, as messages. Knows neither paho nor what the packets mean."""

from __future__ import annotations

from dataclasses import dataclass

from edgelm.errors import EdgelmError
from edgelm.mqtt.inbound_policy import DEFAULT_DECISION, PolicyDecision
from edgelm.mqtt.packets import Properties


@dataclass(frozen=True, slots=True)
class Limits:
    """What the broker allows on this connection."""

    packet_bytes: int | None = None
    in_flight: int = 20


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted us. `is_new`: nothing sent before is under way any more."""

    protocol: str
    limits: Limits
    is_new: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone; paho tries again. `is_taken_over`: another client came with our id."""

    reason: str
    is_taken_over: bool = False


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """A connection did not come about. `is_final`: waiting will not help."""

    reason: str
    is_final: bool


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The broker's answer to a subscription: one reason a filter, 0x80 and above is a refusal."""

    reasons: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """A message of QoS 1 was acknowledged with `reason`; or one of QoS 0 written, while some of QoS 1 are under way."""

    mid: int
    reason: int


@dataclass(frozen=True, slots=True)
class Received:
    """A message came in, at `at` of `time.monotonic`. Hand it to `Connection.settle` when it is dealt with."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    properties: Properties
    at: float
    mid: int
    connection_number: int
    decision: PolicyDecision = DEFAULT_DECISION
    """What was decided of it as it came in."""


@dataclass(frozen=True, slots=True)
class MaintenanceNeeded:
    """Call `Connection.tend`."""


Event = Connected | Disconnected | ConnectFailed | Subscribed | Published | Received | MaintenanceNeeded


class PacketTooLargeError(EdgelmError):
    """A packet exceeds what the broker takes; sending it would end the connection, over and over."""
