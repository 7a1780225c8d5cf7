"""`edgelm ask` and `edgelm demo`, run as commands against a real broker."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from broker import Broker
from mqtt_client import Client
from served_board import Process, SlowEngine, serving

import edgelm
from edgelm.bundle.manifest import MANIFEST
from edgelm.cli import main
from edgelm.mqtt.broker_config import BrokerConfig, BrokerUrl
from edgelm.mqtt.local_broker import EmbeddedBroker, free_port
from edgelm.mqtt.request_client import RequestClient, run_request
from edgelm.mqtt.request_codec import GenerateRequest
from edgelm.mqtt.response_codec import FinalMessage, ResponseChunk
from edgelm.mqtt.service_config import ServeConfig

PROMPT = "Once upon a time"


def _edgelm(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgelm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=120, check=False)


class CommandResult(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Run `edgelm ask` in this process: broker, board, more arguments -> exit code, stdout, stderr."""

    def run(url: str, board: str, *arguments: str) -> CommandResult:
        capsys.readouterr()
        code = main(["ask", PROMPT, "--broker", url, "--board", board, *arguments])
        return CommandResult(code, *capsys.readouterr())

    return run


def test_ask_streams_prints_and_pipes(broker: Broker, common: str, ask: Callable[..., CommandResult]) -> None:
    options = ["--max-tokens", "12", "--temperature", "0"]
    piped = _edgelm("ask", "-", "--broker", broker.url, "--board", common, *options, text=PROMPT)
    assert piped.returncode == 0
    assert piped.stdout.strip()
    assert piped.stderr.startswith("edgelm ask: ")
    assert "12" in piped.stderr
    assert piped.stderr.count("\n") == 1
    assert ask(broker.url, common, *options) == (0, piped.stdout, piped.stderr)
    assert ask(broker.url, common, *options, "--no-stream") == (0, piped.stdout, piped.stderr)
    result = ask(broker.url, common, *options, "--json", "--logprobs", "1")
    final = json.loads(result.out)
    assert final["text"] + "\n" == piped.stdout
    assert len(final["tokens"]) == len(final["logprobs"]) == 12
    assert set(final["timing"]) >= {"ttft_ms", "total_ms", "tok_s"}
    assert (result.code, result.err) == (0, "")


def test_ask_reports_a_cut_response(broker: Broker, common: str, ask: Callable[..., CommandResult]) -> None:
    result = ask(broker.url, common, "--max-tokens", "2", "--ignore-eos")
    assert result.code == 0
    assert result.err.startswith("edgelm ask: ")
    assert " 2 " in result.err
    assert result.err.count("\n") == 1


def test_ask_takes_the_flags_of_generate(
    shared: Path, broker: Broker, common: str, ask: Callable[..., CommandResult], tmp_path: Path
) -> None:  # what it says is known of stories260K
    (tmp_path / "schema.json").write_text('{"enum": [1, 2]}')
    assert ask(broker.url, common, "--choices", "yes,no").out in {"yes\n", "no\n"}
    assert ask(broker.url, common, "--regex", "[ab]{4}").out.strip("ab") == "\n"
    schema = ["--json-schema", str(tmp_path / "schema.json"), "--temperature", "1", "--seed", "3"]
    assert json.loads(ask(broker.url, common, *schema).out) in {1, 2}
    free = ask(broker.url, common, "--temperature", "0").out
    assert "Lily" in free
    assert (
        ask(broker.url, common, "--stop", "Lily", "--stop", "Tom", "--temperature", "0").out.strip("\n")
        == (free.split("Lily")[0])
    )
    long = json.loads(ask(broker.url, common, "--max-tokens", "300", "--ignore-eos", "--json").out)
    assert long["usage"]["completion_tokens"] == 300


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--max-tokens", "0"], "max_tokens"),
        (["--json-schema", "/nowhere"], "nowhere"),
        (["--regex", "("], "regex"),
        (["--password-file", "/nowhere"], "nowhere"),
        (["--board", "No Name"], "board"),
        (["--timeout", "0"], "timeout"),
    ],
)
def test_ask_fails_in_one_line(
    broker: Broker, common: str, ask: Callable[..., CommandResult], arguments: list[str], names: str
) -> None:
    result = ask(broker.url, common, *arguments)
    assert result.code == 1
    assert names in result.err
    assert result.err.count("\n") == 1


def test_ask_reports_a_missing_board_or_broker(broker: Broker, common: str, ask: Callable[..., CommandResult]) -> None:
    result = ask(broker.url, "nobody-here")
    assert result.code == 1
    assert "'nobody-here'" in result.err
    assert common in result.err  # the one that is online
    closed = f"127.0.0.1:{free_port()}"
    result = ask(f"mqtt://{closed}", common)
    assert result.code == 1
    assert closed in result.err


