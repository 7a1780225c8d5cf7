"""Brokers that start late, fail, return, or refuse; a failing loop thread and a failing engine."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
from broker import Broker
from mqtt_client import Client
from served_board import SlowEngine, serving

from edgelm.errors import EdgelmError
from edgelm.mqtt import connection as mqtt
from edgelm.mqtt.connection_events import Received, Subscribed
from edgelm.mqtt.packets import Properties
from edgelm.mqtt.service_config import ServeConfig
from edgelm.mqtt.service_setup import open_service

PROMPT = "Once upon a time"


def _ask(client: Client, board: str, name: str) -> dict[str, object]:
    client.publish(f"edgelm/{board}/generate", {"prompt": PROMPT, "max_tokens": 2, "id": name}, reply=f"reply/{name}")
    return client.final(name)


def test_the_board_waits_for_a_late_broker_and_logs_it_once(
    tmp_path: Path, served_bundle: str, caplog: pytest.LogCaptureFixture
) -> None:
    late = Broker(tmp_path)
    config = ServeConfig(mqtt=late.url, model=served_bundle, board="early", threads=1)
    online = threading.Event()
    with caplog.at_level(logging.WARNING, "edgelm"), open_service(config, online.set) as service:
        thread = threading.Thread(target=service.run)
        thread.start()
        try:
            time.sleep(4)  # long enough for three attempts
            assert not online.is_set()
            late.start()
            assert online.wait(40)
            with Client(late.port, "reply/#") as client:
                assert _ask(client, "early", "first")["text"]
        finally:
            service.stop()
            thread.join(40)
            late.stop()
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [f"no broker at {late.url}"]


def test_a_stream_survives_a_killed_broker(tmp_path: Path, served_bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal = Broker(tmp_path).start()
    config = ServeConfig(mqtt=mortal.url, model=served_bundle, board="phoenix", threads=1)
    try:
        with (
            serving(config, monkeypatch, step_s=0.05) as _,
            Client(mortal.port, "reply/#", "edgelm/phoenix/status", "edgelm/phoenix/info") as client,
        ):
            body = {"prompt": PROMPT, "max_tokens": 120, "stream": True, "id": "long"}
            client.publish("edgelm/phoenix/generate", body, reply="reply/long")
            client.wait(lambda heard: len(client.on("reply/long")) > 2)
            mortal.kill()
            heard_before = len(client.heard)
            mortal.start()
            final = client.final("long")
            assert (final["finish_reason"], final["usage"]["completion_tokens"]) == ("length", 120)
            client.wait(lambda heard: {m.topic.rsplit("/")[-1] for m in heard[heard_before:]} >= {"status", "info"})
            assert client.on("edgelm/phoenix/status")[-1].payload == b"online"
            monkeypatch.setattr(SlowEngine, "step_s", 0.0)
            assert _ask(client, "phoenix", "after")["text"]  # it subscribed again
    finally:
        mortal.stop()


def test_a_final_message_is_sent_after_the_broker_returns(
    tmp_path: Path, served_bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal = Broker(tmp_path).start()
    config = ServeConfig(mqtt=mortal.url, model=served_bundle, board="keeper", threads=1, max_batch=1)
    try:
        with serving(config, monkeypatch, step_s=0.05) as service:
            with Client(mortal.port, "reply/#") as client:
                body = {"prompt": PROMPT, "max_tokens": 10, "stream": True, "id": "kept"}
                client.publish("edgelm/keeper/generate", body, reply="reply/kept")
                client.wait(lambda heard: heard)
                mortal.kill()
            until = time.monotonic() + 40
            while service._models[0].worker.stats().completed == 0:
                assert time.monotonic() < until
                time.sleep(0.05)
            mortal.start()
            with Client(mortal.port, "reply/#") as client:  # connects at once, the board a little later
                assert client.final("kept")["finish_reason"] == "length"
    finally:
        mortal.stop()


def test_a_response_above_the_brokers_packet_limit_is_too_large(tmp_path: Path, served_bundle: str) -> None:
    narrow = Broker(tmp_path, "max_packet_size 1500").start()
    config = ServeConfig(mqtt=narrow.url, model=served_bundle, board="narrow", threads=1)
    try:
        with serving(config), Client(narrow.port, "reply/#") as client:
            body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "id": "wide"}
            client.publish("edgelm/narrow/generate", body, reply="reply/wide")
            assert client.final("wide")["error"]["code"] == "too_large"
            assert _ask(client, "narrow", "small")["text"]
    finally:
        narrow.stop()


def test_two_boards_of_one_name_are_reported(
    broker: Broker, config: ServeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(config), serving(config):
        until = time.monotonic() + 40
        while "--board NAME" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_loop_thread_is_replaced(broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise SystemExit  # what no guard stops: it ends a thread without a word

    with serving(config) as service, Client(broker.port, "reply/#", f"edgelm/{config.board}/status") as client:
        thread = service._connection._loop_thread
        assert thread is not None
        service._connection._client.on_message = die
        client.publish(f"edgelm/{config.board}/cancel", "x", qos=0)
        thread.join(40)
        client.wait(lambda heard: len(client.on(f"edgelm/{config.board}/status")) > 1)  # online once more
        assert _ask(client, config.board, "revived")["text"]
        assert service._connection._loop_thread is not thread


def test_the_connection_survives_an_exception_in_a_callback(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = mqtt.from_paho
    with serving(config) as service, Client(broker.port, "reply/#") as client:
        monkeypatch.setattr(mqtt, "from_paho", lambda properties: 1 // 0)
        client.publish(f"edgelm/{config.board}/cancel", "x", qos=0)
        until = time.monotonic() + 40
        while "_on_message failed" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.02)
        monkeypatch.setattr(mqtt, "from_paho", real)
        assert _ask(client, config.board, "after")["text"]
        assert service._connection._loop_restarts == 0


def test_a_message_of_a_former_connection_is_not_acknowledged(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    acknowledged: list[int] = []
    with serving(config) as service:
        monkeypatch.setattr(service._connection._client, "ack", lambda mid, qos: acknowledged.append(mid))
        epoch = service._connection._connection_number
        for stale in (0, 1):
            message = Received("t", b"", 1, False, Properties(), 0.0, 7 + stale, epoch - stale)
            service._connection.acknowledge(message)
    assert acknowledged == [7]


def test_a_failed_engine_ends_the_service_with_the_reason(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve_and_break() -> None:
        with serving(config, monkeypatch):
            monkeypatch.setattr(SlowEngine, "failure", SystemExit("out of silicon"))
            client.publish(f"edgelm/{config.board}/generate", {"prompt": PROMPT, "id": "last"}, reply="reply/last")
            assert client.final("last")["error"]["code"] == "internal"
            client.wait(lambda heard: client.on(f"edgelm/{config.board}/status")[-1].payload == b"offline")

    hearing = Client(broker.port, "reply/#", f"edgelm/{config.board}/status")
    with hearing as client, pytest.raises(EdgelmError, match="out of silicon"):
        serve_and_break()


def test_a_refused_subscription_ends_the_service_with_the_reason(config: ServeConfig) -> None:
    def serve_refused() -> None:
        with serving(config) as service:
            service._events.put(Subscribed((1, 0x87)))  # mosquitto's ACL file never refuses a subscription
            until = time.monotonic() + 40
            while service._failure is None:
                assert time.monotonic() < until
                time.sleep(0.02)

    with pytest.raises(EdgelmError, match="ACL"):
        serve_refused()


def test_a_board_that_was_never_connected_can_be_stopped(config: ServeConfig) -> None:
    nowhere = ServeConfig(mqtt="mqtt://127.0.0.1:1", model=config.model, board=config.board, threads=1)
    with open_service(nowhere) as service:
        thread = threading.Thread(target=service.run)
        thread.start()
        service.stop()
        thread.join(40)
        assert not thread.is_alive()
