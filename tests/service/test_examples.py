"""The programs in examples/, run by the commands in README, and the Home Assistant package."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from broker import Broker
from jinja2 import Environment
from mqtt_client import Client
from served_board import serving

from edgelm.mqtt import request_codec, topics
from edgelm.mqtt.service_config import ServeConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*arguments: str, text: str = "", timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=timeout_s, check=False, cwd=ROOT)


def test_readme_runs_every_example() -> None:
    named = set(re.findall(r"^python (examples/\w+\.py)", README, re.MULTILINE))
    assert named == {f"examples/{file.name}" for file in (ROOT / "examples").glob("*.py")}
    assert "examples/home_assistant.yaml" in README


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.[py][ya]*")), ids=lambda file: file.name)
def test_an_example_is_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 60


def from_readme(example: str) -> list[str]:
    (line,) = re.findall(rf"^python (examples/{example}\.py.*)$", README, re.MULTILINE)
    return shlex.split(line, comments=True)


def test_generate() -> None:
    done = run(*from_readme("generate"))
    assert '"artist": "Miles Davis"' in done.stdout
    assert "tokens/s" in done.stderr


def test_the_router_calls_the_function_of_the_intent() -> None:
    done = run(*from_readme("intent_router"))
    assert "looking up the weather for {'city': 'Oslo'}" in done.stdout
    done = run("examples/intent_router.py", text="what is the weather in Oslo\nplay some jazz\n")
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == ["looking", "playing"]


def test_json_schema() -> None:
    done = run(*from_readme("json_schema"))
    assert done.stdout == "PlayMusic {'genre': 'jazz', 'artist': 'Miles Davis', 'service': 'spotify'}\n", done.stderr


def test_a_session_reads_only_new_text(bundle: Path, model: Any) -> None:
    if model.manifest.chat_template is None:
        pytest.skip("this bundle has no chat template")
    script, _ = from_readme("sessions")
    done = run(script, str(bundle))
    assert done.returncode == 0, done.stderr
    turns = re.findall(r"turn (\d): (\d+) of (\d+)", done.stdout)
    assert [turn for turn, _, _ in turns] == ["1", "2", "3"]
    assert all(0 < int(cached) < int(tokens) for _, cached, tokens in turns[1:])
    assert "open sessions: {}" in done.stdout


def test_export(tiny_checkpoint: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat.\n<|endoftext|>\nThe cat sat.\n" * 40, "utf-8")
    script, *_ = from_readme("export_model")
    done = run(script, str(tiny_checkpoint()), str(tmp_path / "out"), str(tmp_path / "text.txt"), timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^plan: \d+ matrices, [\d.]+ bits per weight", done.stdout, re.MULTILINE)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_client_without_edgelm(broker: Broker) -> None:
    words = from_readme("streaming_client")
    board = words[words.index("--board") + 1]
    with serving(ServeConfig(mqtt=broker.url, board=board, threads=1)):
        done = run(*words, "--port", str(broker.port))
    assert '"intent": "PlayMusic"' in done.stdout
    assert "ttft_ms" in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("arguments", [[], ["x", "--port", "none"]])
def test_a_client_without_its_arguments_prints_its_usage(arguments: list[str]) -> None:
    done = run("examples/streaming_client.py", *arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr


# --- Home Assistant ---


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    parsed = yaml.safe_load((ROOT / "examples" / "home_assistant.yaml").read_text(encoding="utf-8"))
    assert isinstance(parsed, dict)
    return parsed


def render(template: Any, **variables: Any) -> str:
    """Render a template as Home Assistant does, with its filter to_json."""
    environment = Environment(autoescape=False)
    environment.filters["to_json"] = json.dumps
    return environment.from_string(template).render(**variables)


def test_the_automation_sends_a_valid_request_and_reads_the_answer(package: dict[str, Any], broker: Broker) -> None:
    send, act = package["automation"]
    (publish,) = (action["data"] for action in send["actions"])
    sentence = 'play "some" jazz by Miles Davis on spotify'
    trigger = {"to_state": {"state": sentence}}
    assert render(send["conditions"], trigger=trigger) == "True"
    assert render(send["conditions"], trigger={"to_state": {"state": " "}}) == "False"
    payload = render(publish["payload"], trigger=trigger)
    body = json.loads(payload)
    assert body["prompt"] == sentence
    request_codec.parse_request(request_codec.Envelope("1", None, None, body))

    (answers,) = (trigger["topic"] for trigger in act["triggers"])
    _, board, _, name = publish["topic"].split("/")
    with serving(ServeConfig(mqtt=broker.url, board=board, threads=1)), Client(broker.port, answers) as client:
        client.publish(publish["topic"], {**body, "prompt": "play some jazz by Miles Davis on spotify", "id": "ha"})
        final = client.final("ha")
    assert answers == f"edgelm/client/{name}/response"
    assert render(act["conditions"], trigger={"payload_json": final}) == "True"
    assert render(act["conditions"], trigger={"payload_json": {**final, "json": None}}) == "False"
    assert render(act["variables"]["intent"], trigger={"payload_json": final}) == "PlayMusic"
    (case,) = act["actions"][0]["choose"]
    assert render(case["conditions"], intent="PlayMusic") == "True"
    (play,) = case["sequence"]
    assert render(play["data"]["media_content_id"], slots=final["json"]["slots"]) == "Miles Davis"


def test_the_sensors_read_topics_that_a_board_publishes(package: dict[str, Any]) -> None:
    board = topics.BoardTopics("kitchen")
    (status,), (queue,) = package["mqtt"]["binary_sensor"], package["mqtt"]["sensor"]
    assert status["state_topic"] == board.status
    assert queue["state_topic"] == board.state
    assert render(queue["value_template"], value_json={"queue": 3}) == "3"
