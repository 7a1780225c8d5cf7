"""Events that a connection posts to its owner. Does not know paho or the meaning of the packets."""

from __future__ import annotations

from dataclasses import dataclass

from edgelm.errors import EdgelmError
from edgelm.mqtt.inbound_policy import DEFAULT_DECISION, PolicyDecision
from edgelm.mqtt.packets import Properties


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that the broker sets for this connection; `packet_bytes` is None if there is none."""

    packet_bytes: int | None = None
    in_flight: int = 20


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted the connection. `is_new`: packets in flight before it will not be acknowledged."""

    protocol: str
    limits: Limits
    is_new: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection was lost; paho reconnects. `is_taken_over`: another client connected with the same client id."""

    reason: str
    is_taken_over: bool = False


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """Connecting failed. `is_final`: a retry cannot succeed."""

    reason: str
    is_final: bool


@dataclass(frozen=True, slots=True)
class Subscribed:
    """A SUBACK: one reason code for each filter; 0x80 and above means refused."""

    reasons: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """A packet of QoS 1 was acknowledged with `reason`.

    Also posted for a packet of QoS 0 that was written to the socket while packets of QoS 1 are in flight.
    """

    mid: int
    reason: int


@dataclass(frozen=True, slots=True)
class Received:
    """A message was received, at `received_at` of `time.monotonic`. Pass it to `Connection.acknowledge` when done."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    properties: Properties
    received_at: float
    mid: int
    connection_number: int
    decision: PolicyDecision = DEFAULT_DECISION
    """The decision of the inbound policy."""


@dataclass(frozen=True, slots=True)
class MaintenanceNeeded:
    """`Connection.maintain` must be called now."""


Event = Connected | Disconnected | ConnectFailed | Subscribed | Published | Received | MaintenanceNeeded


class PacketTooLargeError(EdgelmError):
    """A packet exceeds the broker's limit. Sending it would end the connection, again after each reconnect."""
