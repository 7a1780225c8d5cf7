"""Control characters from bundles, models, errors, logs and progress are escaped on a terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import edgelm
from edgelm.bundle.manifest import MANIFEST
from edgelm.bundle.store import BundleStore, Origin
from edgelm.cli import main
from edgelm.cli.serve import _JsonLines, _TextLines
from edgelm.system import progress_bar
from edgelm.system.terminal import EscapingStream, escape_controls, escape_line, escape_output, unwrap_stream

BUILTIN = Path(edgelm.__file__).parent / "builtin"
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\x7f\rhi"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\x7f\x0dhi"
TIMEOUT_S = 60.0


def is_safe(text: str) -> bool:
    return not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


@given(text=st.text())
@example(text=EVIL)
@example(text="".join(map(chr, range(0x2100))))
def test_no_control_character_is_left(text: str) -> None:
    assert is_safe(escape_controls(text))
    assert is_safe(escape_line(text))
    assert "\n" not in escape_line(text)
    if is_safe(text) and not re.search("[\ud800-\udfff]", text):
        assert escape_controls(text) == text


def test_control_characters_are_escaped_and_other_text_is_unchanged() -> None:
    assert escape_controls(EVIL) == ESCAPED
    kept = "tab\tand\nline, Grüße, 東京, שלום, عربي, 👩‍👩‍👧, e\u0301\u200f"
    assert escape_controls(kept) == kept


@given(text=st.text(), at=st.integers(0, 50))
@example(text=EVIL, at=1)
def test_a_sequence_in_two_pieces_is_escaped_like_one(text: str, at: int) -> None:
    out = io.StringIO(newline="")
    stream = EscapingStream(out)
    stream.write(text[:at])
    stream.write(text[at:])
    assert out.getvalue() == escape_controls(text)


@pytest.mark.parametrize("raw_stdout", [True, False])
def test_the_streams_are_restored_afterwards(raw_stdout: bool, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with escape_output(raw_stdout=raw_stdout):
        print(EVIL)
        print(EVIL, file=sys.stderr)
        print("\x1b[K", end="", file=unwrap_stream(sys.stderr))
    assert (sys.stdout, sys.stderr) == before
    captured = capsys.readouterr()
    assert captured.out == (f"{EVIL}\n" if raw_stdout else f"{ESCAPED}\n")
    assert captured.err == f"{ESCAPED}\n\x1b[K"


def need_builtin() -> None:
    if not (BUILTIN / MANIFEST).is_file():
        pytest.skip("no built-in bundle: python -m edgelm_export.distill.builtin_recipe makes it")


@pytest.fixture
def evil_bundle(tmp_path: Path) -> Path:
    """A stored bundle with escape sequences in every text of its manifest that a command prints."""
    need_builtin()
    store = BundleStore(tmp_path / "data")
    folder = store.bundle_path("evil")
    folder.parent.mkdir(parents=True)
    shutil.copytree(BUILTIN, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["notes"] = [EVIL]
    manifest["architecture"] = EVIL
    manifest["quant"] = EVIL
    manifest["adapter"] = EVIL
    (folder / MANIFEST).write_text(json.dumps(manifest))
    store.write_origin("evil", Origin(EVIL, EVIL))
    return store.folder


def on_a_terminal(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """Return the output of `edgelm` on a pseudo-terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgelm", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, **(environment or {})},
    )
    os.close(slave)
    output, deadline = b"", time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            try:
                piece = os.read(master, 65536)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            output += piece
    os.close(master)
    process.wait(TIMEOUT_S)
    return output.decode(errors="replace").replace("\r\n", "\n")


@pytest.mark.parametrize("command", ["info", "show", "list"])
def test_a_bundle_s_texts_are_escaped_on_every_output(
    command: str, evil_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"EDGELM_DATA_DIR": str(evil_bundle)}
    monkeypatch.setenv("EDGELM_DATA_DIR", str(evil_bundle))
    arguments = [command] if command == "list" else [command, "evil"]
    main(arguments)
    piped = capsys.readouterr()
    seen = on_a_terminal(*arguments, environment=environment)
    for text in (piped.out + piped.err, seen):
        assert is_safe(text), ascii(text)
        assert ESCAPED[:20] in text


def test_a_completion_is_escaped_on_a_terminal_and_unchanged_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    need_builtin()
    arguments = ["generate", "builtin", "play", "--choices", EVIL.replace(",", "")]
    seen = on_a_terminal(*arguments)
    assert is_safe(seen), ascii(seen)
    assert ESCAPED in seen
    assert is_safe(on_a_terminal(*arguments, "--no-stream"))
    assert is_safe(on_a_terminal(*arguments, "--json"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{EVIL}\n"
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == EVIL


def test_an_error_is_escaped_also_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", f"none{EVIL}"]) == 1
    error = capsys.readouterr().err
    assert is_safe(error)
    assert r"\x1b[2J" in error
    assert main([f"none{EVIL}"]) == 2
    assert is_safe(capsys.readouterr().err)


def test_a_log_record_is_one_escaped_line() -> None:
    record = logging.LogRecord(
        "edgelm", logging.WARNING, __file__, 1, "lost %s", (f"{EVIL}\n2026 INFO all is well",), None
    )
    line = _TextLines("%(levelname)s %(message)s").format(record)
    assert is_safe(line)
    assert "\n" not in line
    assert r"\x1b[2J" in line
    line = _JsonLines().format(record)
    assert is_safe(line)
    assert json.loads(line)["message"].startswith(f"lost {ESCAPED}")


def test_a_progress_line_is_redrawn_with_escaped_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setattr(sys, "stderr", EscapingStream(out))  # type: ignore[arg-type]
    monkeypatch.setattr(progress_bar, "DELAY_S", 0.0)
    monkeypatch.setattr(progress_bar, "REDRAW_INTERVAL_S", 0.0)
    with progress_bar.ProgressBar() as bar:
        bar(f"{EVIL}\nfetching", 1, 3)
    drawn = out.getvalue()
    assert drawn.startswith("\r\x1b[K")
    assert drawn.endswith("\r\x1b[K")
    middle = drawn.removeprefix("\r\x1b[K").removesuffix("\r\x1b[K")
    assert is_safe(middle)
    assert "\n" not in middle
