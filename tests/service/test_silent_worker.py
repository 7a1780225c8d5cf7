"""A worker that hangs: its requests still get final messages."""

from __future__ import annotations

import threading

import pytest
from broker import Broker
from mqtt_client import Client
from served_board import SlowEngine, serving

from edgelm.mqtt.service_config import ServeConfig


def test_the_service_ends_a_request_whose_worker_hangs(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, steps = threading.Event(), []

    def step(engine: SlowEngine) -> list:
        steps.append(None)
        if len(steps) > 3:
            goes_on.wait(60)
        return super(SlowEngine, engine).step()

    monkeypatch.setattr(SlowEngine, "step", step)
    topic = f"edgelm/{config.board}/generate"
    with serving(config, monkeypatch) as service, Client(broker.port, "reply/#") as client:
        body = {"prompt": "Once upon a time", "max_tokens": 90, "ignore_eos": True, "timeout_s": 0.5, "id": "stuck"}
        client.publish(topic, body, reply="reply/stuck")
        final = client.final("stuck")
        assert service._models[0].worker.stats().completed == 0  # the worker still hangs
        assert final["finish_reason"] == "deadline"
        assert final["error"]["code"] == "deadline"
        assert final["text"]  # the incomplete text
        goes_on.set()
        body = {"prompt": "Once", "max_tokens": 3, "id": "later"}
        client.publish(topic, body, reply="reply/later")
        assert client.final("later")["error"] is None
    assert [heard.topic for heard in client.heard].count("reply/stuck") == 1
