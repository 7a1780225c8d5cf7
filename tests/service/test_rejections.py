"""Invalid requests, cancels and deadlines: each has its error code, and the board keeps running."""

from __future__ import annotations

import json
from typing import Any

import pytest
from broker import Broker
from mqtt_client import Client
from served_board import SlowEngine, serving

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.mqtt.service_config import ServeConfig

PROMPT = "Once upon a time"


def _is_alive(client: Client, board: str) -> None:
    client.publish(f"edgelm/{board}/generate", {"prompt": PROMPT, "max_tokens": 2, "id": "alive"}, reply="reply/alive")
    assert client.final("alive")["text"]


@pytest.mark.parametrize(
    ("payload", "code", "names"),
    [
        (b"\xff\xfe\xfd", "bad_request", "UTF-8"),
        (b"", "bad_request", "prompt"),
        (b'{"prompt": 7}', "bad_request", "prompt"),
        (b'{"prompt": "a", "colour": "red"}', "bad_request", "colour"),
        (b'{"prompt": "a", "session": ""}', "bad_request", "session"),
        (b'{"prompt": "a", "end_session": true}', "bad_request", "end_session"),
        (b'{"session": "a"}', "bad_request", "prompt"),
        (b'{"prompt": "a", "temperature": -1}', "bad_request", "temperature"),
        (b'{"prompt": "a", "model": "gpt-5"}', "model_not_found", "model"),
        (json.dumps({"prompt": "a " * 600}).encode(), "bad_request", "context"),
        (b'{"prompt": "a", "regex": "("}', "bad_request", ""),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "bad_request", "template"),
        (b"x" * (65 * 1024), "too_large", "65536"),
    ],
)
def test_bad_requests(client: Client, common: str, served_bundle: str, payload: bytes, code: str, names: str) -> None:
    if names == "template" and open_bundle(served_bundle).manifest.chat_template is not None:
        pytest.skip("this bundle has a chat template: stories260K has none")
    client.publish(f"edgelm/{common}/generate", payload, reply="reply/bad", correlation=b"bad")
    final = client.final("bad")
    assert final["finish_reason"] == "error"
    assert final["error"]["code"] == code
    assert names in final["error"]["message"]
    assert final["text"] == ""
    assert client.on("reply/bad")[0].user == {
        "status": {"bad_request": "400", "model_not_found": "404"}.get(code, "413")
    }
    _is_alive(client, common)


def test_the_response_topic_of_a_65_kib_payload_is_read(client: Client, common: str) -> None:
    body = {"prompt": "x" * (65 * 1024), "id": "large", "response_topic": "reply/large"}
    client.publish(f"edgelm/{common}/generate", body)
    assert client.final("large")["error"]["code"] == "too_large"


def test_the_board_survives_a_payload_of_1_mib(client: Client, common: str) -> None:
    client.publish(f"edgelm/{common}/generate", b"x" * 2**20, reply="reply/mib")
    _is_alive(client, common)


@pytest.mark.parametrize("client_name", ["Kitchen", "a/b", "pool"])
def test_a_bad_client_name(client: Client, common: str, client_name: str) -> None:
    client.publish(f"edgelm/{common}/generate/{client_name}", PROMPT, reply="reply/name", correlation=b"name")
    assert client.final("name")["error"]["code"] == "bad_request"


@pytest.mark.parametrize("topic", ["foo/#", "foo/+", "a\nb", "x" * 300, "edgelm/other/generate", "homeassistant/x"])
def test_a_request_without_a_valid_response_topic_is_rejected_by_an_event(
    client: Client, common: str, topic: str
) -> None:
    client.publish(f"edgelm/{common}/generate", {"prompt": PROMPT, "id": "lost", "response_topic": topic})
    client.wait(lambda heard: any(b'"rejected"' in message.payload for message in heard))
    event = client.on(f"edgelm/{common}/event")[-1].body
    assert (event["event"], event["id"]) == ("rejected", "lost")
    assert event["code"] in {"bad_request", "forbidden"}
    _is_alive(client, common)


def test_a_retained_request_is_dropped(broker: Broker, config: ServeConfig) -> None:
    topic = f"edgelm/{config.board}/generate"
    with Client(broker.port, "reply/#", f"edgelm/{config.board}/event") as client:
        client.publish(topic, {"prompt": PROMPT, "id": "old"}, reply="reply/old", retain=True)
        with serving(config):
            client.wait(lambda heard: any(b'"retained"' in message.payload for message in heard))
            _is_alive(client, config.board)
        client.publish(topic, b"", retain=True)
        assert not client.on("reply/old")


def test_only_the_allowed_reply_topics_are_used(broker: Broker, config: ServeConfig) -> None:
    config = ServeConfig(mqtt=config.mqtt, model=config.model, board=config.board, reply_topics=("reply/#",))
    with serving(config), Client(broker.port, "#") as client:
        body = {"prompt": PROMPT, "max_tokens": 1, "id": "elsewhere"}
        client.publish(f"edgelm/{config.board}/generate", body, reply="other/topic")
        client.wait(lambda heard: any(b'"forbidden"' in message.payload for message in heard))
        _is_alive(client, config.board)
        assert not client.on("other/topic")


