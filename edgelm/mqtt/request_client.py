"""The client: sends a request to a board and yields the response in order.

Detects that no response will come: no subscriber, board offline, timeout. A lost request is not sent again, because
boards do not recognize duplicates yet.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Final

from edgelm.errors import EdgelmError
from edgelm.mqtt import connection_events, packets, request_codec, response_codec
from edgelm.mqtt.broker_config import BrokerConfig
from edgelm.mqtt.connection import Connection
from edgelm.mqtt.topics import BASE, BoardTopics, is_name
from edgelm.mqtt.version_negotiation import MqttVersion

CONNECT_TIMEOUT_S: Final = 15.0
STATUS_TIMEOUT_S: Final = 3.0
"""How long to wait for the board's retained status. Over MQTT 5 the PUBACK reports sooner that there is no subscriber,
unless another client subscribes to the request topic."""
FINAL_GRACE_S: Final = 5.0
"""How long to wait for the final message after the deadline of the request."""
OFFLINE_TIMEOUT_S: Final = 2.0
"""How long the status must be offline, without a chunk, before the request fails: any client may have published it."""
OTHERS_TIMEOUT_S: Final = 1.0
OTHERS_QUIET_TIMEOUT_S: Final = 0.2
"""How long to wait for the names of other boards, for an error message: in all, and for the next one."""
MAX_OTHERS: Final = 100
MAX_OTHERS_NAMED: Final = 5

_NO_SUBSCRIBERS: Final = 0x10


class UnansweredError(EdgelmError):
    """No response came and none will come."""


class RequestClient:
    """A client of one board. Use it as a context manager, from one thread.

    Parameters
    ----------
    broker
        Broker URL and credentials. A user name that is allowed in a topic is the default of `client`.
    board
        Name of the board.
    client
        Name of the client. A client without a name has no sessions, and its prompts are not cached for later requests.
    protocol
        "5", with a fallback to 3.1.1 if the broker does not support 5; or "3.1.1".
    """

    def __init__(
        self, broker: BrokerConfig, board: str, client: str | None = None, *, protocol: MqttVersion = "5"
    ) -> None:
        run = uuid.uuid4().hex[:12]
        name = client or broker.user or ""
        self.client = name if is_name(name) else None
        self._topics = BoardTopics(board)
        self._response_topic = f"{self._topics.response(self.client)}/{run}"
        self._url = broker.url
        self._events: SimpleQueue[connection_events.Event] = SimpleQueue()
        self._connection = Connection(broker, f"edgelm-ask-{run}", self._events.put, protocol=protocol)
        self._is_online: bool | None = None
        self._offline_at = 0.0
        self._other_boards: set[str] = set()
        """Names of other boards that are online; filled by `_describe_other_boards`."""
        self._can_read_status = True

    def __enter__(self) -> RequestClient:
        self._connection.start()
        try:
            self._wait_for(connection_events.Subscribed, CONNECT_TIMEOUT_S)
        except BaseException:
            self._connection.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.stop()

    def stream(
        self, request: request_codec.GenerateRequest
    ) -> Iterator[response_codec.ResponseChunk | response_codec.FinalMessage]:
        """Send a request; yield its chunks in order without gaps, then the final message, which has the whole text.

        Closing the iterator early cancels the request.

        Raises
        ------
        UnansweredError
            If there is no such board, it goes offline, or no final message comes in time.
        """
        payload, properties = request_codec.write_request(
            request, self._response_topic, with_properties=self._connection.is_mqtt5
        )
        topic = self._topics.generate(self.client)
        handle = self._connection.publish(packets.Packet(topic, payload, qos=1, properties=properties))
        if handle is None:
            raise UnansweredError(f"the connection to {self._url} was lost")
        is_over = False
        try:
            for response in self._iter_responses(request, topic, handle.mid):
                is_over = isinstance(response, response_codec.FinalMessage)
                yield response
        finally:
            if not is_over:
                self._connection.publish(packets.Packet(self._topics.cancel(self.client), request.id.encode()))

    def _iter_responses(
        self, request: request_codec.GenerateRequest, topic: str, mid: int
    ) -> Iterator[response_codec.ResponseChunk | response_codec.FinalMessage]:
        begun = time.monotonic()
        timeout_s = float("inf") if request.timeout_s is None else request.timeout_s + FINAL_GRACE_S
        early: dict[int, response_codec.ResponseChunk] = {}
        seq = 0
        heard_at = begun
        while True:
            waited_s = time.monotonic() - begun
            if waited_s > timeout_s:
                raise UnansweredError(f"board {self._topics.board!r} sent no response within {timeout_s:.0f} s")
            event = self._next(min(1.0, timeout_s - waited_s))
            self._check_board(waited_s, heard_at)
            if isinstance(event, connection_events.Published) and event.mid == mid:
                self._check_puback(topic, event.reason)
            response = self._parse_own_response(event, request.id)
            if isinstance(response, response_codec.FinalMessage):
                yield response
                return
            if isinstance(response, response_codec.ResponseChunk):
                early[response.seq] = response
                heard_at = time.monotonic()
            while seq in early:
                yield early.pop(seq)
                seq += 1

    def _parse_own_response(
        self, event: connection_events.Event | None, request_id: str
    ) -> response_codec.ResponseChunk | response_codec.FinalMessage | None:
        if not isinstance(event, connection_events.Received) or event.topic != self._response_topic:
            return None
        try:
            response = response_codec.parse_response(event.payload)
        except response_codec.InvalidResponseError:  # a message of another program
            return None
        given = response.id if isinstance(response, response_codec.ResponseChunk) else response.completion.id
        return response if given == request_id else None

    def _check_puback(self, topic: str, reason: int) -> None:
        if reason == _NO_SUBSCRIBERS:
            raise self._no_board_error()
        if reason >= 0x80:
            raise UnansweredError(f"the broker {self._url} does not allow publishing on {topic} (reason code {reason})")

    def _check_board(self, waited_s: float, heard_at: float) -> None:
        if self._is_online is False and time.monotonic() - max(self._offline_at, heard_at) > OFFLINE_TIMEOUT_S:
            others = self._describe_other_boards()
            raise UnansweredError(f"board {self._topics.board!r} at {self._url} is offline{others}")
        if self._is_online is None and waited_s > STATUS_TIMEOUT_S and self._can_read_status:
            raise self._no_board_error()

    def _no_board_error(self) -> UnansweredError:
        start = f"start it with: edgelm serve --mqtt {self._url} --board {self._topics.board}"
        others = self._describe_other_boards() or f"; {start}"
        return UnansweredError(f"no board {self._topics.board!r} listens at {self._url}{others}")

    def _describe_other_boards(self) -> str:
        """Return a part of an error message that names other online boards; at most `MAX_OTHERS_NAMED` of them."""
        self._connection.subscribe(((f"{BASE}/+/status", 1),))
        until = time.monotonic() + OTHERS_TIMEOUT_S
        quiet_at = until
        while time.monotonic() < min(until, quiet_at) and len(self._other_boards) < MAX_OTHERS:
            event = self._next(max(0.0, min(until, quiet_at) - time.monotonic()))
            if isinstance(event, connection_events.Received | connection_events.Subscribed):
                quiet_at = time.monotonic() + OTHERS_QUIET_TIMEOUT_S
        if not self._other_boards:
            return ""
        named = ", ".join(sorted(self._other_boards)[:MAX_OTHERS_NAMED])
        more = len(self._other_boards) - MAX_OTHERS_NAMED
        return f"; online: {named}{' and more' if more > 0 else ''} (--board NAME)"

    # -- events -----------------------------------------------------------------------------------------------

    def _wait_for(self, kind: type, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            event = self._next(until - time.monotonic())
            if isinstance(event, connection_events.ConnectFailed):
                raise UnansweredError(f"no broker at {self._url}: {event.reason}")
            if isinstance(event, kind):
                return
        raise UnansweredError(f"no broker at {self._url}: it did not answer within {timeout_s:.0f} s")

    def _next(self, wait_s: float) -> connection_events.Event | None:
        """Return the next event after handling it, or None after `wait_s` seconds."""
        try:
            event = self._events.get(timeout=max(0.0, wait_s))
        except Empty:
            self._connection.maintain()
            return None
        if isinstance(event, connection_events.Received):
            self._connection.acknowledge(event)
            self._note_status(event)
        elif isinstance(event, connection_events.Connected):
            self._connection.subscribe(((self._response_topic, 1), (self._topics.status, 1)))
        elif isinstance(event, connection_events.MaintenanceNeeded):
            self._connection.maintain()
        elif isinstance(event, connection_events.Subscribed):
            if len(event.reasons) < 2:  # for the other boards' statuses, which are optional
                return event
            if event.reasons[0] >= 0x80:
                raise UnansweredError(f"the broker {self._url} does not allow a subscription to {self._response_topic}")
            self._can_read_status = event.reasons[1] < 0x80
        return event

    def _note_status(self, event: connection_events.Received) -> None:
        levels = event.topic.split("/")
        if len(levels) != 3 or levels[0] != BASE or levels[2] != "status":
            return
        is_online = event.payload == b"online"
        if levels[1] == self._topics.board:
            if self._is_online is not False and not is_online:
                self._offline_at = time.monotonic()
            self._is_online = is_online
        elif is_online and is_name(levels[1]) and len(self._other_boards) < MAX_OTHERS:
            self._other_boards.add(levels[1])


OnDelta = Callable[[str], None]
"""Receives each new piece of a response's text."""


def run_request(
    request_client: RequestClient, request: request_codec.GenerateRequest, on_delta: OnDelta | None = None
) -> response_codec.FinalMessage:
    """Send a request and return its final message; `on_delta` receives the text in pieces.

    The pieces joined are the final text; after a lost chunk the rest comes with the final message. A final text that
    does not begin with the pieces, which the protocol excludes, is passed as a whole on a new line.
    """
    received = ""
    for response in request_client.stream(request):
        if isinstance(response, response_codec.FinalMessage):
            text = response.completion.text
            if on_delta is not None and text != received:
                on_delta(text[len(received) :] if text.startswith(received) else f"\n{text}")
            return response
        received += response.delta
        if on_delta is not None:
            on_delta(response.delta)
    raise AssertionError("a stream ends with its final message")
