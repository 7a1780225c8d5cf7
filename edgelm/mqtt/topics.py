"""The names of the topics: which there are, who is asked in one, and where an answer may go.

Owns every topic string of the protocol. Knows nothing of connections or payloads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from edgelm.errors import RequestError
from edgelm.mqtt.service_config import NAME_PATTERN, RESERVED_NAMES

BASE: Final = "edgelm"
MAX_REPLY_BYTES: Final = 256

_IN_OR_OWN: Final = frozenset({"generate", "cancel", "set", "status", "info", "state", "event"})
"""Second levels below a board that no answer may go to: requests, and what boards say of themselves."""


@dataclass(frozen=True, slots=True)
class RequestTopic:
    """What a received topic asks for, and the client that its last level names, if any."""

    action: Literal["generate", "cancel"]
    client: str | None


@dataclass(frozen=True, slots=True)
class BoardTopics:
    """The topics of one board."""

    board: str

    @property
    def subscriptions(self) -> tuple[tuple[str, int], ...]:
        """Filters and their QoS; `#` matches the parent level too."""
        return ((f"{self._of('generate')}/#", 1), (f"{self._of('cancel')}/#", 0))

    @property
    def status(self) -> str:
        """`online` or `offline`, retained."""
        return self._of("status")

    @property
    def info(self) -> str:
        """What the board is and serves, retained."""
        return self._of("info")

    @property
    def state(self) -> str:
        """How busy and how warm it is, retained."""
        return self._of("state")

    @property
    def event(self) -> str:
        """What happens to requests."""
        return self._of("event")

    def generate(self, client: str | None = None) -> str:
        """Return the topic to ask on."""
        return self._of("generate", client)

    def cancel(self, client: str | None = None) -> str:
        """Return the topic to cancel on."""
        return self._of("cancel", client)

    def response(self, client: str | None = None) -> str:
        """Return where answers go that name no topic."""
        return self._of("response") if client is None else f"{BASE}/client/{client}/response"

    def authorize_response_topic(self, topic: str, client: str | None, allowed: tuple[str, ...]) -> None:
        """Raise unless a client may be answered on `topic`.

        A client with a name is answered on its own topics alone. One without is answered on the board's response
        topics and on those that a filter in `allowed` covers, never on the topics of one with a name.

        Raises
        ------
        RequestError
            As `validate_response_topic`.
        """
        if client is not None:
            validate_response_topic(topic)
            own = f"{BASE}/client/{client}/"
            if not topic.startswith(own) or topic == own:
                raise RequestError(
                    "forbidden", f"response topic: a client with a name is answered below {own}, as on {own}response"
                )
            return
        response = self.response()
        is_own = topic == response or topic.startswith(response + "/")
        validate_response_topic(topic, ("#",) if is_own else allowed, f"{response}/#")
        if topic.split("/")[:2] == [BASE, "client"]:
            raise RequestError(
                "forbidden", f"response topic: it is a client's own; ask on {self.generate()}/<its name> to use it"
            )

    def parse(self, topic: str) -> RequestTopic:
        """Return what a received topic asks for; raise `RequestError("bad_request")` for a bad client name."""
        for action in ("generate", "cancel"):
            own = self._of(action)
            if topic == own:
                return RequestTopic(action, None)
            if topic.startswith(own + "/"):
                client = topic[len(own) + 1 :]
                if not is_name(client):
                    raise RequestError("bad_request", "the client's name in the topic must be 1 to 32 of a-z 0-9 _ -")
                return RequestTopic(action, client)
        raise RequestError("bad_request", "not a topic of this board")

    def _of(self, what: str, client: str | None = None) -> str:
        return f"{BASE}/{self.board}/{what}" + ("" if client is None else f"/{client}")


def is_name(text: str) -> bool:
    """Whether a board or client may be called so."""
    return NAME_PATTERN.fullmatch(text) is not None and text not in RESERVED_NAMES


def validate_response_topic(topic: str, allowed: tuple[str, ...] = ("#",), *also: str) -> None:
    """Raise unless an answer may be published on `topic`.

    A broker closes the connection of whoever publishes on a malformed topic, so what passes here must be
    publishable anywhere.

    Raises
    ------
    RequestError
        `bad_request` for a topic that cannot be one, `forbidden` for one that belongs to boards or that no
        filter in `allowed` covers; `also` are named to the client beside these.
    """
    try:
        size = len(topic.encode("utf-8"))
    except UnicodeEncodeError:
        raise RequestError("bad_request", "response topic: holds half of a surrogate pair") from None
    if not 0 < size <= MAX_REPLY_BYTES:
        raise RequestError("bad_request", f"response topic: must have 1 to {MAX_REPLY_BYTES} bytes")
    if any(character in "+#" or _is_unfit(ord(character)) for character in topic):
        raise RequestError("bad_request", "response topic: must hold no wildcard and no control character")
    if topic.startswith("$"):
        raise RequestError("forbidden", "response topic: must not start with $")
    levels = topic.split("/")
    own = levels[0] == BASE and len(levels) > 1 and (levels[1] == "pool" or set(levels[2:3]) & _IN_OR_OWN)
    if (own and levels[1] != "client") or levels[0] == "homeassistant":
        raise RequestError("forbidden", "response topic: is one that boards listen or speak on")
    if not any(matches(pattern, topic) for pattern in allowed):
        named = ", ".join([*also, *allowed])
        raise RequestError(
            "forbidden", f"response topic: is not among those this board may answer on: {named} (its reply_topics)"
        )


def _is_unfit(code: int) -> bool:
    """Whether mosquitto takes the character for malformed: control characters and non-characters."""
    return code < 0x20 or 0x7F <= code <= 0x9F or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE


def matches(pattern: str, topic: str) -> bool:
    """Whether a topic filter covers a topic."""
    wanted, levels = pattern.split("/"), topic.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(levels) or level not in {"+", levels[index]}:
            return False
    return len(wanted) == len(levels)
