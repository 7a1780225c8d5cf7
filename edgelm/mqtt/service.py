"""A board at a broker: says what it is and how it fares, takes requests in, and leaves in good order.

One thread, the caller of `run`, owns all state; paho's thread and the worker's only post events to it. Later
residents: pools get a connection of their own beside this one, Home Assistant's discovery is one more retained
message in `_announce`.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final

from edgelm._version import __version__
from edgelm.engine.fairness import FairQueue
from edgelm.engine.sessions import MAX_SESSIONS
from edgelm.errors import EdgelmError, RequestError
from edgelm.mqtt import board_health, connection_events, packets
from edgelm.mqtt.client_id import load_client_id
from edgelm.mqtt.connection import Connection
from edgelm.mqtt.inbound_policy import InboundPolicy
from edgelm.mqtt.outbox import Outbox
from edgelm.mqtt.pending_response import ResponseFinished, ResponseUpdated
from edgelm.mqtt.request_handler import MAX_UNACKED_MESSAGES, RequestHandler, ServedModel
from edgelm.mqtt.service_config import ServeConfig
from edgelm.mqtt.topics import BoardTopics

log = logging.getLogger(__name__)

SESSION_EXPIRY_S: Final = 300
WILL_DELAY_S: Final = 3
STATE_EVERY_S: Final = 10.0
STATE_CHANGED_S: Final = 1.0
"""How soon a change of the queue is told."""
TICK_S: Final = 0.5
PERIODIC_INTERVAL_S: Final = 0.1
"""What need not be looked at after every token."""
QUICK_LOSS_S: Final = 5.0
QUICK_LOSSES: Final = 3
"""So many connections in a row that lived no longer: two boards of one name take them from each other."""
CANCELLED_WITHIN_S: Final = 2.0
LEAVE_WITHIN_S: Final = 3.0


EVENTS_PER_ITERATION: Final = 256
MESSAGES_PER_ITERATION: Final = 4
"""Messages that are looked at before the next events."""
PUT_RIGHT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class _MessagesWaiting:
    """Messages wait."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish what runs, then leave; a second one leaves at once."""


