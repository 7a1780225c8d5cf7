"""Handles requests: parses, admits or rejects them, and publishes the responses.

Every request with a valid response topic gets exactly one final message: a rejection at once, or the result when the
worker completes it. Runs on the service's thread and never waits. A journal of requests would be written in
`RequestHandler._admit`, after the worker's queue accepted the request and before the PUBACK that follows `receive`.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from edgelm.engine.worker import Worker
from edgelm.errors import RequestError
from edgelm.mqtt import packets, request_codec, response_codec
from edgelm.mqtt.connection import Connection
from edgelm.mqtt.connection_events import PacketTooLargeError, Received
from edgelm.mqtt.inbound_policy import BYTES_PER_EXTRA_REQUEST
from edgelm.mqtt.outbox import Outbox
from edgelm.mqtt.pending_response import PendingResponse, ResponseFinished, ResponseUpdated
from edgelm.mqtt.rate_limit import TokenBucket
from edgelm.mqtt.rejection_queue import RejectionQueue
from edgelm.mqtt.service_config import ServeConfig
from edgelm.mqtt.topics import BoardTopics
from edgelm.types import Completion, Request, SamplingParams

log = logging.getLogger(__name__)

CHUNK_RETRY_S: Final = 0.01
"""When to retry a chunk if the connection was lost or the chunk before is not written to the socket yet."""
WORKER_GRACE_S: Final = 2.0
"""How long after a deadline the handler waits for the worker before it sends the final message itself."""
MAX_UNACKED_MESSAGES: Final = 64
"""While more packets are not acknowledged by the broker, rejections wait."""
MAX_UNACKED_FINALS: Final = 1000
"""While more packets are not acknowledged by the broker, requests are rejected."""
EVENTS_RATE: Final = 20.0
"""Rejections a second that are published on the event topic."""
MAX_READ_BYTES: Final = 4 * packets.MAX_PAYLOAD_BYTES
"""A larger payload is not parsed. One that is too large but below this size is parsed for its id and response topic."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A served model: name, digest and sampling defaults of its bundle, and the worker that runs it."""

    name: str
    digest: str
    sampling: SamplingParams
    worker: Worker
    """Already started; closed by the code that created it."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further keys for the `info` topic."""


