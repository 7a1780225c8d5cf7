"""The service of a board: announces it, publishes its state, dispatches requests, and shuts down cleanly.

The thread that calls `run` owns all state; paho's thread and the worker's thread only post events to it. Pools would
get a connection of their own; Home Assistant's discovery would be one more packet of the `Announcement`.
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
from edgelm.mqtt.announcement import Announcement
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
STATE_INTERVAL_S: Final = 10.0
CHANGED_STATE_INTERVAL_S: Final = 1.0
"""The same after the number of waiting or running requests changed."""
TICK_S: Final = 0.5
PERIODIC_INTERVAL_S: Final = 0.1
"""Interval of the work that need not follow every token."""
QUICK_LOSS_MAX_S: Final = 5.0
MAX_QUICK_LOSSES: Final = 3
"""This many short connections in a row mean that two boards with one client id end each other's connection."""
CANCEL_TIMEOUT_S: Final = 2.0
"""How long to wait for cancelled requests when the service stops."""
LEAVE_TIMEOUT_S: Final = 3.0
"""How long to wait for the broker's acknowledgements when the service stops."""
EVENTS_PER_ITERATION: Final = 256
MESSAGES_PER_ITERATION: Final = 4
"""Messages handled before the next events."""


@dataclass(frozen=True, slots=True)
class _MessagesWaiting:
    """Messages are waiting in `Service._incoming`."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Let running requests finish, then stop; a second one stops at once."""


