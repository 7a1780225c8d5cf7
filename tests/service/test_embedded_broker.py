"""The limits of the embedded broker: credentials, connections, packet size, memory."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from served_board import Process

pytest.importorskip("amqtt", reason="pip install 'edgelm[broker]'")

from edgelm.cli import main
from edgelm.errors import ConfigError
from edgelm.mqtt import amqtt_broker
from edgelm.mqtt.local_broker import EmbeddedBroker, free_port
from edgelm.mqtt.service_config import ServeConfig

PATIENCE_S = 20.0


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as running:
        yield running


@pytest.fixture
def protected() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(username="board", password="hunter2") as running:
        yield running


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack(">H", len(data)) + data


def packet(kind: int, body: bytes) -> bytes:
    length, left = b"", len(body)
    while True:
        left, byte = left >> 7, left & 127
        length += bytes([byte | (128 if left else 0)])
        if not left:
            return bytes([kind]) + length + body


def connected(
    port: int, name: str, user: str | None = None, password: str | None = None, *, level: int = 4, clean: bool = True
) -> tuple[socket.socket, bytes]:
    """Connect and send a CONNECT. Return the socket and the CONNACK of four bytes, or no bytes."""
    flags = (2 if clean else 0) | (128 if user is not None else 0) | (64 if password is not None else 0)
    body = text("MQTT") + bytes([level, flags]) + struct.pack(">H", 600) + (b"\0" if level == 5 else b"") + text(name)
    body += b"".join(text(word) for word in (user, password) if word is not None)
    client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    client.sendall(packet(0x10, body))
    return client, client.recv(4)


def is_closed(client: socket.socket) -> bool:
    """Return whether the broker ends the connection within `PATIENCE_S`."""
    try:
        while client.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def mosquitto(program: str, port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [program, "-p", str(port), "-V", "311", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_clients_must_give_the_embedded_brokers_credentials(protected: EmbeddedBroker) -> None:
    right = ["-u", "board", "-P", "hunter2"]
    assert mosquitto("mosquitto_pub", protected.port, *right, "-t", "a", "-m", "kept", "-r", "-q", "1").returncode == 0
    heard = mosquitto("mosquitto_sub", protected.port, *right, "-t", "a", "-C", "1", "-W", "9")
    assert (heard.returncode, heard.stdout.strip()) == (0, "kept")
    wrong = [["-u", "board", "-P", "hunter"], ["-u", "other", "-P", "hunter2"], ["-u", "board"], []]
    for credentials in wrong:
        refused = mosquitto("mosquitto_pub", protected.port, *credentials, "-t", "a", "-m", "x", "-q", "1")
        assert refused.returncode != 0
        assert "not authorised" in refused.stderr.lower()
        assert mosquitto("mosquitto_sub", protected.port, *credentials, "-t", "#", "-C", "1", "-W", "2").stdout == ""


def test_a_client_id_cannot_be_taken_over_without_credentials(protected: EmbeddedBroker) -> None:
    ours, answer = connected(protected.port, "edgelm-board", "board", "hunter2")
    assert answer == b"\x20\x02\x00\x00"
    theirs, refused = connected(protected.port, "edgelm-board", "board", "guess")
    assert refused == b"\x20\x02\x00\x05"
    assert is_closed(theirs)
    ours.sendall(b"\xc0\x00")
    assert ours.recv(2) == b"\xd0\x00"
    ours.close()


def test_serve_and_ask_use_the_credentials(served_bundle: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    secret.chmod(0o600)
    url = f"mqtt://127.0.0.1:{free_port()}"
    who = ["--username", "board", "--password-file", str(secret)]
    flags = ["--mqtt", url, "--embedded-broker", "--model", served_bundle, "--board", "solo", *who]
    with Process(tmp_path / "log", *flags) as board:
        board.wait_for("serving")
        asked = ["ask", "Once upon a time", "--broker", url, "--board", "solo", "--max-tokens", "3"]
        assert main([*asked, *who]) == 0
        assert main(asked) == 1
        assert board.end() == 0
        assert "Traceback" not in board.log_text


@pytest.mark.parametrize("given", [{"username": "me"}, {"mqtt": "mqtt://me@localhost"}])
def test_a_user_name_without_a_password_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--password-file"):
        ServeConfig(embedded_broker=True, **given)
    ServeConfig(embedded_broker=True, password="hunter2", **given)


@pytest.mark.parametrize("kind", [0x30, 0x10, 0x82])
def test_a_too_long_packet_ends_the_connection_unread(broker: EmbeddedBroker, kind: int) -> None:
    client, _ = connected(broker.port, "big")
    body = text("a") + b"x" * amqtt_broker.MAX_PACKET_BYTES
    client.sendall(packet(kind, body)[:100])  # the header suffices
    assert is_closed(client)
    first = socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE_S)
    first.sendall(packet(0x10, body)[:100])
    assert is_closed(first)


def test_a_packet_at_the_size_limit_is_delivered(broker: EmbeddedBroker) -> None:
    client, _ = connected(broker.port, "large")
    client.sendall(packet(0x82, b"\0\1" + text("a") + b"\0"))
    assert client.recv(5) == b"\x90\x03\x00\x01\x00"
    sent = packet(0x30, text("a") + b"x" * (amqtt_broker.MAX_PACKET_BYTES - 3))
    client.sendall(sent)
    got = b""
    while len(got) < len(sent):
        piece = client.recv(65536)
        assert piece
        got += piece
    assert got == sent
    client.close()


def test_a_wrong_length_in_a_packet_does_not_read_the_next_packet(broker: EmbeddedBroker) -> None:
    client, _ = connected(broker.port, "liar")
    client.sendall(packet(0x30, struct.pack(">H", 60_000) + b"abc") + packet(0x30, text("b") + b"x" * 70_000))
    assert is_closed(client)


def test_connections_are_bounded(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amqtt_broker, "MAX_CONNECTIONS", 3)
    three = [connected(broker.port, f"c{i}") for i in range(3)]
    assert [answer for _, answer in three] == [b"\x20\x02\x00\x00"] * 3
    with contextlib.suppress(ConnectionError):
        assert connected(broker.port, "c3")[1] == b""
    three[0][0].close()
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:  # until the closed connection is counted
        try:
            client, answer = connected(broker.port, "c4")
        except ConnectionError:
            answer = b""
        if answer:
            client.close()
            break
    assert answer == b"\x20\x02\x00\x00"


def test_a_silent_client_is_disconnected(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amqtt_broker, "CONNECT_TIMEOUT_S", 0.2)
    client = socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE_S)
    client.sendall(b"\x10")
    assert is_closed(client)


def test_retained_messages_and_filters_are_bounded(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amqtt_broker, "MAX_RETAINED", 5)
    monkeypatch.setattr(amqtt_broker, "MAX_FILTERS", 2)
    client, _ = connected(broker.port, "many")
    for i in range(9):
        client.sendall(packet(0x33, text(f"t/{i}") + bytes([0, i + 1]) + b"x"))
        assert client.recv(4) == bytes([0x40, 2, 0, i + 1])
    for i, granted in enumerate([0, 0, 128]):
        client.sendall(packet(0x82, b"\0\7" + text(f"f/{i}") + b"\0"))
        assert client.recv(5) == bytes([0x90, 3, 0, 7, granted])
    monkeypatch.undo()
    heard = mosquitto("mosquitto_sub", broker.port, "-t", "t/#", "-W", "1", "-v")
    assert len(heard.stdout.splitlines()) == 5
    client.close()


def test_nothing_is_stored_for_a_disconnected_client(broker: EmbeddedBroker) -> None:
    client, _ = connected(broker.port, "away", clean=False)
    client.sendall(packet(0x82, b"\0\1" + text("a") + b"\1"))
    assert client.recv(5) == b"\x90\x03\x00\x01\x01"
    client.close()
    again, answer = connected(broker.port, "away", clean=False)
    assert answer == b"\x20\x02\x00\x00"  # no session
    again.close()


def test_a_subscriber_that_stops_reading_takes_bounded_memory(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amqtt_broker, "WRITE_TIMEOUT_S", 3.0)
    monkeypatch.setattr(amqtt_broker, "MAX_IN_DELIVERY", 20)
    lazy, _ = connected(broker.port, "lazy")
    lazy.sendall(packet(0x82, b"\0\1" + text("a") + b"\0"))
    assert lazy.recv(5) == b"\x90\x03\x00\x01\x00"
    busy, _ = connected(broker.port, "busy")
    before = peak = rss_mb()
    message = packet(0x30, text("a") + b"x" * 200_000)
    for _ in range(600):  # 120 MB, which the subscriber does not read
        busy.sendall(message)
        peak = max(peak, rss_mb())
    busy.sendall(b"\xc0\x00")
    assert busy.recv(2) == b"\xd0\x00"
    assert max(peak, rss_mb()) - before < 60
    assert is_closed(lazy)
    busy.close()


def rss_mb() -> float:
    return psutil.Process().memory_info().rss / 1e6


def test_an_open_embedded_broker_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="edgelm"), EmbeddedBroker("0.0.0.0"):
        assert "--password-file" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="edgelm"), EmbeddedBroker("0.0.0.0", username="a", password="b"):
        assert "TLS" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="edgelm"), EmbeddedBroker():
        assert caplog.text == ""
