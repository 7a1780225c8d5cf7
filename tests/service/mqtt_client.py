"""A paho client that stores all received messages; independent of edgelm."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

PATIENCE_S = 40.0


@dataclass
class Heard:
    topic: str
    payload: bytes
    qos: int
    retain: bool
    correlation: bytes | None
    expiry_s: int | None
    user: dict[str, str]
    content_type: str | None
    at: float

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.payload)


class Client:
    """Use as a context manager. `version` is "5" or "3.1.1"."""

    def __init__(self, port: int, *topics: str, version: str = "5") -> None:
        self.heard: list[Heard] = []
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        self._topics = topics
        self._is_5 = version == "5"
        self._client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5 if self._is_5 else paho.MQTTv311
        )
        self._client.reconnect_delay_set(1, 1)
        self._client.on_message = self._on_message
        self._client.on_connect = lambda *_: self._client.subscribe([(topic, 1) for topic in topics])
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.connect_async("127.0.0.1", port)

    def __enter__(self) -> Client:
        self._client.loop_start()
        assert self._subscribed.wait(PATIENCE_S), "no subscription"
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        def of(name: str) -> Any:
            return getattr(message.properties, name, None)

        heard = Heard(
            message.topic,
            bytes(message.payload),
            message.qos,
            message.retain,
            of("CorrelationData"),
            of("MessageExpiryInterval"),
            dict(of("UserProperty") or ()),
            of("ContentType"),
            time.monotonic(),
        )
        with self._changed:
            self.heard.append(heard)
            self._changed.notify_all()

    def publish(
        self,
        topic: str,
        payload: bytes | str | dict[str, Any],
        *,
        reply: str | None = None,
        correlation: bytes | None = None,
        expiry_s: int | None = None,
        qos: int = 1,
        retain: bool = False,
    ) -> int:
        """Publish, and return the reason code of the PUBACK (0 with QoS 0)."""
        properties = Properties(PacketTypes.PUBLISH)
        if reply is not None:
            properties.ResponseTopic = reply
        if correlation is not None:
            properties.CorrelationData = correlation
        if expiry_s is not None:
            properties.MessageExpiryInterval = expiry_s
        data = json.dumps(payload) if isinstance(payload, dict) else payload
        info = self._client.publish(topic, data, qos, retain, properties if self._is_5 else None)
        info.wait_for_publish(PATIENCE_S)
        return info.rc

    def wait(self, enough: Callable[[list[Heard]], object], what: str = "the expected message") -> list[Heard]:
        """Return all received messages as soon as `enough` of them is true."""
        until = time.monotonic() + PATIENCE_S
        with self._changed:
            while not enough(self.heard):
                left_s = until - time.monotonic()
                assert left_s > 0, f"{what} did not come; heard {self.heard[-5:]}"
                self._changed.wait(left_s)
            return list(self.heard)

    def on(self, topic: str) -> list[Heard]:
        return [heard for heard in self.heard if heard.topic == topic]

    def final(self, request_id: str) -> dict[str, Any]:
        """Wait for the final message of a request; return its body."""

        def finals(heard: list[Heard]) -> list[dict[str, Any]]:
            bodies = [json.loads(message.payload) for message in heard if message.payload.startswith(b'{"id"')]
            return [body for body in bodies if body["done"] and body["id"] == request_id]

        return finals(self.wait(finals, f"the final message of {request_id}"))[0]
