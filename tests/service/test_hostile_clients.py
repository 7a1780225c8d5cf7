"""The promises of the threat model in edgelm/mqtt/README.md: what a client cannot do to others and to the board."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from broker import Broker
from mqtt_client import Client
from served_board import Process, serving

import edgelm.mqtt.service as service_module
from edgelm.mqtt.connection_events import Subscribed
from edgelm.mqtt.log_rate_limit import LogRateLimit
from edgelm.mqtt.packet_filter import FilteredSocket
from edgelm.mqtt.service_config import ServeConfig

PROMPT = "Once upon a time"
LONG = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "timeout_s": 200}


def _with(config: ServeConfig, **changes: Any) -> ServeConfig:
    return dataclasses.replace(config, **changes)


def _ask(client: Client, board: str, who: str | None, request_id: str, **body: Any) -> None:
    """Send a request as the client `who`, or as a client without a name."""
    topic = f"edgelm/{board}/generate" + (f"/{who}" if who else "")
    client.publish(topic, {"max_tokens": 4, "temperature": 0, **body, "id": request_id})


def _topics_of(board: str) -> tuple[str, ...]:
    return "edgelm/client/#", f"edgelm/{board}/response/#", f"edgelm/{board}/+"


def _text(value: bytes) -> bytes:
    return struct.pack(">H", len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _packet(topic: str, payload: bytes, properties: bytes = b"") -> bytes:
    """Return a PUBLISH packet of QoS 0."""
    body = _text(topic.encode()) + _varint(len(properties)) + properties + payload
    return b"\x30" + _varint(len(body)) + body


@contextmanager
def _flooding(port: int, packets: bytes) -> Iterator[None]:
    """Send packets as fast as the broker takes them while the block runs."""
    sock = socket.create_connection(("127.0.0.1", port))
    body = _text(b"MQTT") + bytes([5, 2]) + struct.pack(">H", 600) + b"\0" + _text(b"flood")
    sock.sendall(b"\x10" + _varint(len(body)) + body)
    sock.recv(100)
    sock.settimeout(0.5)
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            try:
                sock.sendall(packets)
            except TimeoutError:  # a packet was written in part: the stream cannot be continued
                return
            except OSError:
                return

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
        sock.close()


def _rss_mb(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 1e6


def _ask_until_answered(client: Client, board: str, name: str) -> None:
    """Send a request until it is answered: a flooded broker may drop it before the board receives it."""
    for attempt in range(10):
        request_id = f"{name} {attempt}"
        _ask(client, board, "victim", request_id, prompt=PROMPT)
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if any(each.body["done"] and each.body["id"] == request_id for each in client.on(VICTIM)):
                assert client.final(request_id)["error"] is None
                return
            time.sleep(0.01)
    raise AssertionError(f"{name} was not answered")


VICTIM = "edgelm/client/victim/response"
USER_PROPERTY = b"\x26" + _text(b"k") + _text(b"v" * 65_000)


@pytest.mark.parametrize("kind", ["empty", "user properties", "correlation data", "wrong JSON"])
def test_a_flood_takes_bounded_memory_and_another_client_is_served(
    broker: Broker, served_bundle: str, tmp_path: Path, kind: str
) -> None:
    board = f"flood-{kind.split()[0].lower()}"
    topic = f"edgelm/{board}/generate/flood"
    packet = {
        "empty": _packet(topic, b""),
        "user properties": _packet(topic, b"", 3 * USER_PROPERTY),
        "correlation data": _packet(topic, b"", b"\x09" + _text(b"c" * 60_000)),
        "wrong JSON": _packet(topic, b'{"prompt":"x","q":[' + b"1," * 30_000 + b"1]}"),
    }[kind]
    flags = ["--mqtt", broker.url, "--board", board, "--model", served_bundle, "--threads", "1"]
    with Process(tmp_path / "log", *flags, "--prefix-cache-mb", "1") as process:
        process.wait_for("serving")
        with Client(broker.port, "edgelm/client/victim/#", f"edgelm/{board}/+") as client:
            for number in range(5):
                _ask(client, board, "victim", f"before {number}", prompt=PROMPT)
                client.final(f"before {number}")
            before = _rss_mb(process.pid)
            with _flooding(broker.port, packet * max(1, 65_536 // len(packet))):
                for number in range(10):
                    time.sleep(0.1)
                    _ask_until_answered(client, board, f"during {number}")
                grown = _rss_mb(process.pid) - before
            client.wait(
                lambda heard: any(each.topic.endswith("/state") and each.body["dropped"] > 0 for each in heard),
                "the count of dropped messages",
            )
            events = [each.body for each in client.on(f"edgelm/{board}/event")]
            for event in events:
                if event["event"] == "accepted" and event["client"] == "victim":
                    assert client.final(event["id"])["error"] is None  # an accepted request is never lost
        assert grown < 20
        assert "Traceback" not in process.log_text
        assert process.log_text.count("\n") < 50


def test_the_installed_paho_uses_the_packet_filter(broker: Broker, config: ServeConfig) -> None:
    with serving(config) as service:
        assert isinstance(service._connection._client._sock, FilteredSocket)


@pytest.mark.parametrize("qos", [0, 1])
def test_requests_above_the_rate_are_rejected_then_dropped_and_counted(
    broker: Broker, config: ServeConfig, qos: int
) -> None:
    config = _with(config, client_rate=0.5, client_burst=2)
    topic = f"edgelm/{config.board}/generate/eager"
    with serving(config), Client(broker.port, *_topics_of(config.board)) as client:
        for number in range(400):
            client.publish(topic, {"prompt": PROMPT, "max_tokens": 1}, correlation=b"%d" % number, qos=qos)
        finals = [client.final(str(number)) for number in range(10)]
        assert [final["error"] and final["error"]["code"] for final in finals] == 2 * [None] + 8 * ["rate_limited"]
        assert all(final["error"]["retry_after_s"] > 0 for final in finals[2:])
        client.wait(
            lambda heard: any(each.topic.endswith("/state") and each.body["dropped"] > 100 for each in heard),
            "a count of dropped messages",
        )
        _ask(client, config.board, "patient", "other", prompt=PROMPT)
        assert client.final("other")["error"] is None


def test_the_limits_of_one_client_leave_room_for_another(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(config, monkeypatch, step_s=0.05), Client(broker.port, *_topics_of(config.board)) as client:
        for number in range(12):
            _ask(client, config.board, "hog", f"hog {number}", **LONG)
        refused = [client.final(f"hog {number}")["error"] for number in range(6, 12)]
        assert {error["code"] for error in refused} == {"busy"}
        assert all(error["retry_after_s"] > 0 for error in refused)
        _ask(client, config.board, "victim", "mine", prompt=PROMPT)
        assert client.final("mine")["usage"]["completion_tokens"] == 4
        events = [message.body for message in client.on(f"edgelm/{config.board}/event")]
        assert sum(each["event"] == "started" and each["client"] == "hog" for each in events) <= 3
        assert not any(each["event"] == "finished" and each["client"] == "hog" for each in events)
        client.publish(f"edgelm/{config.board}/cancel/hog", b"", qos=0)
        for number in range(6):
            assert (
                client.final(f"hog {number}")["finish_reason"] == "cancelled"
            )  # an accepted request gets its final message


def test_a_client_without_a_name_cancels_only_by_id(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(config, monkeypatch, step_s=0.02), Client(broker.port, *_topics_of(config.board)) as client:
        _ask(client, config.board, None, "mine", **LONG, stream=True)
        client.wait(lambda heard: client.on(f"edgelm/{config.board}/response"), "the first chunk")
        for payload in (b"", b"PRESS"):
            client.publish(f"edgelm/{config.board}/cancel", payload, qos=0)
        client.wait(lambda heard: sum(b"without an id" in each.payload for each in heard) == 2, "two rejections")
        assert not any(each.body["done"] for each in client.on(f"edgelm/{config.board}/response"))
        client.publish(f"edgelm/{config.board}/cancel", b"mine", qos=0)
        assert client.final("mine")["finish_reason"] == "cancelled"


def test_a_client_cannot_cancel_anothers_request(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(config, monkeypatch, step_s=0.02), Client(broker.port, *_topics_of(config.board)) as client:
        _ask(client, config.board, "anna", "mine", **{**LONG, "max_tokens": 60}, stream=True)
        client.wait(lambda heard: client.on("edgelm/client/anna/response"), "the first chunk")
        for who in ("", "/ben"):
            for payload in (b"mine", b"", b"PRESS"):
                client.publish(f"edgelm/{config.board}/cancel{who}", payload, qos=0)
        assert client.final("mine")["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize(
    ("who", "reply", "is_answered"),
    [
        ("anna", "edgelm/client/anna/response", True),
        ("anna", "edgelm/client/anna/run/7", True),
        ("anna", "edgelm/client/ben/response", False),
        ("anna", "edgelm/client/annabel/response", False),
        ("anna", "edgelm/client/anna", False),
        ("anna", "reply/anna", False),
        (None, "edgelm/client/anna/response", False),
        (None, "edgelm/client/ask/response/1", False),
        (None, "reply/me", True),
        (None, "my/reply", True),
        (None, "light/kitchen/set", False),
        (None, "edgelm/other/response", False),
        (None, "own response", True),
        (None, "own response/run", True),
    ],
)
def test_allowed_response_topics_of_named_and_unnamed_clients(
    client: Client, common: str, broker: Broker, who: str | None, reply: str, is_answered: bool
) -> None:
    reply = reply.replace("own response", f"edgelm/{common}/response")
    body = {"prompt": PROMPT, "max_tokens": 1, "id": "where", "response_topic": reply}
    with Client(broker.port, reply, f"edgelm/{common}/event") as listener:
        listener.publish(f"edgelm/{common}/generate" + (f"/{who}" if who else ""), body)
        if is_answered:
            assert listener.final("where")["error"] is None
            return
        heard = listener.wait(lambda heard: any(b'"where"' in each.payload for each in heard), "the event")
        event = next(each.body for each in heard if b'"where"' in each.payload)
        assert (event["event"], event["code"]) == ("rejected", "forbidden")
        assert "response topic" in event["message"]
        time.sleep(0.2)
        assert not listener.on(reply)


def test_reply_topics_do_not_apply_to_named_clients(broker: Broker, config: ServeConfig) -> None:
    config = _with(config, reply_topics=("#",))
    with serving(config), Client(broker.port, "#") as client:
        body = {"prompt": PROMPT, "max_tokens": 1}
        topic = f"edgelm/{config.board}/generate"
        client.publish(topic, {**body, "id": "wide"}, reply="light/kitchen/set")
        assert client.final("wide")["error"] is None
        client.publish(topic, {**body, "id": "spoof"}, reply="edgelm/client/anna/response")
        client.publish(f"{topic}/anna", {**body, "id": "away"}, reply="light/kitchen/set")
        for name in (b'"spoof"', b'"away"'):
            client.wait(lambda heard, name=name: any(b"forbidden" in m.payload and name in m.payload for m in heard))
        assert {each.body["id"] for each in client.on("light/kitchen/set")} == {"wide"}
        assert not client.on("edgelm/client/anna/response")


@pytest.mark.parametrize("is_shared", [False, True])
def test_cached_prefixes_are_used_only_for_the_same_client(
    broker: Broker, config: ServeConfig, is_shared: bool
) -> None:
    config = _with(config, share_unnamed=is_shared)
    cached = []
    with serving(config), Client(broker.port, *_topics_of(config.board)) as client:
        for number, who in enumerate(("anna", "ben", None, None, "anna", "ben")):
            _ask(client, config.board, who, f"n{number}", prompt="the code of the door is 4 7 1 1")
            cached.append(client.final(f"n{number}")["usage"]["cached_tokens"] > 0)
    assert cached == [False, False, False, is_shared, True, True]


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_client_without_a_name_has_sessions_only_with_share_unnamed(
    broker: Broker, config: ServeConfig, is_shared: bool
) -> None:
    config = _with(config, share_unnamed=is_shared)
    with serving(config), Client(broker.port, *_topics_of(config.board)) as client:
        for turn in (1, 2):
            _ask(client, config.board, None, f"s{turn}", prompt=PROMPT, session="kitchen")
            final = client.final(f"s{turn}")
            if is_shared:
                assert final["turn"] == turn
            else:
                assert final["error"]["code"] == "forbidden"
                assert f"edgelm/{config.board}/generate/<name>" in final["error"]["message"]


def test_sessions_of_one_client_do_not_displace_anothers(broker: Broker, config: ServeConfig) -> None:
    config = _with(config, client_rate=10_000, client_burst=10_000)
    with serving(config), Client(broker.port, *_topics_of(config.board)) as client:
        _ask(client, config.board, "dave", "first", prompt=PROMPT, session="mine")
        assert client.final("first")["turn"] == 1
        for number in range(70):
            _ask(client, config.board, "many", f"m{number}", prompt="x", session=f"s{number}", max_tokens=1)
            client.final(f"m{number}")
        _ask(client, config.board, "dave", "again", prompt=" and", session="mine")
        assert client.final("again")["turn"] == 2
        for name, session, turn in (("old", "s53", 1), ("kept", "s69", 2)):
            _ask(client, config.board, "many", name, prompt=" x", session=session, max_tokens=1)
            assert client.final(name)["turn"] == turn


def test_the_byte_limit_of_a_session_counts_unrendered_messages(broker: Broker, config: ServeConfig) -> None:
    config = _with(config, model="builtin", session_kb=100)
    messages = [{"role": "user", "content": "A" * 40_000}, {"role": "user", "content": "play some jazz"}]
    codes = []
    with serving(config), Client(broker.port, *_topics_of(config.board)) as client:
        for number in range(4):
            _ask(client, config.board, "anna", f"n{number}", messages=messages, session="long", max_tokens=1)
            error = client.final(f"n{number}")["error"]
            codes.append(error and error["code"])
    assert codes == [None, None, "too_large", "too_large"]
    assert "session" in error["message"]


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize("payload", [b"offline", b"", b"{}"])
def test_overwritten_status_and_info_are_published_again(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch, version: str, payload: bytes
) -> None:
    made = service_module.Connection
    monkeypatch.setattr(
        service_module, "Connection", lambda *given, **options: made(*given, **{**options, "protocol": version})
    )
    with serving(config), Client(broker.port, f"edgelm/{config.board}/status") as client:
        for word in ("status", "info"):
            client.publish(f"edgelm/{config.board}/{word}", payload, retain=True)
        until = time.monotonic() + 20
        while True:
            with Client(broker.port, f"edgelm/{config.board}/status", f"edgelm/{config.board}/info") as newcomer:
                time.sleep(0.3)
                retained = {each.topic.rsplit("/")[-1]: each for each in newcomer.heard if each.retain}
            payloads = {word: each.payload for word, each in retained.items()}
            if payloads.get("status") == b"online" and payloads.get("info") not in {None, payload}:
                break
            assert time.monotonic() < until, retained
        assert retained["info"].body["board"] == config.board
        count = len(client.heard)
        time.sleep(1.5)
        assert len(client.heard) == count


def test_the_status_is_published_again_at_most_once_a_second(broker: Broker, config: ServeConfig) -> None:
    topic = f"edgelm/{config.board}/status"
    with serving(config), Client(broker.port, topic) as client:
        begun = time.monotonic()
        while time.monotonic() - begun < 3:
            client.publish(topic, b"offline", retain=True, qos=0)
        client.wait(lambda heard: heard[-1].payload == b"online", "the last word")
        online_count = sum(each.payload == b"online" and not each.retain for each in client.heard)
        assert 1 <= online_count <= time.monotonic() - begun + 2


def test_the_board_serves_without_permission_to_read_its_status(broker: Broker, config: ServeConfig) -> None:
    with serving(config) as service, Client(broker.port, *_topics_of(config.board)) as client:
        service._events.put(Subscribed((1, 0, 0x87, 0x87)))  # mosquitto's ACL file never refuses a subscription
        _ask(client, config.board, "anna", "after", prompt=PROMPT)
        assert client.final("after")["error"] is None


def test_too_long_correlation_data_is_rejected_and_not_returned(client: Client, common: str) -> None:
    client.publish(f"edgelm/{common}/generate", PROMPT, reply="reply/long", correlation=b"c" * 2000)
    client.wait(lambda heard: client.on("reply/long"), "the refusal")
    (heard,) = client.on("reply/long")
    assert heard.body["error"]["code"] == "too_large"
    assert heard.correlation is None


@pytest.mark.parametrize("payload", [b"[" * 3000 + b"]" * 3000, b'{"a":' * 300 + b"1" + b"}" * 300])
def test_deep_nesting_is_rejected(client: Client, common: str, payload: bytes) -> None:
    body = b'{"prompt": "x", "json_schema": ' + payload + b"}"
    client.publish(f"edgelm/{common}/generate", body, reply="reply/deep", correlation=b"deep")
    assert "nested" in client.final("deep")["error"]["message"]
    client.heard.clear()


def test_log_lines_of_one_kind_are_limited_and_counted() -> None:
    written: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(record.getMessage())

    handler, logger = Kept(), logging.Logger("some")
    handler.addFilter(LogRateLimit(handler, max_lines=3, period_s=0.5))
    logger.addHandler(handler)
    for number in range(535):
        logger.warning("refused %d", number)
    logger.warning("another kind")
    assert written == ["refused 0", "refused 1", "refused 2", "another kind"]
    until = time.monotonic() + 20
    while len(written) < 5:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert written[-1] == "refused 534 (... and 531 more of this kind)"
    logger.warning("refused %d", 1000)
    assert written[-1] == "refused 1000"


def test_events_and_state_contain_client_names_but_no_prompts(client: Client, common: str) -> None:
    body = {"prompt": "a very secret prompt", "session": "hidden", "max_tokens": 2, "id": "told"}
    client.publish(f"edgelm/{common}/generate/anna", body)
    client.final("told")
    client.wait(lambda heard: any(b'"finished"' in m.payload and b'"told"' in m.payload for m in heard))
    payloads = [m.payload.decode() for m in client.heard if m.topic.startswith(f"edgelm/{common}/")]
    assert any(json.loads(each).get("client") == "anna" for each in payloads if each.startswith("{"))
    assert not any("secret" in each or "hidden" in each for each in payloads)
