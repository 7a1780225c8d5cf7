"""The asking side: sends a request to a board and yields its answer in order.

Knows when nobody will answer: no subscriber, a board that is offline, a time that has passed. Sending a lost
request again needs the boards' deduplication, which is not there yet.
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

CONNECT_WITHIN_S: Final = 15.0
STATUS_WITHIN_S: Final = 3.0
"""How long a broker has to bring a board's retained status. One of MQTT 5 says sooner that nobody listens, unless
someone else reads along."""
GRACE_S: Final = 5.0
"""How much longer than the board's own deadline we wait for its word."""
OFFLINE_S: Final = 2.0
"""How long a board may be called offline, and say nothing, before we believe it: anyone may have published that."""
OTHERS_WITHIN_S: Final = 1.0
OTHERS_QUIET_S: Final = 0.2
"""How long to wait for other boards, for the error that names them: in all, and for one more."""
MOST_OTHERS: Final = 100
OTHERS_NAMED: Final = 5

_NO_SUBSCRIBERS: Final = 0x10


class UnansweredError(EdgelmError):
    """No answer came, and none will."""


class RequestClient:
    """A client of one board. Use as a context manager, from one thread.

    Parameters
    ----------
    broker
        Where, and as whom. A user name that can stand in a topic is the client's name too.
    board
        Whom to ask.
    client
        The client's name, in place of the user's. Without either it is one of the clients without a name, which have
        no sessions and whose earlier prompts are of no use to later ones.
    protocol
        "5", which falls back to 3.1.1 where the broker knows no other, or "3.1.1".
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
        self._others: set[str] = set()
        """Other boards that are online, once they have been asked for."""
        self._hears_board = True

    def __enter__(self) -> RequestClient:
        self._connection.start()
        try:
            self._wait_for(connection_events.Subscribed, CONNECT_WITHIN_S)
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
        """Ask, and yield the chunks in order without gaps, then the final, whose text is the truth.

        Leaving the loop early cancels the request.

        Raises
        ------
        UnansweredError
            When nobody listens, the board goes offline, or no final comes in time.
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
        patience_s = float("inf") if request.timeout_s is None else request.timeout_s + GRACE_S
        early: dict[int, response_codec.ResponseChunk] = {}
        seq = 0
        heard_at = begun
        while True:
            waited_s = time.monotonic() - begun
            if waited_s > patience_s:
                raise UnansweredError(f"board {self._topics.board!r} gave no answer within {patience_s:.0f} s")
            event = self._next(min(1.0, patience_s - waited_s))
            self._check_board(waited_s, heard_at)
            if isinstance(event, connection_events.Published) and event.mid == mid:
                self._check_sent(topic, event.reason)
            response = self._answer_in(event, request.id)
            if isinstance(response, response_codec.FinalMessage):
                yield response
                return
            if isinstance(response, response_codec.ResponseChunk):
                early[response.seq] = response
                heard_at = time.monotonic()
            while seq in early:
                yield early.pop(seq)
                seq += 1

    def _answer_in(
        self, event: connection_events.Event | None, request_id: str
    ) -> response_codec.ResponseChunk | response_codec.FinalMessage | None:
        if not isinstance(event, connection_events.Received) or event.topic != self._response_topic:
            return None
        try:
            response = response_codec.parse_response(event.payload)
        except response_codec.InvalidResponseError:  # someone else's message on our topic
            return None
        given = response.id if isinstance(response, response_codec.ResponseChunk) else response.completion.id
        return response if given == request_id else None

    def _check_sent(self, topic: str, reason: int) -> None:
        if reason == _NO_SUBSCRIBERS:
            raise self._no_board_error()
        if reason >= 0x80:
            raise UnansweredError(f"the broker {self._url} does not let us publish on {topic} (reason {reason})")

    def _check_board(self, waited_s: float, heard_at: float) -> None:
        if self._is_online is False and time.monotonic() - max(self._offline_at, heard_at) > OFFLINE_S:
            others = self._online_others()
            raise UnansweredError(f"board {self._topics.board!r} at {self._url} is offline{others}")
        if self._is_online is None and waited_s > STATUS_WITHIN_S and self._hears_board:
            raise self._no_board_error()

    def _no_board_error(self) -> UnansweredError:
        start = f"start it with: edgelm serve --mqtt {self._url} --board {self._topics.board}"
        others = self._online_others() or f"; {start}"
        return UnansweredError(f"no board {self._topics.board!r} listens at {self._url}{others}")

    def _online_others(self) -> str:
        """Return which other boards are online, for an error: some of them where there are many."""
        self._connection.subscribe(((f"{BASE}/+/status", 1),))
        until = time.monotonic() + OTHERS_WITHIN_S
        quiet_at = until
        while time.monotonic() < min(until, quiet_at) and len(self._others) < MOST_OTHERS:
            event = self._next(max(0.0, min(until, quiet_at) - time.monotonic()))
            if isinstance(event, connection_events.Received | connection_events.Subscribed):
                quiet_at = time.monotonic() + OTHERS_QUIET_S
        if not self._others:
            return ""
        named = ", ".join(sorted(self._others)[:OTHERS_NAMED])
        more = len(self._others) - OTHERS_NAMED
        return f"; online: {named}{' and more' if more > 0 else ''} (--board NAME)"

    # -- events -----------------------------------------------------------------------------------------------

    def _wait_for(self, kind: type, within_s: float) -> None:
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            event = self._next(until - time.monotonic())
            if isinstance(event, connection_events.ConnectFailed):
                raise UnansweredError(f"no broker at {self._url}: {event.reason}")
            if isinstance(event, kind):
                return
        raise UnansweredError(f"no broker at {self._url}: it gave no answer within {within_s:.0f} s")

    def _next(self, wait_s: float) -> connection_events.Event | None:
        """Return the next event, having done what the connection needs."""
        try:
            event = self._events.get(timeout=max(0.0, wait_s))
        except Empty:
            self._connection.maintain()
            return None
        if isinstance(event, connection_events.Received):
            self._connection.settle(event)
            self._note_status(event)
        elif isinstance(event, connection_events.Connected):
            self._connection.subscribe(((self._response_topic, 1), (self._topics.status, 1)))
        elif isinstance(event, connection_events.MaintenanceNeeded):
            self._connection.maintain()
        elif isinstance(event, connection_events.Subscribed):
            if len(event.reasons) < 2:  # of the others' statuses, which we can do without
                return event
            if event.reasons[0] >= 0x80:
                raise UnansweredError(f"the broker {self._url} does not let us subscribe to {self._response_topic}")
            self._hears_board = event.reasons[1] < 0x80
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
        elif is_online and is_name(levels[1]) and len(self._others) < MOST_OTHERS:
            self._others.add(levels[1])


OnDelta = Callable[[str], None]
"""Receives each further piece of an answer's text."""


def run_request(
    request_client: RequestClient, request: request_codec.GenerateRequest, on_delta: OnDelta | None = None
) -> response_codec.FinalMessage:
    """Ask, and return the final; `on_delta` gets the text as it grows, together exactly the final's text.

    Where a chunk was lost, the rest comes at once with the final. A final that does not go on from what was
    told (it never does so by this protocol) is told in full on a line of its own.
    """
    told = ""
    for response in request_client.stream(request):
        if isinstance(response, response_codec.FinalMessage):
            text = response.completion.text
            if on_delta is not None and text != told:
                on_delta(text[len(told) :] if text.startswith(told) else f"\n{text}")
            return response
        told += response.delta
        if on_delta is not None:
            on_delta(response.delta)
    raise AssertionError("a stream ends with its final")
