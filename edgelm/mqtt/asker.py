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

from edgelm.brokerconfig import BrokerConfig
from edgelm.errors import EdgelmError
from edgelm.mqtt import asks, events, wire
from edgelm.mqtt.client import Connection
from edgelm.mqtt.greeting import Version
from edgelm.mqtt.topics import BASE, BoardTopics, is_name

CONNECT_WITHIN_S: Final = 15.0
STATUS_WITHIN_S: Final = 3.0
"""How long a broker has to bring a board's retained status. One of MQTT 5 says sooner that nobody listens, unless
someone else reads along."""
GRACE_S: Final = 5.0
"""How much longer than the board's own deadline we wait for its word."""

_NO_SUBSCRIBERS: Final = 0x10


class UnansweredError(EdgelmError):
    """No answer came, and none will."""


class Asker:
    """A client of one board. Use as a context manager, from one thread.

    Parameters
    ----------
    broker
        Where, and as whom. A user name that can stand in a topic is the client's name too. Without one it is one of the
        clients without a name, so that a later run finds its sessions, and an empty cancel stops its request.
    board
        Whom to ask.
    protocol
        "5", which falls back to 3.1.1 where the broker knows no other, or "3.1.1".
    """

    def __init__(self, broker: BrokerConfig, board: str, *, protocol: Version = "5") -> None:
        run = uuid.uuid4().hex[:12]
        user = broker.user or ""
        self.client = user if is_name(user) else None
        self._topics = BoardTopics(board)
        self._reply_topic = f"{self._topics.response(self.client or 'ask')}/{run}"
        self._url = broker.url
        self._events: SimpleQueue[events.Event] = SimpleQueue()
        self._connection = Connection(broker, f"edgelm-ask-{run}", self._events.put, protocol=protocol)
        self._boards: dict[str, bool] = {}
        """Every board heard of, and whether it is online."""
        self._hears_boards = True

    def __enter__(self) -> Asker:
        self._connection.start()
        try:
            self._wait_for(events.Subscribed, CONNECT_WITHIN_S)
        except BaseException:
            self._connection.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.stop()

    def stream(self, ask: asks.Ask) -> Iterator[wire.Delta | wire.Outcome]:
        """Ask, and yield the chunks in order without gaps, then the final, whose text is the truth.

        Leaving the loop early cancels the request.

        Raises
        ------
        UnansweredError
            When nobody listens, the board goes offline, or no final comes in time.
        """
        payload, properties = asks.write_ask(ask, self._reply_topic, with_properties=self._connection.is_mqtt5)
        topic = self._topics.generate(self.client)
        sending = self._connection.publish(wire.Packet(topic, payload, qos=1, properties=properties))
        if sending is None:
            raise UnansweredError(f"the connection to {self._url} was lost")
        is_over = False
        try:
            for answer in self._answers(ask, topic, sending.mid):
                is_over = isinstance(answer, wire.Outcome)
                yield answer
        finally:
            if not is_over:
                self._connection.publish(wire.Packet(self._topics.cancel(self.client), ask.id.encode()))

    def _answers(self, ask: asks.Ask, topic: str, mid: int) -> Iterator[wire.Delta | wire.Outcome]:
        begun = time.monotonic()
        patience_s = float("inf") if ask.timeout_s is None else ask.timeout_s + GRACE_S
        early: dict[int, wire.Delta] = {}
        seq = 0
        while True:
            waited_s = time.monotonic() - begun
            if waited_s > patience_s:
                raise UnansweredError(f"board {self._topics.board!r} gave no answer within {patience_s:.0f} s")
            event = self._next(min(1.0, patience_s - waited_s))
            self._check_board(waited_s)
            if isinstance(event, events.Published) and event.mid == mid:
                self._check_sent(topic, event.reason)
            answer = self._answer_in(event, ask.id)
            if isinstance(answer, wire.Outcome):
                yield answer
                return
            if isinstance(answer, wire.Delta):
                early[answer.seq] = answer
            while seq in early:
                yield early.pop(seq)
                seq += 1

    def _answer_in(self, event: events.Event | None, request_id: str) -> wire.Delta | wire.Outcome | None:
        if not isinstance(event, events.Received) or event.topic != self._reply_topic:
            return None
        try:
            answer = wire.parse_answer(event.payload)
        except wire.WireError:  # someone else's message on our topic
            return None
        given = answer.id if isinstance(answer, wire.Delta) else answer.completion.id
        return answer if given == request_id else None

    def _check_sent(self, topic: str, reason: int) -> None:
        if reason == _NO_SUBSCRIBERS:
            raise self._nobody()
        if reason >= 0x80:
            raise UnansweredError(f"the broker {self._url} does not let us publish on {topic} (reason {reason})")

    def _check_board(self, waited_s: float) -> None:
        is_online = self._boards.get(self._topics.board)
        if is_online is False:
            raise UnansweredError(f"board {self._topics.board!r} at {self._url} is offline{self._others()}")
        if is_online is None and waited_s > STATUS_WITHIN_S and self._hears_boards:
            raise self._nobody()

    def _nobody(self) -> UnansweredError:
        start = f"start it with: edgelm serve --mqtt {self._url} --board {self._topics.board}"
        return UnansweredError(
            f"no board {self._topics.board!r} listens at {self._url}{self._others() or f'; {start}'}"
        )

    def _others(self) -> str:
        others = sorted(board for board, is_online in self._boards.items() if is_online)
        return f"; online: {', '.join(others)} (--board NAME)" if others else ""

    # -- events -----------------------------------------------------------------------------------------------

    def _wait_for(self, kind: type, within_s: float) -> None:
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            event = self._next(until - time.monotonic())
            if isinstance(event, events.ConnectFailed):
                raise UnansweredError(f"no broker at {self._url}: {event.reason}")
            if isinstance(event, kind):
                return
        raise UnansweredError(f"no broker at {self._url}: it gave no answer within {within_s:.0f} s")

    def _next(self, wait_s: float) -> events.Event | None:
        """Return the next event, having done what the connection needs."""
        try:
            event = self._events.get(timeout=max(0.0, wait_s))
        except Empty:
            self._connection.tend()
            return None
        if isinstance(event, events.Received):
            self._connection.settle(event)
            self._note_status(event)
        elif isinstance(event, events.Connected):
            self._connection.subscribe(((self._reply_topic, 1), (f"{BASE}/+/status", 1)))
        elif isinstance(event, events.NeedsCare):
            self._connection.tend()
        elif isinstance(event, events.Subscribed):
            if event.reasons[0] >= 0x80:
                raise UnansweredError(f"the broker {self._url} does not let us subscribe to {self._reply_topic}")
            self._hears_boards = event.reasons[1] < 0x80
        return event

    def _note_status(self, event: events.Received) -> None:
        levels = event.topic.split("/")
        if len(levels) == 3 and levels[0] == BASE and levels[2] == "status":
            self._boards[levels[1]] = event.payload == b"online"


OnDelta = Callable[[str], None]
"""Receives each further piece of an answer's text."""


def answer_to(asker: Asker, ask: asks.Ask, on_delta: OnDelta | None = None) -> wire.Outcome:
    """Ask, and return the final; `on_delta` gets the text as it grows, together exactly the final's text.

    Where a chunk was lost, the rest comes at once with the final. A final that does not go on from what was
    told (it never does so by this protocol) is told in full on a line of its own.
    """
    told = ""
    for answer in asker.stream(ask):
        if isinstance(answer, wire.Outcome):
            text = answer.completion.text
            if on_delta is not None and text != told:
                on_delta(text[len(told) :] if text.startswith(told) else f"\n{text}")
            return answer
        told += answer.delta
        if on_delta is not None:
            on_delta(answer.delta)
    raise AssertionError("a stream ends with its final")
