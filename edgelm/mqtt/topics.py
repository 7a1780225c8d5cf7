"""Topic names: the board's topics, parsing of request topics, and the check of response topics.

Owns every topic string of the protocol. Does not know connections or payloads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from edgelm.errors import RequestError
from edgelm.mqtt.service_config import NAME_PATTERN, RESERVED_NAMES

BASE: Final = "edgelm"
MAX_RESPONSE_TOPIC_BYTES: Final = 256

_RESERVED_LEVELS: Final = frozenset({"generate", "cancel", "set", "status", "info", "state", "event"})
"""Levels below a board that are no response topics: those of requests and those on which boards publish."""


@dataclass(frozen=True, slots=True)
class RequestTopic:
    """A parsed topic of a received message; `client` is the name in its last level, if any."""

    action: Literal["generate", "cancel"]
    client: str | None


@dataclass(frozen=True, slots=True)
class BoardTopics:
    """The topics of one board."""

    board: str

    @property
    def subscriptions(self) -> tuple[tuple[str, int], ...]:
        """Topic filters and their QoS. `#` also matches the parent level."""
        return ((f"{self._topic('generate')}/#", 1), (f"{self._topic('cancel')}/#", 0))

    @property
    def status(self) -> str:
        """Retained `online` or `offline`."""
        return self._topic("status")

    @property
    def info(self) -> str:
        """Retained description of the board and its models."""
        return self._topic("info")

    @property
    def state(self) -> str:
        """Retained load, memory and temperature of the board."""
        return self._topic("state")

    @property
    def event(self) -> str:
        """Events of requests."""
        return self._topic("event")

    def generate(self, client: str | None = None) -> str:
        """Return the topic for requests of a client."""
        return self._topic("generate", client)

    def cancel(self, client: str | None = None) -> str:
        """Return the topic for cancels of a client."""
        return self._topic("cancel", client)

    def response(self, client: str | None = None) -> str:
        """Return the response topic of requests that name none."""
        return self._topic("response") if client is None else f"{BASE}/client/{client}/response"

    def authorize_response_topic(self, topic: str, client: str | None, allowed: tuple[str, ...]) -> None:
        """Raise unless responses to the client may be published on `topic`.

        A named client may use only topics below `edgelm/client/<name>/`. A client without a name may use the board's
        response topics and topics that a filter in `allowed` matches, but no topic of a named client.

        Raises
        ------
        RequestError
            `bad_request` or `forbidden`, as `validate_response_topic`.
        """
        if client is not None:
            validate_response_topic(topic)
            own = f"{BASE}/client/{client}/"
            if not topic.startswith(own) or topic == own:
                raise RequestError("forbidden", f"response topic: a client with a name must use topics below {own}")
            return
        response = self.response()
        is_own = topic == response or topic.startswith(response + "/")
        validate_response_topic(topic, ("#",) if is_own else allowed, f"{response}/#")
        if topic.split("/")[:2] == [BASE, "client"]:
            raise RequestError(
                "forbidden",
                f"response topic: belongs to a named client; send the request to {self.generate()}/<name> to use it",
            )

    def parse(self, topic: str) -> RequestTopic:
        """Return the action and client of a received topic.

        Raises `RequestError("bad_request")` if the client name is not allowed or the topic is not one of this board.
        """
        for action in ("generate", "cancel"):
            own = self._topic(action)
            if topic == own:
                return RequestTopic(action, None)
            if topic.startswith(own + "/"):
                client = topic[len(own) + 1 :]
                if not is_name(client):
                    raise RequestError("bad_request", "the client name in the topic must be 1 to 32 of a-z 0-9 _ -")
                return RequestTopic(action, client)
        raise RequestError("bad_request", "not a topic of this board")

    def _topic(self, level: str, client: str | None = None) -> str:
        return f"{BASE}/{self.board}/{level}" + ("" if client is None else f"/{client}")


def is_name(text: str) -> bool:
    """Return whether `text` is allowed as the name of a board or client."""
    return NAME_PATTERN.fullmatch(text) is not None and text not in RESERVED_NAMES


def validate_response_topic(topic: str, allowed: tuple[str, ...] = ("#",), *also: str) -> None:
    """Raise unless responses may be published on `topic`.

    A broker closes the connection of a client that publishes on a malformed topic, so the check allows only topics that
    every broker accepts.

    Raises
    ------
    RequestError
        `bad_request` if the topic is malformed; `forbidden` if it belongs to boards or no filter in `allowed` matches
        it. The message lists `also` and `allowed`.
    """
    try:
        size = len(topic.encode("utf-8"))
    except UnicodeEncodeError:
        raise RequestError("bad_request", "response topic: contains an unpaired surrogate") from None
    if not 0 < size <= MAX_RESPONSE_TOPIC_BYTES:
        raise RequestError("bad_request", f"response topic: must have 1 to {MAX_RESPONSE_TOPIC_BYTES} bytes")
    if any(character in "+#" or _is_malformed(ord(character)) for character in topic):
        raise RequestError("bad_request", "response topic: must not contain a wildcard or a control character")
    if topic.startswith("$"):
        raise RequestError("forbidden", "response topic: must not start with $")
    levels = topic.split("/")
    is_reserved = levels[0] == BASE and len(levels) > 1 and (levels[1] == "pool" or set(levels[2:3]) & _RESERVED_LEVELS)
    if (is_reserved and levels[1] != "client") or levels[0] == "homeassistant":
        raise RequestError("forbidden", "response topic: is reserved for boards")
    if not any(filter_matches(pattern, topic) for pattern in allowed):
        named = ", ".join([*also, *allowed])
        raise RequestError("forbidden", f"response topic: this board allows only {named} (setting reply_topics)")


def _is_malformed(code: int) -> bool:
    """Return whether mosquitto rejects the character: control characters and Unicode noncharacters."""
    return code < 0x20 or 0x7F <= code <= 0x9F or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE


def filter_matches(pattern: str, topic: str) -> bool:
    """Return whether a topic filter matches a topic."""
    filter_levels, levels = pattern.split("/"), topic.split("/")
    for index, level in enumerate(filter_levels):
        if level == "#":
            return True
        if index >= len(levels) or level not in {"+", levels[index]}:
            return False
    return len(filter_levels) == len(levels)