def test_a_cancelled_request_keeps_its_text(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = f"edgelm/{config.board}"
    topics = ("reply/#", "edgelm/client/#", f"{base}/event")
    with serving(config, monkeypatch, step_s=0.05), Client(broker.port, *topics) as client:

        def begin(name: str, who: str = "") -> str:
            body = {"prompt": PROMPT, "max_tokens": 400, "stream": True, "id": name}
            reply = f"edgelm/client/{who}/{name}" if who else f"reply/{name}"
            client.publish(f"{base}/generate/{who}" if who else f"{base}/generate", body, reply=reply)
            client.wait(lambda heard: client.on(reply))
            return reply

        begin("by-id")
        not_mine = begin("not-mine", "kitchen")
        client.publish(f"{base}/cancel", "nothing-like-it", qos=0)
        client.publish(f"{base}/cancel/stranger", "", qos=0)
        client.publish(f"{base}/cancel", "by-id", qos=0)
        final = client.final("by-id")
        assert (final["finish_reason"], final["error"]["code"]) == ("cancelled", "cancelled")
        assert 0 < final["usage"]["completion_tokens"] < 400
        assert "".join(m.body["delta"] for m in client.on("reply/by-id") if not m.body["done"]) == final["text"]
        assert client.on("reply/by-id")[-1].user == {"status": "499"}
        begin("pressed", "hall")
        client.publish(f"{base}/cancel/hall", "PRESS", qos=0)
        assert client.final("pressed")["finish_reason"] == "cancelled"
        assert not any(message.body["done"] for message in client.on(not_mine))
        client.publish(f"{base}/cancel/kitchen", "", qos=0)
        assert client.final("not-mine")["finish_reason"] == "cancelled"


@pytest.mark.parametrize("by", ["expiry", "timeout_s", "limit"])
def test_the_deadline_holds_in_the_queue_and_while_decoding(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    limit = 1.5 if by == "limit" else 300
    config = ServeConfig(
        mqtt=config.mqtt, model=config.model, board=config.board, max_batch=1, max_timeout_s=limit, threads=1
    )
    topic = f"edgelm/{config.board}/generate"
    with serving(config, monkeypatch, step_s=0.05), Client(broker.port, "reply/#") as client:
        body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 400}
        if by == "timeout_s":
            body["timeout_s"] = 1.5
        expiry_s = 2 if by == "expiry" else None
        client.publish(topic, {**body, "id": "runs", "stream": True}, reply="reply/runs", expiry_s=expiry_s)
        client.publish(topic, {**body, "id": "waits"}, reply="reply/waits", expiry_s=expiry_s)
        runs, waits = client.final("runs"), client.final("waits")
    for final in (runs, waits):
        assert (final["finish_reason"], final["error"]["code"]) == ("deadline", "deadline")
    assert runs["text"]
    assert waits["usage"]["completion_tokens"] < runs["usage"]["completion_tokens"] < 400
    assert client.on("reply/runs")[-1].user == {"status": "408"}


def test_a_short_deadline_behind_a_long_request(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(mqtt=config.mqtt, model=config.model, board=config.board, max_batch=1, threads=1)
    topic = f"edgelm/{config.board}/generate"
    with serving(config, monkeypatch, step_s=0.05), Client(broker.port, "reply/#") as client:
        client.publish(topic, {"prompt": PROMPT, "max_tokens": 400, "id": "long", "stream": True}, reply="reply/long")
        client.wait(lambda heard: client.on("reply/long"))
        client.publish(topic, {"prompt": PROMPT, "id": "short"}, reply="reply/short", expiry_s=1)
        short = client.final("short")
        assert short["error"]["code"] == "deadline"
        assert short["usage"]["completion_tokens"] == 0
        assert not any(message.body["done"] for message in client.on("reply/long"))


def test_a_hundred_requests_get_a_hundred_final_messages(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(config, monkeypatch, step_s=0.01), Client(broker.port, "reply/#") as client:
        for number in range(100):
            body = {"prompt": PROMPT, "max_tokens": 20, "id": f"n{number}", "stream": number % 2 == 0}
            client.publish(f"edgelm/{config.board}/generate", body, reply="reply/many")
        finals = [client.final(f"n{number}") for number in range(100)]
    codes = [final["error"] and final["error"]["code"] for final in finals]
    assert set(codes) == {None, "busy"}
    assert codes.count(None) >= config.max_client_requests
    assert all(final["error"]["retry_after_s"] > 0 for final in finals if final["error"])
    assert sum(message.body["done"] for message in client.heard) == 100


def test_a_failing_step_is_an_internal_error(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = f"edgelm/{config.board}/generate"
    with serving(config, monkeypatch), Client(broker.port, "reply/#") as client:
        monkeypatch.setattr(SlowEngine, "failure", RuntimeError("the accelerator fell off"))
        client.publish(topic, {"prompt": PROMPT, "id": "unlucky"}, reply="reply/unlucky")
        assert client.final("unlucky")["error"]["code"] == "internal"
        assert client.on("reply/unlucky")[0].user == {"status": "500"}
        monkeypatch.setattr(SlowEngine, "failure", None)
        _is_alive(client, config.board)
