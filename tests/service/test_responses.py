"""Streamed and whole responses, their properties, and the board's own topics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count

import pytest
from broker import Broker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mqtt_client import Client, Heard
from served_board import serving

from edgelm.mqtt.service_config import ServeConfig

PROMPT = "Once upon a time"
NUMBERS = count()


def _bodies(heard: list[Heard], topic: str) -> list[dict[str, object]]:
    return [message.body for message in heard if message.topic == topic]


def _is_whole(heard: list[Heard], topic: str) -> bool:
    """Return whether the final message and as many chunks as its `seq` were received."""
    bodies = _bodies(heard, topic)
    final = next((body for body in bodies if body["done"]), None)
    return final is not None and len(bodies) == final["seq"] + 1


@pytest.fixture(scope="module", params=["5", "3.1.1"])
def version_client(request: pytest.FixtureRequest, broker: Broker) -> Iterator[tuple[Client, str]]:
    with Client(broker.port, f"reply/{request.param}/#", version=request.param) as connected:
        yield connected, request.param


PROMPTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(prompts=st.lists(PROMPTS, min_size=4, max_size=4), seed=st.integers(0, 2**31))
def test_streamed_text_equals_the_final_text(
    version_client: tuple[Client, str], common: str, prompts: list[str], seed: int
) -> None:
    client, version = version_client
    client.heard.clear()
    replies = [f"reply/{version}/{next(NUMBERS)}" for _ in prompts]
    for reply, prompt in zip(replies, prompts, strict=True):
        body = {
            "prompt": prompt,
            "stream": True,
            "chunk_ms": seed % 3,
            "max_tokens": 12,
            "temperature": 1.2,
            "seed": seed,
        }
        if version == "5":
            client.publish(f"edgelm/{common}/generate", body, reply=reply)
        else:
            client.publish(f"edgelm/{common}/generate", {**body, "response_topic": reply})
    heard = client.wait(lambda heard: all(_is_whole(heard, reply) for reply in replies), f"all of {replies}")
    for reply in replies:
        bodies = _bodies(heard, reply)
        final = next(body for body in bodies if body["done"])
        chunks = sorted((body for body in bodies if not body["done"]), key=lambda body: body["seq"])
        assert [chunk["seq"] for chunk in chunks] == list(range(final["seq"]))
        assert "".join(chunk["delta"] for chunk in chunks) == final["text"]
        assert all(chunk["delta"] for chunk in chunks)
        assert {body["id"] for body in bodies} == {final["id"]}
        assert final["error"] is None


def test_without_stream_there_is_exactly_one_message(client: Client, common: str) -> None:
    client.publish(f"edgelm/{common}/generate", {"prompt": PROMPT, "max_tokens": 30}, reply="reply/one")
    client.final(client.wait(lambda heard: client.on("reply/one"))[-1].body["id"])
    client.publish(f"edgelm/{common}/generate", {"prompt": PROMPT, "max_tokens": 1}, reply="reply/two")
    client.wait(lambda heard: client.on("reply/two"))
    assert len(client.on("reply/one")) == 1
    assert client.on("reply/one")[0].body["seq"] == 0


def test_chunks_are_merged_over_chunk_ms(broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    with serving(config, monkeypatch, step_s=0.05), Client(broker.port, "reply/#") as client:
        for chunk_ms in (0, 10_000):
            reply = f"reply/{chunk_ms}"
            body = {"prompt": PROMPT, "max_tokens": 40, "stream": True, "chunk_ms": chunk_ms}
            client.publish(f"edgelm/{config.board}/generate", body, reply=reply)
            bodies = _bodies(client.wait(lambda heard, reply=reply: _is_whole(heard, reply)), reply)
            counts[chunk_ms] = len(bodies) - 1
    assert counts[10_000] == 2  # the first token at once, the rest with the final
    assert counts[0] > 2


def test_qos_and_properties_of_a_response(client: Client, common: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 5, "stream": True, "timeout_s": 40}
    client.publish(f"edgelm/{common}/generate", body, reply="reply/q", correlation=b"\x00\xff\x01")
    client.wait(lambda heard: _is_whole(heard, "reply/q"))
    answers = client.on("reply/q")
    assert {(answer.body["done"], answer.qos) for answer in answers} == {(False, 0), (True, 1)}
    for answer in answers:
        assert answer.correlation == b"\x00\xff\x01"
        assert answer.body["id"] == "00ff01"
        assert answer.content_type == "application/json"
        assert answer.user == {"status": "200"}
        assert answer.expiry_s is not None
        assert 1 <= answer.expiry_s <= 40
        assert not answer.retain


def test_the_default_response_topics(client: Client, common: str) -> None:
    client.publish(f"edgelm/{common}/generate", {"prompt": PROMPT, "max_tokens": 1, "id": "unnamed"})
    client.publish(f"edgelm/{common}/generate/kitchen", {"prompt": PROMPT, "max_tokens": 1, "id": "named"})
    client.final("unnamed")
    client.final("named")
    topics = {message.body["id"]: message.topic for message in client.heard if message.topic.endswith("/response")}
    assert topics == {"unnamed": f"edgelm/{common}/response", "named": "edgelm/client/kitchen/response"}


def test_logprobs_and_constraints_are_supported(client: Client, common: str) -> None:
    body = {"prompt": PROMPT, "choices": ["yes", "no"], "logprobs": 2, "id": "choice"}
    client.publish(f"edgelm/{common}/generate", body, reply="reply/choice")
    final = client.final("choice")
    assert final["text"] in {"yes", "no"}
    assert len(final["logprobs"]) == len(final["tokens"])
    body = {"prompt": PROMPT, "regex": '\\{"n": [12]\\}', "id": "regex", "max_tokens": 40}
    client.publish(f"edgelm/{common}/generate", body, reply="reply/regex")
    assert client.final("regex")["json"]["n"] in {1, 2}


def test_the_same_seed_gives_the_same_answer(client: Client, common: str) -> None:
    for number in range(2):
        body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 1.0, "seed": 5, "id": f"seed-{number}"}
        client.publish(f"edgelm/{common}/generate", body, reply="reply/seed")
    first, second = client.final("seed-0"), client.final("seed-1")
    assert first["tokens"] == second["tokens"]
    assert len(first["tokens"]) == 20


def test_retained_messages_describe_the_board(broker: Broker, common: str) -> None:
    with Client(broker.port, f"edgelm/{common}/+") as newcomer:
        newcomer.wait(lambda heard: {message.topic.rsplit("/")[-1] for message in heard} >= {"status", "info", "state"})
        retained = {message.topic.rsplit("/")[-1]: message for message in newcomer.heard}
    assert all(message.retain for message in retained.values())
    assert retained["status"].payload == b"online"
    info = retained["info"].body
    assert info["protocol"] == 1
    assert info["durable"] is False
    assert len(info["models"][0]["digest"]) == 64
    assert info["limits"]["payload_bytes"] == 65536
    assert retained["status"].user == {"boot_id": info["boot_id"]}
    assert {"queue", "active", "tok_s", "rss_mb", "temp_c", "throttled"} <= set(retained["state"].body)
    assert retained["state"].body["rss_mb"] > 1


def test_events_report_progress_without_the_text(client: Client, common: str) -> None:
    client.publish(
        f"edgelm/{common}/generate", {"prompt": "a very secret prompt", "max_tokens": 3, "id": "e"}, reply="reply/e"
    )
    client.wait(lambda heard: any(b'"finished"' in message.payload and b'"e"' in message.payload for message in heard))
    events = [message.body for message in client.on(f"edgelm/{common}/event") if message.body["id"] == "e"]
    assert [event["event"] for event in events] == ["accepted", "started", "finished"]
    assert "secret" not in json.dumps(events)
