"""The desk where requests are taken in and answers handed out.

Every request that can be answered gets exactly one final: refused at once, or when the worker is done with it.
Runs on the service's thread and never waits. The journal's place is `RequestHandler._admit`, between the queue slot
and the
acknowledgement that follows `receive`.
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

RETRY_S: Final = 0.01
"""When to try a chunk again that met a connection going away, or whose forerunner is not written yet."""
WORKER_GRACE_S: Final = 2.0
"""How long after a deadline the worker may be silent before the final is sent without it."""
MAX_UNACKED_MESSAGES: Final = 64
"""Messages that the broker has not acknowledged, beyond which refusals wait."""
MAX_UNACKED_FINALS: Final = 1000
"""The same, beyond which no request is taken."""
EVENTS_RATE: Final = 20.0
"""Rejections a second that are told on the topic of events."""
READ_LIMIT: Final = 4 * packets.MAX_PAYLOAD_BYTES
"""How much of a payload that is too large is still read, for its id and where it wants its refusal."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is served: a name, the manifest's digest and defaults, and what computes its answers."""

    name: str
    digest: str
    sampling: SamplingParams
    worker: Worker
    """Started; closed by whoever made it."""
    details: dict[str, Any] = field(default_factory=dict)
    """More for `info`."""


class RequestHandler:
    """Takes requests in, follows their answers, and sends these.

    Parameters
    ----------
    config, topics, models
        What this board is, how it is addressed, what it serves: the first is for requests that name none.
    boot_id
        Names this run of the service.
    connection, outbox
        Where messages go that may be lost, and that may not.
    post
        Receives `ResponseUpdated` and `ResponseFinished`, on the worker's thread; the owner hands them to
        `on_response_updated`, `on_response_finished`.
    count_dropped
        Called for each refusal that is not sent, as there are too many.
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
        self._rejections = TokenBucket(EVENTS_RATE, 2 * EVENTS_RATE)
        self._keys = itertools.count()
        self._answers: dict[str, PendingResponse] = {}

    def __len__(self) -> int:
        """Return how many requests have no final yet."""
        return len(self._answers)

    # -- in ---------------------------------------------------------------------------------------------------

    def receive(self, message: Received) -> None:
        """Take in a message on one of the board's topics."""
        if message.retain:  # a broker keeps handing it out: an order from who knows when
            self._publish_event("rejected", None, None, reason="retained")
            return
        problem: RequestError | None = None
        action, client = "generate", None
        try:
            address = self._topics.parse(message.topic)
            action, client = address.action, address.client
        except RequestError as error:
            problem = error
            action = "cancel" if message.topic.startswith(self._topics.cancel() + "/") else "generate"
        if action == "cancel":
            if problem is None:
                self._cancel(client, message.payload)
            return
        new_id = "" if message.properties.correlation else uuid.uuid4().hex
        if message.decision.retry_after_s is not None:
            problem = self._too_often(message.decision.retry_after_s)
            envelope = request_codec.envelope_from_properties(message.properties, new_id)
        else:
            readable = message.payload if len(message.payload) <= READ_LIMIT else b""
            envelope = request_codec.parse_envelope(readable, message.properties, new_id)
        response_topic = envelope.response_topic
        if response_topic is None:
            response_topic = self._topics.response(client)
        try:
            self._topics.authorize_response_topic(response_topic, client, self._config.reply_topics)
        except RequestError as error:  # nowhere to answer
            self._publish_event("rejected", envelope.id, client, code=error.code, message=error.message)
            return
        try:
            if problem is not None:
                raise problem
            self._admit(message, envelope, client, response_topic)
        except RequestError as error:
            self._reject(message, envelope, client, response_topic, error)
        except Exception as error:
            log.exception("request %s failed at the desk", envelope.id)
            trouble = RequestError("internal", f"this is a fault of the service: {type(error).__name__}")
            self._reject(message, envelope, client, response_topic, trouble)

    def _admit(
        self, message: Received, envelope: request_codec.Envelope, client: str | None, response_topic: str
    ) -> None:
        if len(message.payload) > packets.MAX_PAYLOAD_BYTES:
            raise RequestError(
                "too_large",
                f"the payload has {len(message.payload)} bytes, the limit is {packets.MAX_PAYLOAD_BYTES}",
            )
        generate_request = request_codec.parse_request(envelope)
        model = self._chosen(generate_request.model)
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
        model.worker.submit(request, response.sink)
        self._answers[response.key] = response
        self._publish_event("accepted", response.id, client)

    def _too_often(self, retry_after_s: float) -> RequestError:
        return RequestError(
            "rate_limited",
            f"one client may send {self._config.client_rate:g} requests a second, {self._config.client_burst} at once,"
            f" {BYTES_PER_EXTRA_REQUEST} bytes of a message counted as one more",
            retry_after_s=round(max(0.1, retry_after_s), 1),
        )

    def _check_client_quota(self, client: str | None, session: str | None, model: ServedModel) -> None:
        """Raise `RequestError` where a client wants more than its share, or a session that it cannot have."""
        if client is None and session is not None and not self._config.share_unnamed:
            raise RequestError(
                "forbidden",
                f"session: clients without a name have none, as others could go on with it: ask on"
                f" {self._topics.generate()}/<name>, or serve with --share-unnamed",
            )
        most = self._config.most_places
        held = sum(response.client == client and response.model == model.name for response in self._answers.values())
        if held >= most:
            who = "clients without a name together have" if client is None else "this client has"
            raise RequestError(
                "busy", f"{who} {held} requests here, at most {most}", retry_after_s=model.worker.retry_after_s()
            )
        if len(self._outbox) >= MAX_UNACKED_FINALS:
            raise RequestError("busy", "the broker does not take our answers", retry_after_s=1.0)

    def _chosen(self, wanted: str | None) -> ServedModel:
        """Return the model of that name or digest; the first where none is named."""
        for model in self._models:
            if wanted in {None, model.name, model.digest}:
                return model
        names = ", ".join(repr(model.name) for model in self._models)
        only = " only" if len(self._models) == 1 else ""
        raise RequestError("model_not_found", f"model: this board serves {names}{only}")

    def _deadline(self, message: Received, timeout_s: float | None = None) -> float:
        allowed = [self._config.max_timeout_s, timeout_s, message.properties.expiry_s]
        return message.at + min(seconds for seconds in allowed if seconds is not None)

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
        """Cancel one of the client's requests, or all where none is named: those of a client with a name."""
        wanted = payload[:READ_LIMIT].decode("utf-8", "replace").strip()
        if client is None and wanted in {"", "PRESS"}:
            self._publish_event("rejected", None, None, reason="cancel without an id", code="forbidden")
            log.warning("a client without a name wants to cancel all: it may cancel by id, or ask under a name")
            return
        for response in self._answers.values():
            named = wanted in {"", "PRESS", response.id} or payload == response.correlation
            if response.client == client and named:
                response.cancel(response.key)

    # -- out --------------------------------------------------------------------------------------------------

    def on_response_updated(self, response: PendingResponse) -> None:
        """Note that an answer began or grew; send what there is, or leave it for `send_due`."""
        is_first = response.begin()
        self.send_due()
        if is_first:
            self._publish_event("started", response.id, response.client)

    def on_response_finished(self, response: PendingResponse, completion: Completion) -> None:
        """Send the rest and the final."""
        if self._answers.pop(response.key, None) is None:
            return  # given up by `fail_all`
        self._send_chunk(response)
        completion = dataclasses.replace(completion, id=response.id)
        if response.is_interrupted and completion.finish_reason == "cancelled":
            error = RequestError("interrupted", "the service stopped before the answer was whole")
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
        """When `send_due` has something to do, in seconds of `time.monotonic`."""
        if not self._connection.is_connected:
            return float("inf")
        due = min((response.due_at() for response in self._answers.values()), default=float("inf"))
        return min(due, self._rejection_queue.next_due(time.monotonic()))

    def send_due(self) -> None:
        """Send the chunks and the refusals whose time has come."""
        now = time.monotonic()
        if len(self._rejection_queue) and self._connection.is_connected:
            for packet in self._rejection_queue.take(now, max(0, MAX_UNACKED_MESSAGES - len(self._outbox))):
                self._outbox.send(packet)
        for response in self._answers.values():
            if response.due_at() > now or not self._connection.is_connected:
                continue
            if response.last is not None and not response.last.is_over:
                response.not_before = now + RETRY_S
                continue
            self._send_chunk(response)

    def end_overdue(self) -> None:
        """Send the finals of answers whose worker is silent past their deadlines: it is busy with something else."""
        now = time.monotonic()
        for response in list(self._answers.values()):
            if now > response.deadline + WORKER_GRACE_S:
                log.warning("request %s: %s is silent past the deadline", response.id, response.model)
                response.cancel(response.key)
                self.on_response_finished(response, Completion(response.id, response.text, (), "deadline"))

    def interrupt(self) -> None:
        """Cancel all; their finals say `interrupted`."""
        for response in self._answers.values():
            response.is_interrupted = True
            response.cancel(response.key)

    def fail_all(self, error: RequestError) -> None:
        """Send the finals that the worker will not bring."""
        for response in list(self._answers.values()):
            self.on_response_finished(response, Completion(response.id, "", (), "error", error=error))

    def _send_chunk(self, response: PendingResponse) -> None:
        text = response.take()
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
            log.warning("a chunk of %s is lost: %s", response.id, error)
            response.seq += 1  # a gap, so that the client sees it
            return
        if handle is None:
            response.put_back(text)
            response.not_before = now + RETRY_S
            return
        response.seq += 1
        response.last = handle
        response.not_before = now + response.chunk_ms / 1000

    def _send_final(
        self,
        completion: Completion,
        model: str,
        seq: int,
        response_topic: str,
        correlation: bytes | None,
        left_s: float,
    ) -> None:
        request_id, usage, timing = completion.id, completion.usage, completion.timing  # the text is kept once alone

        def too_large(why: str) -> packets.Packet:
            error = RequestError("too_large", f"the answer does not fit: {why}; ask for fewer tokens")
            without = Completion(request_id, "", (), "error", usage, timing, error=error)
            return self._make_final_packet(without, model, seq, response_topic, correlation, left_s)

        self._outbox.send(
            self._make_final_packet(completion, model, seq, response_topic, correlation, left_s), too_large
        )

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
        """Publish what happens to a request, never what it says; of rejections so many a second."""
        if event == "rejected" and not self._rejections.try_take(time.monotonic()):
            return
        body = {"event": event, "id": request_id, "client": client, **more}
        log.debug("%s", body)
        self._connection.tell(packets.Packet(self._topics.event, packets.write_json(body)))
