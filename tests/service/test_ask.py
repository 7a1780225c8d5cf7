"""`edgelm ask`, `edgelm demo` and the embedded broker, as a person runs them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from broker import PATIENCE_S, Broker
from served_board import Process, serving

import edgelm
from edgelm.bundle import MANIFEST
from edgelm.config import BrokerConfig, BrokerUrl, ServeConfig
from edgelm.mqtt.asker import Asker, answer_to
from edgelm.mqtt.asks import Ask
from edgelm.mqtt.brokers import EmbeddedBroker, free_port
from edgelm.mqtt.wire import Delta, Outcome

PROMPT = "Once upon a time"


def _edgelm(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgelm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=120, check=False)


def _ask(broker: Broker, board: str, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return _edgelm("ask", "--broker", broker.url, "--board", board, *arguments, text=text)


def test_ask_streams_prints_and_pipes(broker: Broker, common: str) -> None:
    options = ["--max-tokens", "12", "--temperature", "0"]
    streamed = _ask(broker, common, PROMPT, *options)
    whole = _ask(broker, common, PROMPT, *options, "--no-stream")
    piped = _ask(broker, common, "-", *options, text=PROMPT)
    told = _ask(broker, common, PROMPT, *options, "--json", "--logprobs", "1")
    assert streamed.returncode == whole.returncode == piped.returncode == told.returncode == 0
    assert streamed.stdout == whole.stdout == piped.stdout
    final = json.loads(told.stdout)
    assert final["text"] + "\n" == streamed.stdout
    assert len(final["tokens"]) == len(final["logprobs"]) == 12
    assert set(final["timing"]) >= {"ttft_ms", "total_ms", "tok_s"}
    assert streamed.stderr == told.stderr == ""


def test_ask_takes_the_flags_of_generate(broker: Broker, common: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"enum": [1, 2]}')
    assert _ask(broker, common, PROMPT, "--choices", "yes,no").stdout in {"yes\n", "no\n"}
    assert _ask(broker, common, PROMPT, "--regex", "[ab]{4}").stdout.strip("ab") == "\n"
    schema = ["--json-schema", str(tmp_path / "schema.json"), "--temperature", "1", "--seed", "3"]
    assert json.loads(_ask(broker, common, PROMPT, *schema).stdout) in {1, 2}
    stopped = _ask(broker, common, PROMPT, "--stop", "Lily", "--stop", "Tom", "--temperature", "0")
    assert "Lily" not in stopped.stdout
    long = json.loads(_ask(broker, common, PROMPT, "--max-tokens", "300", "--ignore-eos", "--json").stdout)
    assert long["usage"]["completion_tokens"] == 300


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--max-tokens", "0"], "max_tokens"),
        (["--json-schema", "/nowhere"], "nowhere"),
        (["--regex", "("], "regex"),
        (["--password-file", "/nowhere"], "nowhere"),
        (["--board", "No Name"], "board"),
    ],
)
def test_ask_fails_in_one_line(broker: Broker, common: str, arguments: list[str], names: str) -> None:
    done = _ask(broker, common, PROMPT, *arguments)
    assert done.returncode == 1
    assert names in done.stderr
    assert done.stderr.count("\n") == 1


def test_ask_says_that_nobody_listens(broker: Broker, common: str) -> None:
    done = _ask(broker, "nobody-here", PROMPT)
    assert done.returncode == 1
    assert "no board 'nobody-here'" in done.stderr
    assert common in done.stderr  # the one that is online
    done = _edgelm("ask", PROMPT, "--broker", f"mqtt://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "no broker" in done.stderr


def test_ask_says_that_the_board_is_offline(broker: Broker, served_bundle: str, tmp_path: Path) -> None:
    flags = ["--mqtt", broker.url, "--model", served_bundle, "--board", "gone"]
    with Process(tmp_path / "log", *flags) as board:
        board.wait_for("serving")
        board.end()
    done = _ask(broker, "gone", PROMPT)
    assert done.returncode == 1
    assert "offline" in done.stderr


def test_ask_gives_up_at_its_timeout_and_shows_what_there_was(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(config, monkeypatch, step_s=0.05):
        done = _ask(broker, config.board, PROMPT, "--timeout", "1.5", "--max-tokens", "400")
    assert done.returncode == 1
    assert "deadline" in done.stderr
    assert done.stdout.strip()


def test_leaving_the_answer_early_cancels_it(
    broker: Broker, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(config, monkeypatch, step_s=0.05) as service:
        with Asker(BrokerConfig(url=BrokerUrl.parse(broker.url)), config.board) as asker:
            answers = asker.stream(Ask("early", PROMPT, sampling={"max_tokens": 400}, stream=True))
            assert isinstance(next(answers), Delta)
            answers.close()
        until = time.monotonic() + PATIENCE_S
        while service._worker.stats().completed == 0:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert service._worker.stats().active == 0


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_the_client_yields_the_text_in_order(broker: Broker, common: str, protocol: str) -> None:
    with Asker(BrokerConfig(url=BrokerUrl.parse(broker.url)), common, protocol=protocol) as asker:
        told: list[str] = []
        ask = Ask("a", PROMPT, sampling={"max_tokens": 50}, stream=True, chunk_ms=0)
        final = answer_to(asker, ask, told.append)
        *deltas, last = asker.stream(Ask("b", PROMPT, sampling={"max_tokens": 50}, stream=True))
    assert "".join(told) == final.completion.text
    assert isinstance(last, Outcome)
    assert last.completion.tokens == final.completion.tokens
    assert [delta.seq for delta in deltas] == list(range(last.seq))


def test_the_embedded_broker_is_served_on_and_asked_at(served_bundle: str, tmp_path: Path) -> None:
    url = f"mqtt://127.0.0.1:{free_port()}"
    with Process(
        tmp_path / "log", "--mqtt", url, "--embedded-broker", "--model", served_bundle, "--board", "solo"
    ) as board:
        board.wait_for("serving")
        done = _edgelm("ask", PROMPT, "--broker", url, "--board", "solo", "--max-tokens", "9")
        assert (done.returncode, bool(done.stdout.strip())) == (0, True), done.stderr
        nobody = _edgelm("ask", PROMPT, "--broker", url, "--board", "nobody")
        assert nobody.returncode == 1
        assert "online: solo" in nobody.stderr
        assert board.end() == 0
        assert "Traceback" not in board.said


def test_a_broker_that_knows_only_311_is_met_there(served_bundle: str) -> None:
    pytest.importorskip("amqtt", reason="pip install 'edgelm[broker]'")
    with EmbeddedBroker() as old, serving(ServeConfig(mqtt=old.url, model=served_bundle, board="old", threads=1)):
        with Asker(BrokerConfig(url=BrokerUrl.parse(old.url)), "old") as asker:
            assert answer_to(asker, Ask("a", PROMPT, sampling={"max_tokens": 3})).completion.text
        assert not asker._connection.is_mqtt5


@pytest.fixture
def builtin() -> None:
    if not (Path(edgelm.__file__).parent / "builtin" / MANIFEST).is_file():
        pytest.skip("the built-in bundle is absent: python -m edgelm_export.distill.builtin makes it")


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
        _, said = demo.communicate(timeout=60)
    assert demo.returncode == (130 if number == signal.SIGINT else 143)
    assert "Traceback" not in said
    for child in children:
        assert not Path(f"/proc/{child}").exists()
