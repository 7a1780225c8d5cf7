"""Invalid input to every command: at least three cases each, a one-line error with the value, no files left."""

from __future__ import annotations

import importlib.util
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from shared_data import can_export

import edgelm
from edgelm.cli import COMMANDS
from edgelm.errors import RequestError

WRONG = {
    "demo": [(["--nothing"], "--nothing"), (["more"], "more"), (["--embedded-broker=yes"], "embedded-broker")],
    "models": [(["smollm2"], "smollm2"), (["--jsn"], "--json"), (["--json=1"], "--json")],
    "pull": [(["nothing"], "nothing"), ([], "NAME"), (["a/b/c"], "a/b/c"), (["x", "--from", "{absent}"], "{absent}")],
    "list": [(["all"], "all"), (["-l"], "-l"), (["--jason"], "--json")],
    "show": [
        ([], "NAME"),
        (["nothing"], "nothing"),
        (["{text}"], "{text}"),
        (["bultin"], "builtin"),
    ],
    "rm": [([], "NAME"), (["nothing"], "nothing"), (["../x"], "../x"), (["builtin"], "built-in")],
    "export": [
        (["{absent}", "{out}"], "{absent}"),
        (["{text}", "{out}"], "{text}"),
        (["{empty}", "{out}"], "config.json"),
        (["{empty}"], "OUT"),
        (["{empty}", "{out}", "--max-bytes", "much"], "150M"),
        (["{empty}", "{out}", "--quant", "int3"], "int8"),
    ],
    "prefix": [
        (["{absent}", "{text}"], "{absent}"),
        (["builtin"], "--remove"),
        (["builtin", "{text}"], "edgelm prefix"),
        (["{empty}", "{text}"], "manifest.json"),
    ],
    "info": [
        ([], "BUNDLE"),
        (["{absent}"], "{absent}"),
        (["{empty}"], "manifest.json"),
        (["{text}"], "{text}"),
    ],
    "generate": [
        (["builtin"], "PROMPT"),
        (["{absent}", "hi"], "{absent}"),
        (["builtin", "hi", "--temperature", "hot"], "temperature"),
        (["builtin", "hi", "--temperature", "-1"], "temperature"),
        (["builtin", "hi", "--json-schema", "{text}"], "JSON"),
        (["builtin", "hi", "--tools", "{absent}"], "{absent}"),
        (["builtin", "hi", "--regex", "("], "regex"),
        (["builtin", "hi", "--threads", "0"], "[1, 256]"),
        (["builtin", "word " * 400], "context"),
    ],
    "chat": [
        (["{absent}"], "{absent}"),
        (["builtin", "--top-p", "7"], "top_p"),
        (["builtin", "--system", "{absent}.txt"], "{absent}.txt"),
        (["builtin", "--template-var", "x"], "NAME=VALUE"),
    ],
    "serve": [
        (["--model", "{absent}"], "{absent}"),
        (["--mqtt", "localhost"], "localhost"),
        (["--board", "My Board"], "board"),
        (["--config", "{absent}"], "{absent}"),
        (["--max-batch", "0"], "max_batch"),
        (["--mqtt", "mqtt://127.0.0.1:{port}", "--password-file", "{absent}"], "{absent}"),
    ],
    "ask": [
        ([], "PROMPT"),
        (["hi", "--broker", "mqtt://127.0.0.1:{port}"], "127.0.0.1:{port}"),
        (["hi", "--broker", "127.0.0.1"], "mqtt://"),
        (["hi", "--board", "a/b"], "board"),
        (["--end-session"], "--session"),
    ],
    "bench": [
        (["{absent}"], "{absent}"),
        (["builtin", "--prompt-tokens", "none"], "prompt-tokens"),
        (["builtin", "--prompt-tokens", "100000"], "context"),
        (["builtin", "--threads", "0"], "threads"),
    ],
    "cache": [(["clear"], "clear"), (["--clea"], "--clear"), (["--json=no"], "--json")],
    "completion": [([], "shell"), (["csh"], "csh"), (["bash", "more"], "more")],
    "eval": [
        (["builtin"], "--text"),
        (["builtin", "--text", "{absent}"], "{absent}"),
        (["builtin", "--task", "{text}"], "line 1"),
        (["{absent}", "--text", "{text}"], "{absent}"),
    ],
    "distill": [
        (["--student", "hidden=64"], "--data"),
        (["--student", "hidden=64", "--data", "{absent}", "--out", "{out}"], "{absent}"),
        (["--student", "hidden=64,layers=1,heads=2", "--data", "{text}", "--out", "{out}"], "line 1"),
        (["--student", "s", "--data", "{text}", "--out", "{out}", "--loss", "kl"], "--teacher"),
    ],
    "devices": [
        ([], "detect"),
        (["emulate", "pi7"], "pi7"),
        (["smoke", "--nothing"], "--nothing"),
        (["detct"], "detect"),
    ],
}


NEEDS = {"export": can_export, "pull": can_export, "distill": lambda: importlib.util.find_spec("torch") is not None}
"""What must be installed for a command to check its arguments."""


@pytest.fixture
def places(tmp_path):
    """Values for the arguments: a missing path, a text file, an empty folder, a port without a listener."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("not a valid file\n")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = {"absent": "absent", "text": "text.txt", "empty": "empty", "out": "out"}
    return {**{name: str(tmp_path / file) for name, file in paths.items()}, "port": port}


def test_every_command_has_invalid_inputs():
    assert set(WRONG) == set(COMMANDS)
    assert all(len(cases) >= 3 for cases in WRONG.values())


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [(command, *case) for command, cases in WRONG.items() for case in cases],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value,
)
def test_the_error_is_one_line_with_the_value(command, arguments, expected, places, tmp_path, run):
    if command in NEEDS and not NEEDS[command]():
        pytest.skip(f"edgelm {command} reports which extra it needs")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(command, *(argument.format(**places) for argument in arguments))
    assert code in (1, 2)
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(f"edgelm {command}: ")
    assert expected.format(**places) in err
    assert "internal error" not in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("arguments", [["models"], ["generate", "builtin", "hi"], ["info", "builtin", "--json"]])
def test_a_full_disk_is_a_one_line_error(arguments):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "edgelm", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "internal error" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("prompt", [5, b"abc", ["a"]])
def test_a_prompt_of_another_type_is_a_request_error(prompt):
    with edgelm.load("builtin", threads=1) as model:
        for ask in (model.generate, model.score, lambda given: list(model.stream(given))):
            with pytest.raises(RequestError, match=type(prompt).__name__):
                ask(prompt)
