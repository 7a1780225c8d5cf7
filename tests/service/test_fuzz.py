"""Over a thousand hostile messages: the board serves on, and whoever can be answered is."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
from broker import Broker
from mqtt_client import Client
from served_board import serving

import edgelm.mqtt.board
from edgelm.config import ServeConfig
from edgelm.errors import RequestError
from edgelm.messages import SamplingParams
from edgelm.mqtt.topics import BoardTopics

VALID = {"v": 1, "id": "x", "prompt": "Once upon", "max_tokens": 3, "temperature": 0.5, "stop": ["a"], "stream": True}
LEAVES: list[Any] = [None, True, -1, 0, 1, 3, 1e308, 10**30, "", "x", "\0", "ü", "é" * 50, [], {}, [[]], "\x7f\x80"]
KEYS = [*VALID, "messages", "seed", "top_k", "top_p", "min_p", "regex", "choices", "json_schema", "logprobs", "model"]
KEYS += [
    "chunk_ms",
    "timeout_s",
    "priority",
    "session",
    "end_session",
    "response_topic",
    "repetition_penalty",
    "ignore_eos",
    "nonsense",
]
TOPICS = [
    "",
    "#",
    "a/+",
    "a/#",
    "$SYS/x",
    "x" * 257,
    "a\0b",
    "a\nb",
    "\ufffe",
    "homeassistant/x",
    "edgelm/pool/a/generate",
]
BATCH = 12
"""As many as a board takes at once, so that none is refused for being one too many."""


def _value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth < 2 and kind < 0.1:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 2 and kind < 0.2:
        return {rng.choice(KEYS): _value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(LEAVES)


def _payload(rng: random.Random, board: str) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return json.dumps(_value(rng)).encode()
    body = {**VALID, "max_tokens": rng.randrange(1, 4)}
    if kind == 2:  # one key gone wrong
        body[rng.choice(KEYS)] = _value(rng)
        return json.dumps(body).encode()
    if kind == 3:  # one byte gone wrong
        data = bytearray(json.dumps(body).encode())
        data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randrange(1, len(data) + 1)])
    hostile = rng.choice([*TOPICS, f"edgelm/{board}/generate", f"edgelm/{board}/status"])
    return json.dumps({**body, "response_topic": hostile}).encode()


def _can_answer_on(topic: str) -> bool:
    try:
        BoardTopics("other").check_reply(topic, None, ("#",))
    except RequestError:
        return False
    return True


def _is_answered(payload: bytes) -> bool:
    """Whether the payload leaves a topic to answer on, the property being absent."""
    try:
        body = json.loads(payload.decode())
    except ValueError:
        return True
    topic = body.get("response_topic") if isinstance(body, dict) else None
    return not isinstance(topic, str) or _can_answer_on(topic)


def test_a_thousand_hostile_payloads_leave_it_serving(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(20)
    most = {"client_rate": 10_000.0, "client_burst": 10_000, "client_places": 2 * BATCH, "share_unnamed": True}
    config = dataclasses.replace(config, reply_topics=("#",), **most)
    board = config.board
    topic = f"edgelm/{board}/generate"
    brief = SamplingParams(max_tokens=3)  # what is a prompt by accident is not answered at length
    real = edgelm.mqtt.board.describe
    monkeypatch.setattr(edgelm.mqtt.board, "describe", lambda *given: dataclasses.replace(real(*given), sampling=brief))
    named = [leaf for leaf in LEAVES if isinstance(leaf, str) and _can_answer_on(leaf)]
    with serving(config), Client(broker.port, "fuzz/#", f"edgelm/{board}/response", *named) as client:
        for first in range(0, 1200, BATCH):
            expected = []
            for number in range(first, first + BATCH):
                name, payload = f"{number}".encode(), _payload(rng, board)
                if rng.random() < 0.5:  # the answer's topic comes as a property, which wins over the payload
                    client.publish(topic, payload, reply=f"fuzz/{number}", correlation=name)
                    expected.append(name)
                else:
                    client.publish(topic, payload, correlation=name)
                    expected += [name] if _is_answered(payload) else []
            for action in ("cancel", "cancel/x", "cancel/X"):
                client.publish(f"edgelm/{board}/{action}", rng.randbytes(rng.randrange(9)), qos=0)

            def finals(expected: list[bytes] = expected) -> set[bytes | None]:
                return {m.correlation for m in client.heard if m.correlation and m.body["done"]} & set(expected)

            client.wait(lambda heard, expected=expected: finals() == set(expected), f"finals of {expected}")
            codes = {
                m.body["error"] and m.body["error"]["code"] for m in client.heard if m.correlation and m.body["done"]
            }
            assert codes <= {None, "bad_request", "model_not_found", "cancelled"}, codes
            client.heard.clear()
        client.publish(topic, {"prompt": "Once upon a time", "max_tokens": 1, "id": "last"}, reply="fuzz/last")
        assert client.final("last")["usage"]["completion_tokens"] == 1
