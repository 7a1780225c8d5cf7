"""Types that both codecs share: a packet, its MQTT 5 properties, and the JSON encoding of a body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

PROTOCOL: Final = 1
MAX_PAYLOAD_BYTES: Final = 64 * 1024
"""Maximum size of a request's payload."""


@dataclass(frozen=True, slots=True)
class Properties:
    """The MQTT 5 properties that the protocol uses; all absent over 3.1.1."""

    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None
    content_type: str | None = None
    is_text: bool = False
    """Payload Format Indicator: the payload is UTF-8."""
    user: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Packet:
    """One message to publish."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    properties: Properties = field(default_factory=Properties)


def write_json(body: Mapping[str, Any]) -> bytes:
    """Return compact JSON in UTF-8. Raises `ValueError` for NaN and infinity, which JSON does not have."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")
