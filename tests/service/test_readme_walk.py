"""Every command in README works as described. `ELSEWHERE` lists the commands that other tests cover."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker import Broker

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
URL = "mqtt://localhost:1883"

ELSEWHERE = {
    r"make (demo|test)\b": "what CI runs",
    r"(uv tool|pipx|pip) install ": "tests/service/test_install.py",
    r"edgelm (pull|chat|export|generate|info) ": "tests/real/test_smollm2.py",
    r"python examples/": "tests/service/test_examples.py",
    r"edgelm distill --teacher": "tests/export/test_distill_command.py",
    r"edgelm devices emulate": "what CI runs, and tests/export/test_emulate.py",
    r"edgelm ask .*--session": "tests/service/test_sessions.py",
}


def lines(pattern: str) -> list[str]:
    return [line for line in LINES if re.match(pattern, line)]


HERE = [
    r"edgelm models",
    r"edgelm serve ",
    r"edgelm ask --board kitchen \"",
    r"mosquitto_(rr|sub|pub) ",
    r"edgelm distill --student",
    r"edgelm devices (detect|smoke)",
]


def test_every_readme_command_is_tested() -> None:
    for line in LINES:
        assert any(re.match(pattern, line) for pattern in [*HERE, *ELSEWHERE]), line
    for pattern in [*HERE, *ELSEWHERE]:
        assert lines(pattern), f"README has nothing like {pattern} any more"


def run(line: str, broker: Broker | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command from README, with this test's broker instead of localhost:1883."""
    words = shlex.split(line, comments=True)
    environment = dict(os.environ)
    if broker is not None:
        environment["EDGELM_MQTT"] = broker.url
        words = [broker.url if word == URL else word for word in words]
        if words[0].startswith("mosquitto_"):
            words[1:1] = ["-h", "127.0.0.1", "-p", str(broker.port)]
    if words[0] == "edgelm":
        words[:1] = [sys.executable, "-m", "edgelm"]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def kitchen(broker: Broker) -> Iterator[Broker]:
    """The board that a command in README starts."""
    (line,) = lines("edgelm serve ")
    words = [broker.url if word == URL else word for word in shlex.split(line, comments=True)[1:]]
    board = subprocess.Popen([sys.executable, "-m", "edgelm", *words], stderr=subprocess.PIPE, text=True)
    try:
        assert board.stderr is not None
        assert any("serving builtin" in each for each in board.stderr)
        yield broker
    finally:
        board.terminate()
        board.wait(30)


def test_models_are_listed() -> None:
    done = run(*lines("edgelm models"))
    assert done.returncode == 0
    named = re.search(r"^edgelm pull (\S+)", "\n".join(LINES), re.MULTILINE)[1]
    assert re.search(rf"^{re.escape(named)} .*Apache-2.0", done.stdout, re.MULTILINE)


def test_ask_and_mosquitto_get_the_printed_response(kitchen: Broker) -> None:
    (printed,) = re.findall(r"```json\n(\{.*?\})\n```", README, re.DOTALL)
    printed_body = json.loads(printed.replace(", ...}", "}"))
    (line,) = lines(r'edgelm ask --board kitchen "play')
    assert run(line, kitchen).stdout == printed_body["text"] + "\n"
    (line,) = lines("mosquitto_rr")
    final = json.loads(run(line, kitchen).stdout)
    assert set(printed_body) <= set(final)
    for key in ("text", "done", "finish_reason", "board", "model", "error"):
        assert final[key] == printed_body[key]
    assert set(printed_body["usage"]) <= set(final["usage"])
    assert set(printed_body["timing"]) <= set(final["timing"])


def test_chunks_join_to_the_final_text(kitchen: Broker) -> None:
    (listen,), (ask,) = lines("mosquitto_sub"), lines("mosquitto_pub")
    words = shlex.split(listen.partition("&")[0])
    listener = subprocess.Popen(
        [words[0], "-h", "127.0.0.1", "-p", str(kitchen.port), *words[1:]], stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.5)  # the start of the subscription cannot be seen
    assert run(ask, kitchen).returncode == 0
    heard = [json.loads(line) for line in listener.communicate(timeout=60)[0].splitlines()]
    *pieces, whole = sorted(heard, key=lambda each: each["seq"])
    assert pieces
    assert all(set(piece) == {"id", "seq", "delta", "done"} and not piece["done"] for piece in pieces)
    assert whole["done"]
    assert "".join(piece["delta"] for piece in pieces) == whole["text"]


@pytest.mark.parametrize("line", lines("edgelm devices (detect|smoke)"))
def test_device_commands(line: str) -> None:
    done = run(line)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_student_is_trained_and_scored(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs pip install 'edgelm[distill]'")
    rows = [
        (f"{a} the {d} in room {i}", json.dumps({"do": a, "what": d}))
        for a in ("open", "close")
        for d in ("door", "blind")
        for i in range(20)
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"prompt": p, "target": t}) + "\n" for p, t in rows))
    (line,) = lines("edgelm distill --student")
    done = run(f"{line} --max-seconds 12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^held out: 8 examples: exact [\d.]+%", done.stdout, re.MULTILINE)
    assert (tmp_path / "student" / "config.json").is_file()
