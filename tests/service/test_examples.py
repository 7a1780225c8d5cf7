"""The programs in examples/, run by the commands in README."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from broker import Broker
from served_board import serving

from edgelm.mqtt.service_config import ServeConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=120, check=False, cwd=ROOT)


def test_readme_runs_every_example() -> None:
    named = set(re.findall(r"^python (examples/\w+\.py)", README, re.MULTILINE))
    assert named == {f"examples/{file.name}" for file in (ROOT / "examples").glob("*.py")}


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


def test_a_client_without_edgelm(broker: Broker) -> None:
    words = from_readme("mqtt_client")
    board = words[words.index("--board") + 1]
    with serving(ServeConfig(mqtt=broker.url, board=board, threads=1)):
        done = run(*words, "--port", str(broker.port))
    assert '"intent": "PlayMusic"' in done.stdout
    assert "ttft_ms" in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("arguments", [[], ["x", "--port", "none"]])
def test_a_client_without_its_arguments_prints_its_usage(arguments: list[str]) -> None:
    done = run("examples/mqtt_client.py", *arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr
