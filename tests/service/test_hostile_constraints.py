"""Constraints that would crash or block a process affect only the client that sent them."""

from __future__ import annotations

import pytest
from broker import Broker
from mqtt_client import Client
from served_board import serving

from edgelm.mqtt.service_config import ServeConfig

HOSTILE = [
    {"json_schema": {"const": -9223372036854775807}},
    {"json_schema": {"type": "integer", "multipleOf": 9999991}},
    {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000_000}},
    {"regex": "((a{1000}){1000}){1000}"},
    {"regex": "(" * 5000 + "a" + ")" * 5000},
]


@pytest.mark.parametrize("constraint", HOSTILE, ids=["constant", "multiple", "items", "repeated", "deep"])
def test_a_hostile_constraint_affects_only_its_client(
    broker: Broker, config: ServeConfig, constraint: dict[str, object]
) -> None:
    topic = f"edgelm/{config.board}/generate"
    with serving(config), Client(broker.port, "reply/#") as client:
        warm = {"prompt": "a", "regex": "b", "id": "warm", "max_tokens": 2}
        client.publish(topic, warm, reply="reply/warm")  # starts the process that checks constraints
        assert client.final("warm")["error"] is None
        client.publish(topic, {"prompt": "x", "id": "evil", "max_tokens": 5, **constraint}, reply="reply/evil")
        client.publish(topic, {"prompt": "Once", "id": "victim", "max_tokens": 5}, reply="reply/victim")
        victim = client.final("victim")
        assert victim["error"] is None
        evil = client.final("evil")
        assert evil["error"] is None or evil["error"]["code"] == "bad_request"
        client.publish(topic, {"prompt": "Once", "id": "after", "max_tokens": 5}, reply="reply/after")
        assert client.final("after")["error"] is None