class Service:
    """Answers requests over MQTT until it is stopped.

    Parameters
    ----------
    config
        Settings of the board.
    models
        The served models; the first answers requests that name none.
    on_online
        Called each time the board has published `online`.
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
        """Received messages, served in turn between clients, after all events."""
        self._incoming_lock = threading.Lock()
        limit = 4 * packets.MAX_PAYLOAD_BYTES
        self._policy = InboundPolicy(self._topics, config.client_rate, config.client_burst, limit, time.monotonic)
        self._announcement = Announcement(self._topics, self._boot_id, self._policy)
        broker = config.broker
        self._url = broker.url
        self._connection = Connection(
            broker,
            load_client_id(config.board),
            self._post,
            will=self._announcement.make_last_will(),
            will_delay_s=WILL_DELAY_S,
            session_expiry_s=SESSION_EXPIRY_S,
            packet_bytes=limit,
            policy=self._policy,
            protocol="3.1.1" if config.embedded_broker else "5",  # amqtt may not answer a CONNECT of MQTT 5
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

        self._failure: EdgelmError | None = None
        self._stop_by: float | None = None
        self._is_interrupted = False
        self._was_connected = False
        self._has_logged_loss = False
        self._connected_at = 0.0
        self._quick_losses = 0
        self._protocol = ""
        self._periodic_at = self._state_published_at = float("-inf")
        self._published_counts: tuple[int, int] = (0, 0)
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
        """Serve until `stop`, then send the remaining final messages and disconnect.

        Raises
        ------
        EdgelmError
            If the broker refuses the connection or the subscription, or if an engine failed.
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
        """Request the service to stop. May be called from any thread and from a signal handler."""
        self._events.put(Stop())

    # -- the loop ---------------------------------------------------------------------------------------------

    def _run_once(self) -> None:
        """Handle waiting events, then a few messages; wait for an event if there is nothing to do."""
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
            with self._incoming_lock:
                message = self._incoming.get() if len(self._incoming) else None
            if message is None:
                break
            self._handle(message)
        self._run_guarded(self._request_handler.send_due)
        if time.monotonic() - self._periodic_at >= PERIODIC_INTERVAL_S:
            self._run_guarded(self._run_periodic)

    def _post(self, event: connection_events.Event) -> None:
        """Queue an event. May be called from any thread."""
        if not isinstance(event, connection_events.Received):
            self._events.put(event)
            return
        with self._incoming_lock:
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
        self._run_guarded(lambda: self._handlers[type(event)](event), type(event).__name__)

    def _run_guarded(self, handle: Callable[[], None], name: str = "periodic work") -> None:
        """Call `handle`; log an exception, and stop the service for an `EdgelmError`."""
        try:
            handle()
        except EdgelmError as error:
            self._fail(error)
        except Exception:
            log.exception("handling %s failed", name)

    def _run_periodic(self) -> None:
        """Do the work of every `PERIODIC_INTERVAL_S`."""
        now = self._periodic_at = time.monotonic()
        self._connection.maintain()
        self._request_handler.end_overdue()
        if self._stop_by is None and len(self._outbox) < MAX_UNACKED_MESSAGES:
            self._announcement.republish_if_overwritten(self._outbox)
        for model in self._models:
            if model.worker.failure is not None:
                self._fail(EdgelmError(f"the engine of {model.name} failed: {model.worker.failure!r}"))
        if self._stop_by is not None and now >= self._stop_by and not self._is_interrupted:
            self._is_interrupted = True
            self._request_handler.interrupt()
        changed = self._count_requests() != self._published_counts
        if now - self._state_published_at >= (CHANGED_STATE_INTERVAL_S if changed else STATE_INTERVAL_S):
            self._publish_state()

    def _count_requests(self) -> tuple[int, int]:
        """Return the numbers of waiting and of running requests of all models together."""
        stats = [model.worker.stats() for model in self._models]
        return sum(each.queued for each in stats), sum(each.active for each in stats)

    def _drain(self) -> None:
        for model in self._models:
            model.worker.drain()

    def _fail(self, error: EdgelmError) -> None:
        """Stop the service because of an error, which `run` raises."""
        if self._failure is None:
            self._failure = error
            self._drain()
            self._stop_by = time.monotonic()

    def _is_over(self) -> bool:
        if self._stop_by is None:
            return False
        return not len(self._request_handler) or time.monotonic() > self._stop_by + CANCEL_TIMEOUT_S

    def _leave(self) -> None:
        """Send the remaining final messages and `offline`, and wait until the broker acknowledged them."""
        self._request_handler.fail_all(
            RequestError("interrupted", "the service stopped before the response was complete")
        )
        if not self._was_connected:
            return
        self._outbox.send(self._announcement.make_status("offline"))
        until = time.monotonic() + LEAVE_TIMEOUT_S
        while len(self._outbox) and time.monotonic() < until:
            self._run_once()

    # -- events -----------------------------------------------------------------------------------------------

    def _on_connected(self, event: connection_events.Connected) -> None:
        log.info("connected to %s (MQTT %s)", self._url, event.protocol)
        self._was_connected = True
        self._has_logged_loss = False
        self._connected_at = time.monotonic()
        self._protocol = event.protocol
        self._connection.subscribe(self._topics.subscriptions, self._announcement.watched_topics)
        self._outbox.on_connected(event)

    def _on_subscribed(self, event: connection_events.Subscribed) -> None:
        needed = len(self._topics.subscriptions)
        if any(reason >= 0x80 for reason in event.reasons[needed:]):
            log.info("the broker does not allow a subscription to %s: others' messages go unseen", self._topics.status)
        if any(reason >= 0x80 for reason in event.reasons[:needed]):
            names = ", ".join(name for name, _ in self._topics.subscriptions)
            self._fail(EdgelmError(f"the broker {self._url} does not allow a subscription to {names}: check its ACL"))
        elif self._stop_by is None:
            self._announce()

    def _announce(self) -> None:
        """Publish the retained `info`, `online` and the state."""
        self._announcement.publish(self._outbox, self._make_info())
        self._publish_state()
        names = ", ".join(model.name for model in self._models)
        log.info("serving %s as %s", names, self._topics.generate())
        if self._on_online is not None:
            self._on_online()

    def _on_disconnected(self, event: connection_events.Disconnected) -> None:
        log.warning("lost the connection to %s (%s); reconnecting", self._url, event.reason)
        self._has_logged_loss = True
        is_quick = time.monotonic() - self._connected_at < QUICK_LOSS_MAX_S
        self._quick_losses = self._quick_losses + 1 if is_quick else 0
        if event.is_taken_over or self._quick_losses == MAX_QUICK_LOSSES:  # not every broker reports a takeover
            log.error(
                "another board may use the name %r: each board needs its own name, set it with --board NAME",
                self._config.board,
            )
        # slow after quick losses: two boards of one name would end each other's connection without end
        self._connection.set_fast_reconnect(self._quick_losses < MAX_QUICK_LOSSES)

    def _on_connect_failed(self, event: connection_events.ConnectFailed) -> None:
        if event.is_final and not self._was_connected:
            self._fail(EdgelmError(f"broker {self._url}: {event.reason}"))
        elif not self._has_logged_loss:
            log.warning("no broker at %s (%s); retrying", self._url, event.reason)
            self._has_logged_loss = True

    def _on_received(self, event: connection_events.Received) -> None:
        try:
            if event.topic in self._announcement.watched_topics:
                self._announcement.on_received(event, is_mqtt5=self._connection.is_mqtt5)
            else:
                self._request_handler.receive(event)
        finally:
            self._connection.acknowledge(event)

    def _on_stop(self, _event: Stop) -> None:
        is_second = self._stop_by is not None
        self._drain()
        self._stop_by = time.monotonic() + (0 if is_second else self._config.drain_s)
        log.info("stopping; %d requests have no final message yet", len(self._request_handler))

    # -- messages about the board --------------------------------------------------------------------------------

    def _make_info(self) -> dict[str, Any]:
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
                    "places": self._config.max_client_requests,
                    "rows": self._config.client_limits.rows,
                    "sessions": self._config.client_sessions,
                    "rate": self._config.client_rate,
                    "burst": self._config.client_burst,
                },
            },
        }

    def _publish_state(self) -> None:
        self._published_counts, self._state_published_at = self._count_requests(), time.monotonic()
        stats = [model.worker.stats() for model in self._models]
        body = {
            "queue": self._published_counts[0],
            "active": self._published_counts[1],
            "completed": sum(each.completed for each in stats),
            "dropped": self._policy.dropped,
            "tok_s": round(sum(each.tok_s for each in stats), 2),
            "rss_mb": board_health.read_rss_mb(),
            "temp_c": board_health.read_temp_c(),
            "throttled": board_health.read_throttled(),
        }
        self._connection.publish_best_effort(packets.Packet(self._topics.state, packets.write_json(body), retain=True))
