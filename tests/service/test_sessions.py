"""Sessions over MQTT: a client sends only new text, and other clients cannot continue its sessions."""

from __future__ import annotations

import json
from itertools import count, pairwise
from typing import Any

import pytest
from broker import Broker
from mqtt_client import Client
from served_board import serving

from edgelm.cli import main
from edgelm.mqtt.service_config import ServeConfig

PROMPT = "Once upon a time"
NUMBERS = count()


def _ask(client: Client, board: str, body: dict[str, Any], who: str = "talker") -> dict[str, Any]:
    """Send a greedy request as the client `who`; return the body of the final message."""
    name = f"session-{next(NUMBERS)}"
    payload = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "id": name, **body}
    client.publish(f"edgelm/{board}/generate/{who}", payload, reply=f"edgelm/client/{who}/response")
    return client.final(name)


def test_a_session_needs_only_the_new_prompt(client: Client, common: str) -> None:
    first = _ask(client, common, {"prompt": PROMPT, "session": "new"})
    second = _ask(client, common, {"prompt": " and", "session": "new"})
    tokens = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert (first["turn"], second["turn"]) == (1, 2)
    assert second["usage"]["cached_tokens"] == tokens - 1
    assert second["usage"]["prompt_tokens"] > tokens
    assert _ask(client, common, {"prompt": PROMPT})["turn"] is None
    last = _ask(client, common, {"prompt": " so", "session": "new", "end_session": True})
    assert last["turn"] == 3
    assert _ask(client, common, {"prompt": PROMPT, "session": "new"})["turn"] == 1


def test_equal_session_names_of_two_clients_are_separate_sessions(client: Client, common: str) -> None:
    turns = []
    for who in ("eve", "anna", "ben", "anna", "eve"):
        final = _ask(client, common, {"prompt": PROMPT, "session": "same name"}, who)
        turns.append(final["turn"])
    assert turns == [1, 1, 1, 2, 2]
    _ask(client, common, {"session": "same name", "end_session": True}, "ben")
    assert _ask(client, common, {"prompt": PROMPT, "session": "same name"}, "anna")["turn"] == 3
    assert _ask(client, common, {"prompt": PROMPT, "session": "same name"}, "ben")["turn"] == 1


def test_a_full_session_is_refused_until_it_is_ended(client: Client, common: str) -> None:
    body = {"prompt": PROMPT, "session": "full", "max_tokens": 10_000}
    assert _ask(client, common, body)["finish_reason"] == "length"
    refused = _ask(client, common, body)
    assert refused["error"]["code"] == "bad_request"
    assert "session" in refused["error"]["message"]
    ended = _ask(client, common, {"session": "full", "end_session": True})
    assert (ended["finish_reason"], ended["text"], ended["error"]) == ("stop", "", None)
    assert _ask(client, common, {**body, "max_tokens": 2})["turn"] == 1


def test_requests_of_one_session_run_in_order_and_can_be_cancelled(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(config, monkeypatch, step_s=0.02), Client(broker.port, "edgelm/client/queuer/#") as client:
        topic = f"edgelm/{config.board}"
        for name, tokens in (("long", 400), ("short", 2), ("last", 2)):
            body = {"prompt": PROMPT, "session": "queue", "max_tokens": tokens, "ignore_eos": True, "id": name}
            client.publish(f"{topic}/generate/queuer", {**body, "stream": name == "long"})
        client.wait(lambda heard: heard, "the first chunk")
        client.publish(f"{topic}/cancel/queuer", "long", qos=0)
        finals = {name: client.final(name) for name in ("long", "short", "last")}
        order = [body["id"] for body in (heard.body for heard in client.heard) if body["done"]]
    assert order == ["long", "short", "last"]
    assert [finals[name]["turn"] for name in order] == [1, 2, 3]
    assert finals["long"]["finish_reason"] == "cancelled"
    assert 0 < finals["long"]["usage"]["completion_tokens"] < 400
    used = [final["usage"] for final in finals.values()]
    for before, after in pairwise(used):
        assert after["prompt_tokens"] > before["prompt_tokens"] + before["completion_tokens"]


def test_ask_continues_a_session(broker: Broker, common: str, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(*arguments: str) -> str:
        capsys.readouterr()
        flags = ["--broker", broker.url, "--board", common, "--session", "typed"]
        assert main(["ask", *arguments, *flags]) == 0
        return capsys.readouterr().out

    options = ["--max-tokens", "4", "--json"]
    assert [json.loads(ask(PROMPT, *options))["turn"] for _ in range(2)] == [1, 2]
    assert json.loads(ask(PROMPT, *options, "--end-session"))["turn"] == 3
    assert json.loads(ask(PROMPT, *options))["turn"] == 1
    assert ask("--end-session") == ""
    assert json.loads(ask(PROMPT, *options))["turn"] == 1


@pytest.mark.parametrize("arguments", [[], ["--session", "a"], [PROMPT, "--end-session"]])
def test_ask_needs_a_prompt_or_end_session(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "--session NAME" in printed.err