class RequestHandler:
    """Admits requests and publishes their responses.

    Parameters
    ----------
    config, topics, models
        Settings, topics and models of the board. The first model answers requests that name none.
    boot_id
        Id of this run of the service.
    connection, outbox
        Send packets of QoS 0 and of QoS 1.
    post
        Receives `ResponseUpdated` and `ResponseFinished`, on the worker's thread; the owner passes them to
        `on_response_updated` and `on_response_finished`.
    count_dropped
        Called for each rejection that is dropped because too many wait.
    """

    def __init__(
        self,
        config: ServeConfig,
        topics: BoardTopics,
        models: Sequence[ServedModel],
        boot_id: str,
        connection: Connection,
        outbox: Outbox,
        post: Callable[[ResponseUpdated | ResponseFinished], None],
        count_dropped: Callable[[], None],
    ) -> None:
        self._config = config
        self._topics = topics
        self._models = models
        self._boot_id = boot_id
        self._connection = connection
        self._outbox = outbox
        self._post = post
        self._count_dropped = count_dropped
        self._rejection_queue = RejectionQueue()
        self._rejection_events = TokenBucket(EVENTS_RATE, 2 * EVENTS_RATE)
        self._keys = itertools.count()
        self._pending_responses: dict[str, PendingResponse] = {}

    def __len__(self) -> int:
        """Return the number of requests without a final message."""
        return len(self._pending_responses)

    # -- requests ---------------------------------------------------------------------------------------------

    def receive(self, message: Received) -> None:
        """Handle a message on one of the board's topics."""
        if message.retain:  # the broker sends it again at every subscription, however old it is
            self._publish_event("rejected", None, None, reason="retained")
            return
        problem: RequestError | None = None
        action, client = "generate", None
        try:
            topic = self._topics.parse(message.topic)
            action, client = topic.action, topic.client
        except RequestError as error:
            problem = error
            action = "cancel" if message.topic.startswith(self._topics.cancel() + "/") else "generate"
        if action == "cancel":
            if problem is None:
                self._cancel(client, message.payload)
            return
        new_id = "" if message.properties.correlation else uuid.uuid4().hex
        if message.decision.retry_after_s is not None:
            problem = self._rate_limited_error(message.decision.retry_after_s)
            envelope = request_codec.envelope_from_properties(message.properties, new_id)
        else:
            payload = message.payload if len(message.payload) <= MAX_READ_BYTES else b""
            envelope = request_codec.parse_envelope(payload, message.properties, new_id)
        response_topic = envelope.response_topic
        if response_topic is None:
            response_topic = self._topics.response(client)
        try:
            self._topics.authorize_response_topic(response_topic, client, self._config.reply_topics)
        except RequestError as error:  # there is no topic for a rejection
            self._publish_event("rejected", envelope.id, client, code=error.code, message=error.message)
            log.warning("request %s cannot be answered: %s", envelope.id, error.message)
            return
        try:
            if problem is not None:
                raise problem
            self._admit(message, envelope, client, response_topic)
        except RequestError as error:
            self._reject(message, envelope, client, response_topic, error)
        except Exception as error:
            log.exception("request %s: handling it failed", envelope.id)
            internal = RequestError("internal", f"this is a fault of the service: {type(error).__name__}")
            self._reject(message, envelope, client, response_topic, internal)

    def _admit(
        self, message: Received, envelope: request_codec.Envelope, client: str | None, response_topic: str
    ) -> None:
        if len(message.payload) > packets.MAX_PAYLOAD_BYTES:
            raise RequestError(
                "too_large",
                f"the payload has {len(message.payload)} bytes, the limit is {packets.MAX_PAYLOAD_BYTES}",
            )
        generate_request = request_codec.parse_request(envelope)
        model = self._select_model(generate_request.model)
        self._check_client_quota(client, generate_request.session, model)
        response = PendingResponse(
            key=str(next(self._keys)),
            id=generate_request.id,
            client=client,
            correlation=envelope.correlation,
            model=model.name,
            cancel=model.worker.cancel,
            response_topic=response_topic,
            stream=generate_request.stream,
            chunk_ms=generate_request.chunk_ms,
            deadline=self._deadline(message, generate_request.timeout_s),
            post=self._post,
        )
        request = Request(
            id=response.key,
            sampling=model.sampling.replace(**generate_request.sampling),
            prompt=generate_request.prompt,
            messages=generate_request.messages,
            constraint=generate_request.constraint,
            deadline=response.deadline,
            session=generate_request.session,
            client=client,
            end_session=generate_request.end_session,
            tools=generate_request.tools,
            template_vars=generate_request.template_vars,
            system=generate_request.system,
            raw=generate_request.raw,
            is_cache_isolated=client is None and not self._config.share_unnamed,
        )
        model.worker.submit(request, response.on_chunk)
        self._pending_responses[response.key] = response
        self._publish_event("accepted", response.id, client)

    def _rate_limited_error(self, retry_after_s: float) -> RequestError:
        return RequestError(
            "rate_limited",
            f"one client may send {self._config.client_rate:g} requests a second and {self._config.client_burst} at"
            f" once; each {BYTES_PER_EXTRA_REQUEST} bytes of a message count as one more request",
            retry_after_s=round(max(0.1, retry_after_s), 1),
        )

    def _check_client_quota(self, client: str | None, session: str | None, model: ServedModel) -> None:
        """Raise `RequestError` if the client has too many requests here, or may not have a session."""
        if client is None and session is not None and not self._config.share_unnamed:
            raise RequestError(
                "forbidden",
                f"session: a client without a name cannot have one, since others could continue it; send the request to"
                f" {self._topics.generate()}/<name>, or start the board with --share-unnamed",
            )
        allowed = self._config.max_client_requests
        count = sum(
            response.client == client and response.model == model.name for response in self._pending_responses.values()
        )
        if count >= allowed:
            owner = "clients without a name together have" if client is None else "this client has"
            raise RequestError(
                "busy",
                f"{owner} {count} requests here; allowed are {allowed}",
                retry_after_s=model.worker.retry_after_s(),
            )
        if len(self._outbox) >= MAX_UNACKED_FINALS:
            raise RequestError("busy", "the broker does not acknowledge this board's responses", retry_after_s=1.0)

    def _select_model(self, name: str | None) -> ServedModel:
        """Return the model with that name or digest; the first model for None."""
        for model in self._models:
            if name in {None, model.name, model.digest}:
                return model
        names = ", ".join(repr(model.name) for model in self._models)
        only = " only" if len(self._models) == 1 else ""
        raise RequestError("model_not_found", f"model: this board serves {names}{only}")

    def _deadline(self, message: Received, timeout_s: float | None = None) -> float:
        allowed = [self._config.max_timeout_s, timeout_s, message.properties.expiry_s]
        return message.received_at + min(seconds for seconds in allowed if seconds is not None)

    def _reject(
        self,
        message: Received,
        envelope: request_codec.Envelope,
        client: str | None,
        response_topic: str,
        error: RequestError,
    ) -> None:
        self._publish_event("rejected", envelope.id, client, code=error.code)
        completion = Completion(envelope.id, "", (), "error", error=error)
        left_s = self._deadline(message) - time.monotonic()
        packet = self._make_final_packet(
            completion, self._models[0].name, 0, response_topic, envelope.correlation, left_s
        )
        if not self._rejection_queue.add(client, packet):
            self._count_dropped()

    def _cancel(self, client: str | None, payload: bytes) -> None:
        """Cancel the request with the id in the payload, or all requests of a named client if there is no id."""
        request_id = payload[:MAX_READ_BYTES].decode("utf-8", "replace").strip()
        cancels_all = request_id in {"", "PRESS"}
        if client is None and cancels_all:
            self._publish_event("rejected", None, None, reason="cancel without an id", code="forbidden")
            log.warning("rejected a cancel of all requests by a client without a name: it must give an id")
            return
        for response in self._pending_responses.values():
            is_meant = cancels_all or request_id == response.id or payload == response.correlation
            if response.client == client and is_meant:
                response.cancel(response.key)

    # -- responses --------------------------------------------------------------------------------------------

    def on_response_updated(self, response: PendingResponse) -> None:
        """Send a started or updated response's text if a chunk is due."""
        is_first = response.mark_started()
        self.send_due()
        if is_first:
            self._publish_event("started", response.id, response.client)

    def on_response_finished(self, response: PendingResponse, completion: Completion) -> None:
        """Send the remaining text and the final message."""
        if self._pending_responses.pop(response.key, None) is None:
            return  # its final message was sent by `end_overdue` or `fail_all`
        self._send_chunk(response)
        completion = dataclasses.replace(completion, id=response.id)
        if response.is_interrupted and completion.finish_reason == "cancelled":
            error = RequestError("interrupted", "the service stopped before the response was complete")
            completion = dataclasses.replace(completion, finish_reason="error", error=error)
        left_s = response.deadline - time.monotonic()
        self._send_final(
            completion, response.model, response.seq, response.response_topic, response.correlation, left_s
        )
        self._publish_event(
            "finished",
            response.id,
            response.client,
            finish_reason=completion.finish_reason,
            completion_tokens=completion.usage.completion_tokens,
            total_ms=round(completion.timing.total_ms, 1),
        )

    def next_due(self) -> float:
        """Return when to call `send_due` next, in seconds of `time.monotonic`."""
        if not self._connection.is_connected:
            return float("inf")
        due = min((response.due_at() for response in self._pending_responses.values()), default=float("inf"))
        return min(due, self._rejection_queue.next_due(time.monotonic()))

    def send_due(self) -> None:
        """Send the chunks and rejections that are due."""
        now = time.monotonic()
        if len(self._rejection_queue) and self._connection.is_connected:
            for packet in self._rejection_queue.take(now, max(0, MAX_UNACKED_MESSAGES - len(self._outbox))):
                self._outbox.send(packet)
        for response in self._pending_responses.values():
            if response.due_at() > now or not self._connection.is_connected:
                continue
            if response.is_last_chunk_written():
                self._send_chunk(response)
            else:
                response.delay_chunk(now + CHUNK_RETRY_S)

    def end_overdue(self) -> None:
        """Send the final messages of requests whose worker has not reacted to their deadlines."""
        now = time.monotonic()
        for response in list(self._pending_responses.values()):
            if now > response.deadline + WORKER_GRACE_S:
                log.warning("request %s: %s did not react to the deadline", response.id, response.model)
                response.cancel(response.key)
                self.on_response_finished(response, Completion(response.id, response.text, (), "deadline"))

    def interrupt(self) -> None:
        """Cancel all requests; their final messages have the error `interrupted`."""
        for response in self._pending_responses.values():
            response.is_interrupted = True
            response.cancel(response.key)

    def fail_all(self, error: RequestError) -> None:
        """Send a final message with `error` for every pending request."""
        for response in list(self._pending_responses.values()):
            self.on_response_finished(response, Completion(response.id, "", (), "error", error=error))

    def _send_chunk(self, response: PendingResponse) -> None:
        text = response.take_text()
        if not text:
            return
        now = time.monotonic()
        packet = packets.Packet(
            response.response_topic,
            response_codec.write_chunk(response_codec.ResponseChunk(response.id, response.seq, text)),
            properties=response_codec.make_response_properties(response.correlation, response.deadline - now),
        )
        try:
            handle = self._connection.publish(packet)
        except PacketTooLargeError as error:
            log.warning("request %s: a chunk was not sent: %s", response.id, error)
            response.mark_chunk_lost()
            return
        if handle is None:
            response.put_back(text)
            response.delay_chunk(now + CHUNK_RETRY_S)
            return
        response.mark_chunk_sent(handle, now)

    def _send_final(
        self,
        completion: Completion,
        model: str,
        seq: int,
        response_topic: str,
        correlation: bytes | None,
        left_s: float,
    ) -> None:
        request_id, usage, timing = completion.id, completion.usage, completion.timing  # so the closure holds no text

        def make_substitute(why: str) -> packets.Packet:
            error = RequestError("too_large", f"the response does not fit: {why}; request fewer tokens")
            without_text = Completion(request_id, "", (), "error", usage, timing, error=error)
            return self._make_final_packet(without_text, model, seq, response_topic, correlation, left_s)

        packet = self._make_final_packet(completion, model, seq, response_topic, correlation, left_s)
        self._outbox.send(packet, make_substitute)

    def _make_final_packet(
        self,
        completion: Completion,
        model: str,
        seq: int,
        response_topic: str,
        correlation: bytes | None,
        left_s: float,
    ) -> packets.Packet:
        final = response_codec.FinalMessage(completion, seq, self._topics.board, model, self._boot_id)
        properties = response_codec.make_response_properties(correlation, left_s, final.error)
        return packets.Packet(response_topic, response_codec.write_final_message(final), qos=1, properties=properties)

    def _publish_event(self, event: str, request_id: str | None, client: str | None, **more: Any) -> None:
        """Publish an event without any text of the request; at most `EVENTS_RATE` rejections a second."""
        if event == "rejected" and not self._rejection_events.try_take(time.monotonic()):
            return
        body = {"event": event, "id": request_id, "client": client, **more}
        log.debug("%s", body)
        self._connection.publish_best_effort(packets.Packet(self._topics.event, packets.write_json(body)))