class Service:
    """Answers over MQTT until told to stop.

    Parameters
    ----------
    config
        The board's settings.
    models
        What is served, and by whom; the first is for requests that name none.
    on_online
        Called each time the board has said `online`.
    """

    def __init__(
        self, config: ServeConfig, models: Sequence[ServedModel], on_online: Callable[[], None] | None = None
    ) -> None:
        self._config = config
        self._models = models
        self._on_online = on_online
        self._boot_id = uuid.uuid4().hex[:16]
        self._topics = BoardTopics(config.board)
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._incoming: FairQueue[connection_events.Received] = FairQueue()
        """Messages that wait, in turns between clients, behind all events."""
        self._arrived_lock = threading.Lock()
        limit = 4 * packets.MAX_PAYLOAD_BYTES
        self._policy = InboundPolicy(self._topics, config.client_rate, config.client_burst, limit, time.monotonic)
        broker = config.broker
        self._url = broker.url
        self._connection = Connection(
            broker,
            load_client_id(config.board),
            self._post,
            will=self._status("offline"),
            will_delay_s=WILL_DELAY_S,
            session_expiry_s=SESSION_EXPIRY_S,
            packet_bytes=limit,
            gate=self._policy,
            protocol="3.1.1" if config.embedded_broker else "5",  # amqtt may never answer a greeting of 5
        )
        self._outbox = Outbox(self._connection)
        self._request_handler = RequestHandler(
            config,
            self._topics,
            models,
            self._boot_id,
            self._connection,
            self._outbox,
            self._events.put,
            self._policy.count_dropped,
        )
        self._announcement: tuple[packets.Packet, ...] = ()
        """What is retained of this board, as it was said last."""
        self._is_overwritten = self._said_overwritten = False
        self._put_right_at = float("-inf")
        self._failure: EdgelmError | None = None
        self._stop_by: float | None = None
        self._is_interrupted = False
        self._was_connected = False
        self._said_away = False
        self._connected_at = 0.0
        self._quick_losses = 0
        self._protocol = ""
        self._cared_at = self._state_at = float("-inf")
        self._state: tuple[int, int] = (0, 0)
        self._handlers: dict[type, Callable[[Any], None]] = {
            connection_events.Connected: self._on_connected,
            connection_events.Disconnected: self._on_disconnected,
            connection_events.ConnectFailed: self._on_connect_failed,
            connection_events.Subscribed: self._on_subscribed,
            connection_events.Published: self._outbox.on_published,
            connection_events.Received: self._on_received,
            connection_events.MaintenanceNeeded: lambda _: self._connection.maintain(),
            ResponseUpdated: lambda event: self._request_handler.on_response_updated(event.response),
            ResponseFinished: lambda event: self._request_handler.on_response_finished(
                event.response, event.completion
            ),
            Stop: self._on_stop,
            _MessagesWaiting: lambda _: None,
        }

    def run(self) -> None:
        """Serve until `stop`, then leave in good order.

        Raises
        ------
        EdgelmError
            When the broker will not have us, or the engine died.
        """
        self._connection.start()
        try:
            while not self._is_over():
                self._run_once()
            self._leave()
        finally:
            self._connection.stop()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Begin to stop. Callable from any thread and from a signal handler."""
        self._events.put(Stop())

    # -- the loop ---------------------------------------------------------------------------------------------

    def _run_once(self) -> None:
        """Handle the events that are there, then a few messages; wait for an event where there is nothing to do."""
        wait_s = (
            0.0 if len(self._incoming) else max(0.0, min(self._request_handler.next_due() - time.monotonic(), TICK_S))
        )
        event: Any = self._next_event(wait_s)
        handled = 0
        while event is not None:
            self._handle(event)
            handled += 1
            event = self._next_event(0.0) if handled < EVENTS_PER_ITERATION else None
        for _ in range(MESSAGES_PER_ITERATION):
            with self._arrived_lock:
                message = self._incoming.get() if len(self._incoming) else None
            if message is None:
                break
            self._handle(message)
        self._do(self._request_handler.send_due)
        if time.monotonic() - self._cared_at >= PERIODIC_INTERVAL_S:
            self._do(self._run_periodic)

    def _post(self, event: connection_events.Event) -> None:
        """Take an event in, on any thread."""
        if not isinstance(event, connection_events.Received):
            self._events.put(event)
            return
        with self._arrived_lock:
            self._incoming.put(event.decision.client, event)
            is_first = len(self._incoming) == 1
        if is_first:
            self._events.put(_MessagesWaiting())

    def _next_event(self, wait_s: float) -> Any:
        try:
            return self._events.get(timeout=wait_s) if wait_s else self._events.get_nowait()
        except Empty:
            return None

    def _handle(self, event: Any) -> None:
        self._do(lambda: self._handlers[type(event)](event), type(event).__name__)

    def _do(self, what: Callable[[], None], name: str = "what is due") -> None:
        """Do a part of the work, and live on where it fails."""
        try:
            what()
        except EdgelmError as error:
            self._fail(error)
        except Exception:
            log.exception("handling %s failed", name)

    def _run_periodic(self) -> None:
        """Do what is due now and then."""
        now = self._cared_at = time.monotonic()
        self._connection.maintain()
        self._request_handler.end_overdue()
        self._republish_overwritten()
        for model in self._models:
            if model.worker.failure is not None:
                self._fail(EdgelmError(f"the engine of {model.name} died: {model.worker.failure!r}"))
        if self._stop_by is not None and now >= self._stop_by and not self._is_interrupted:
            self._is_interrupted = True
            self._request_handler.interrupt()
        changed = self._load() != self._state
        if now - self._state_at >= (STATE_CHANGED_S if changed else STATE_EVERY_S):
            self._tell_state()

    def _load(self) -> tuple[int, int]:
        """Return how many requests wait, and how many run, for all models together."""
        stats = [model.worker.stats() for model in self._models]
        return sum(each.queued for each in stats), sum(each.active for each in stats)

    def _drain(self) -> None:
        for model in self._models:
            model.worker.drain()

    def _fail(self, error: EdgelmError) -> None:
        """Leave because of an error."""
        if self._failure is None:
            self._failure = error
            self._drain()
            self._stop_by = time.monotonic()

    def _is_over(self) -> bool:
        if self._stop_by is None:
            return False
        return not len(self._request_handler) or time.monotonic() > self._stop_by + CANCELLED_WITHIN_S

    def _leave(self) -> None:
        """Answer who is still waiting, say `offline`, and wait until the broker has it all."""
        self._request_handler.fail_all(RequestError("interrupted", "the service stopped before the answer was whole"))
        if not self._was_connected:
            return
        self._outbox.send(self._status("offline"))
        until = time.monotonic() + LEAVE_WITHIN_S
        while len(self._outbox) and time.monotonic() < until:
            self._run_once()

    # -- events -----------------------------------------------------------------------------------------------

    def _on_connected(self, event: connection_events.Connected) -> None:
        log.info("connected to %s (MQTT %s)", self._url, event.protocol)
        self._was_connected = True
        self._said_away = False
        self._connected_at = time.monotonic()
        self._protocol = event.protocol
        self._connection.subscribe(self._topics.subscriptions, (self._topics.status, self._topics.info))
        self._outbox.on_connected(event)

    def _on_subscribed(self, event: connection_events.Subscribed) -> None:
        needed = len(self._topics.subscriptions)
        if any(reason >= 0x80 for reason in event.reasons[needed:]):
            log.info("the broker does not let us see who else publishes on %s", self._topics.status)
        if any(reason >= 0x80 for reason in event.reasons[:needed]):
            names = ", ".join(name for name, _ in self._topics.subscriptions)
            self._fail(EdgelmError(f"the broker {self._url} does not let us subscribe to {names}: check its ACL"))
        elif self._stop_by is None:
            self._announce()

    def _announce(self) -> None:
        """Say what this board is, then that it is there."""
        info = packets.Packet(self._topics.info, packets.write_json(self._info()), qos=1, retain=True)
        self._announcement = (info, self._status("online"))
        for packet in self._announcement:
            self._outbox.send(packet)
        self._is_overwritten = self._policy.is_overwritten = False
        self._tell_state()
        names = ", ".join(model.name for model in self._models)
        log.info("serving %s as %s", names, self._topics.generate())
        if self._on_online is not None:
            self._on_online()

    def _on_disconnected(self, event: connection_events.Disconnected) -> None:
        log.warning("lost the broker %s (%s); trying again until it is back", self._url, event.reason)
        self._said_away = True
        is_quick = time.monotonic() - self._connected_at < QUICK_LOSS_S
        self._quick_losses = self._quick_losses + 1 if is_quick else 0
        if event.is_taken_over or self._quick_losses == QUICK_LOSSES:  # not every broker says so itself
            log.error(
                "does another board call itself %r? Each needs a name of its own: --board NAME", self._config.board
            )
        self._connection.set_fast_reconnect(
            self._quick_losses < QUICK_LOSSES
        )  # two would take the place from each other forever

    def _on_connect_failed(self, event: connection_events.ConnectFailed) -> None:
        if event.is_final and not self._was_connected:
            self._fail(EdgelmError(f"broker {self._url}: {event.reason}"))
        elif not self._said_away:
            log.warning("no broker at %s (%s); trying again until there is one", self._url, event.reason)
            self._said_away = True

    def _on_received(self, event: connection_events.Received) -> None:
        try:
            if event.topic in {self._topics.status, self._topics.info}:
                self._note_overwritten(event)
            else:
                self._request_handler.receive(event)
        finally:
            self._connection.settle(event)

    def _note_overwritten(self, event: connection_events.Received) -> None:
        """Note that someone published on a topic of our own; over MQTT 3.1.1 it may have been ourselves."""
        said = {packet.topic: packet.payload for packet in self._announcement}
        if self._connection.is_mqtt5 or event.payload != said.get(event.topic, event.payload):
            self._is_overwritten = True

    def _republish_overwritten(self) -> None:
        """Say again what we are where someone else said something else, at most once a second."""
        now = time.monotonic()
        if not (self._is_overwritten or self._policy.is_overwritten) or not self._announcement:
            return
        if (
            self._stop_by is not None
            or now - self._put_right_at < PUT_RIGHT_S
            or len(self._outbox) >= MAX_UNACKED_MESSAGES
        ):
            return
        self._put_right_at = now
        self._is_overwritten = self._policy.is_overwritten = False
        for packet in self._announcement:
            self._outbox.send(packet)
        if not self._said_overwritten:
            self._said_overwritten = True
            log.warning(
                "someone else publishes on %s or %s: put right, now and from now on; the broker's ACL should forbid it."
                " Another board of the same name does so too: each needs a name of its own, --board NAME",
                self._topics.status,
                self._topics.info,
            )

    def _on_stop(self, _event: Stop) -> None:
        again = self._stop_by is not None
        self._drain()
        self._stop_by = time.monotonic() + (0 if again else self._config.drain_s)
        log.info("stopping; %d requests under way", len(self._request_handler))

    # -- what the board says of itself ---------------------------------------------------------------------------

    def _status(self, word: str) -> packets.Packet:
        properties = packets.Properties(is_text=True, user=(("boot_id", self._boot_id),))
        return packets.Packet(self._topics.status, word.encode(), qos=1, retain=True, properties=properties)

    def _info(self) -> dict[str, Any]:
        return {
            "protocol": packets.PROTOCOL,
            "version": __version__,
            "board": self._config.board,
            "boot_id": self._boot_id,
            "durable": False,
            "mqtt": self._protocol,
            "models": [{"name": model.name, "digest": model.digest, **model.details} for model in self._models],
            "limits": {
                "payload_bytes": packets.MAX_PAYLOAD_BYTES,
                "queue": self._config.queue,
                "max_batch": self._config.max_batch,
                "timeout_s": self._config.max_timeout_s,
                "sessions": MAX_SESSIONS,
                "client": {
                    "places": self._config.most_places,
                    "rows": self._config.client_limits.rows,
                    "sessions": self._config.client_sessions,
                    "rate": self._config.client_rate,
                    "burst": self._config.client_burst,
                },
            },
        }

    def _tell_state(self) -> None:
        self._state, self._state_at = self._load(), time.monotonic()
        stats = [model.worker.stats() for model in self._models]
        body = {
            "queue": self._state[0],
            "active": self._state[1],
            "completed": sum(each.completed for each in stats),
            "dropped": self._policy.dropped,
            "tok_s": round(sum(each.tok_s for each in stats), 2),
            "rss_mb": board_health.rss_mb(),
            "temp_c": board_health.temp_c(),
            "throttled": board_health.is_throttled(),
        }
        self._connection.tell(packets.Packet(self._topics.state, packets.write_json(body), retain=True))