def test_ask_reports_a_missing_board_although_another_client_subscribes(
    broker: Broker, common: str, ask: Callable[..., CommandResult]
) -> None:
    with Client(broker.port, "edgelm/#"):  # a subscriber, so that the broker does not report "no subscribers"
        begun = time.monotonic()
        result = ask(broker.url, "nobody-here")
    assert result.code == 1
    assert "'nobody-here'" in result.err
    assert common in result.err
    assert time.monotonic() - begun < 30


def test_an_empty_cancel_stops_the_requests_of_its_client(
    broker: Broker, config: ServeConfig, ask: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(config, monkeypatch, step_s=0.05), Client(broker.port, f"edgelm/{config.board}/event") as other:

        def cancel() -> None:
            other.wait(lambda heard: any(each.body["event"] == "started" for each in heard))
            other.publish(f"edgelm/{config.board}/cancel/me", b"")

        canceller = threading.Thread(target=cancel)
        canceller.start()
        result = ask(broker.url, config.board, "--client", "me", "--max-tokens", "400", "--ignore-eos", "--json")
        canceller.join()
    assert json.loads(result.out)["finish_reason"] == "cancelled"


def test_ask_reports_an_offline_board(broker: Broker, config: ServeConfig, ask: Callable[..., CommandResult]) -> None:
    with serving(config):
        pass
    result = ask(broker.url, config.board)
    assert result.code == 1
    assert "offline" in result.err


def test_an_error_during_a_response_is_on_its_own_line(
    broker: Broker, config: ServeConfig, ask: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        serving(config, monkeypatch, step_s=0.05) as service,
        Client(broker.port, f"edgelm/{config.board}/event") as other,
    ):

        def stop() -> None:
            other.wait(lambda heard: any(each.body["event"] == "started" for each in heard))
            time.sleep(0.3)
            monkeypatch.setattr(SlowEngine, "step_s", 5.0)  # the board hangs
            monkeypatch.setattr(service._announcement, "republish_if_overwritten", lambda outbox: None)
            other.publish(f"edgelm/{config.board}/status", b"offline", retain=False)

        stopper = threading.Thread(target=stop)
        stopper.start()
        result = ask(broker.url, config.board, "--max-tokens", "200", "--ignore-eos")
        stopper.join()
        service.stop()
        service.stop()
    assert result.code == 1
    assert result.out.strip()
    assert result.out.endswith("\n")
    assert result.err.startswith("edgelm ask: ")
    assert "offline" in result.err


def test_ask_prints_nothing_for_a_rejected_request(
    broker: Broker, common: str, ask: Callable[..., CommandResult]
) -> None:
    result = ask(broker.url, common, "--model", "nothing")
    assert (result.code, result.out) == (1, "")
    assert "model_not_found" in result.err


def test_ask_prints_the_incomplete_text_at_its_timeout(
    broker: Broker, config: ServeConfig, ask: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(config, monkeypatch, step_s=0.05):
        result = ask(broker.url, config.board, "--timeout", "1.5", "--max-tokens", "400")
    assert result.code == 1
    assert "deadline" in result.err
    assert result.out.strip()


def test_closing_the_stream_early_cancels_the_request(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(config, monkeypatch, step_s=0.05), Client(broker.port, f"edgelm/{config.board}/event") as listener:
        with RequestClient(BrokerConfig(url=BrokerUrl.parse(broker.url)), config.board) as request_client:
            answers = request_client.stream(GenerateRequest("early", PROMPT, sampling={"max_tokens": 400}, stream=True))
            assert isinstance(next(answers), ResponseChunk)
            answers.close()
        listener.wait(lambda heard: heard[-1:] and heard[-1].body["event"] == "finished")
    assert listener.heard[-1].body["finish_reason"] == "cancelled"


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_the_client_yields_the_text_in_order(broker: Broker, common: str, protocol: str) -> None:
    with RequestClient(BrokerConfig(url=BrokerUrl.parse(broker.url)), common, protocol=protocol) as request_client:
        pieces: list[str] = []
        request = GenerateRequest("a", PROMPT, sampling={"max_tokens": 50}, stream=True, chunk_ms=0)
        final = run_request(request_client, request, pieces.append)
        *chunks, last = request_client.stream(GenerateRequest("b", PROMPT, sampling={"max_tokens": 50}, stream=True))
    assert "".join(pieces) == final.completion.text
    assert isinstance(last, FinalMessage)
    assert last.completion.tokens == final.completion.tokens
    assert [chunk.seq for chunk in chunks] == list(range(last.seq))


@pytest.mark.parametrize("scheme", ["ws", "unix"])
def test_web_sockets_and_unix_sockets(served_bundle: str, tmp_path: Path, scheme: str) -> None:
    port = free_port()
    lines = {"ws": [f"listener {port} 127.0.0.1", "protocol websockets"], "unix": [f"listener 0 {tmp_path}/socket"]}
    url = {"ws": f"ws://127.0.0.1:{port}/mqtt", "unix": f"unix://{tmp_path}/socket"}[scheme]
    special = Broker(tmp_path, *lines[scheme], "allow_anonymous true").start()
    config = ServeConfig(mqtt=url, model=served_bundle, board="special", threads=1)
    try:
        with serving(config), RequestClient(BrokerConfig(url=BrokerUrl.parse(url)), "special") as request_client:
            assert run_request(request_client, GenerateRequest("a", PROMPT, sampling={"max_tokens": 3})).completion.text
    finally:
        special.stop()


def test_a_forged_offline_status_does_not_end_a_request(
    broker: Broker, config: ServeConfig, ask: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A board that sends chunks is online, even if its retained status is `offline`."""
    with (
        serving(config, monkeypatch, step_s=0.05),
        Client(broker.port, f"edgelm/{config.board}/event") as other,
    ):
        other.publish(f"edgelm/{config.board}/status", b"offline", retain=True)
        time.sleep(0.2)
        result = ask(broker.url, config.board, "--max-tokens", "80", "--ignore-eos")  # over 4 s
        assert (result.code, bool(result.out.strip())) == (0, True), result.err


def test_the_error_names_few_of_many_boards(broker: Broker, common: str, ask: Callable[..., CommandResult]) -> None:
    names = [*(f"spoofed-{i}" for i in range(300)), "A no-name", "0" * 60_000, "\u202egnp"]
    with Client(broker.port, "edgelm/nothing") as other:
        for name in names:
            other.publish(f"edgelm/{name}/status", b"online", retain=True)
        begun = time.monotonic()
        result = ask(broker.url, "nobody-at-all")
        assert time.monotonic() - begun < 15
        for name in names:
            other.publish(f"edgelm/{name}/status", b"", retain=True)
    assert result.code == 1
    assert "'nobody-at-all'" in result.err
    assert result.err.count("spoofed-") <= 5
    assert "no-name" not in result.err
    assert len(result.err) < 300
    assert "\u202e" not in result.err


def test_the_client_sets_tcp_nodelay(broker: Broker, common: str) -> None:
    with RequestClient(BrokerConfig(url=BrokerUrl.parse(broker.url)), common) as request_client:
        connected = request_client._connection._client.socket()
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_serve_and_ask_over_the_embedded_broker(
    served_bundle: str, tmp_path: Path, ask: Callable[..., CommandResult]
) -> None:
    pytest.importorskip("amqtt", reason="pip install 'edgelm[broker]'")
    url = f"mqtt://127.0.0.1:{free_port()}"
    flags = ["--mqtt", url, "--embedded-broker", "--model", served_bundle, "--board", "solo"]
    with Process(tmp_path / "log", *flags) as board:
        board.wait_for("serving")
        result = ask(url, "solo", "--max-tokens", "9")
        assert (result.code, bool(result.out.strip())) == (0, True), result.err
        nobody = ask(url, "nobody")
        assert nobody.code == 1
        assert "solo" in nobody.err
        assert board.end() == 0
        assert "Traceback" not in board.log_text


def test_service_and_client_fall_back_to_mqtt_311(served_bundle: str) -> None:
    pytest.importorskip("amqtt", reason="pip install 'edgelm[broker]'")
    with EmbeddedBroker() as old, serving(ServeConfig(mqtt=old.url, model=served_bundle, board="old", threads=1)):
        with RequestClient(BrokerConfig(url=BrokerUrl.parse(old.url)), "old") as request_client:
            assert run_request(request_client, GenerateRequest("a", PROMPT, sampling={"max_tokens": 3})).completion.text
        assert not request_client._connection.is_mqtt5


@pytest.fixture
def builtin() -> None:
    if not (Path(edgelm.__file__).parent / "builtin" / MANIFEST).is_file():
        pytest.skip("the built-in bundle is absent: python -m edgelm_export.distill.builtin_recipe makes it")


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize("flags", [[], ["--embedded-broker"]])
def test_the_demo_answers_three_commands(builtin: None, flags: list[str]) -> None:
    if flags:
        pytest.importorskip("amqtt", reason="pip install 'edgelm[broker]'")
    done = _edgelm("demo", *flags)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.strip().startswith("{")]
    assert [set(answer) for answer in answers] == [{"intent", "slots"}] * 3
    assert done.stdout.count("tokens/s") == 3
    assert "edgelm serve" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_leaves_nothing_behind_when_interrupted(builtin: None, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "edgelm", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "broker" in line:
                break
        children = _children(demo.pid)
        assert children  # mosquitto
        demo.send_signal(number)
        _, errors = demo.communicate(timeout=60)
    assert demo.returncode == (130 if number == signal.SIGINT else 143)
    assert "Traceback" not in errors
    for child in children:
        assert not Path(f"/proc/{child}").exists()
