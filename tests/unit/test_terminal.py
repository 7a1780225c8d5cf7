"""What others say reaches a terminal as text: bundles, models, errors, logs, progress."""

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
TOLD = r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\x7f\x0dhi"
PATIENCE_S = 60.0


def is_safe(text: str) -> bool:
    return not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


@given(text=st.text())
@example(text=EVIL)
@example(text="".join(map(chr, range(0x2100))))
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    assert is_safe(escape_controls(text))
    assert is_safe(escape_line(text))
    assert "\n" not in escape_line(text)
    if is_safe(text) and not re.search("[\ud800-\udfff]", text):
        assert escape_controls(text) == text


def test_escapes_are_visible_and_other_writing_stays() -> None:
    assert escape_controls(EVIL) == TOLD
    kept = "tab\tand\nline, Grüße, 東京, שלום, عربي, 👩‍👩‍👧, e\u0301\u200f"
    assert escape_controls(kept) == kept


@given(text=st.text(), at=st.integers(0, 50))
@example(text=EVIL, at=1)
def test_a_sequence_in_two_pieces_is_shown_like_one(text: str, at: int) -> None:
    out = io.StringIO(newline="")
    stream = EscapingStream(out)
    stream.write(text[:at])
    stream.write(text[at:])
    assert out.getvalue() == escape_controls(text)


@pytest.mark.parametrize("as_they_are", [True, False])
def test_output_is_ours_again_afterwards(as_they_are: bool, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with escape_output(raw_stdout=as_they_are):
        print(EVIL)
        print(EVIL, file=sys.stderr)
        print("\x1b[K", end="", file=unwrap_stream(sys.stderr))
    assert (sys.stdout, sys.stderr) == before
    told = capsys.readouterr()
    assert told.out == (f"{EVIL}\n" if as_they_are else f"{TOLD}\n")
    assert told.err == f"{TOLD}\n\x1b[K"


def need_builtin() -> None:
    if not (BUILTIN / MANIFEST).is_file():
        pytest.skip("no built-in bundle: python -m edgelm_export.distill.builtin_recipe makes it")


@pytest.fixture
def evil_bundle(tmp_path: Path) -> Path:
    """A bundle whose manifest holds escape sequences wherever it holds text that a person sees."""
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
    """What `edgelm` writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgelm", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, **(environment or {})},
    )
    os.close(theirs)
    got, until = b"", time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            got += piece
    os.close(ours)
    process.wait(PATIENCE_S)
    return got.decode(errors="replace").replace("\r\n", "\n")


@pytest.mark.parametrize("command", ["info", "show", "list"])
def test_a_bundles_texts_are_shown_wherever_they_go(
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
        assert TOLD[:20] in text


def test_an_answer_is_shown_on_a_terminal_and_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    need_builtin()
    arguments = ["generate", "builtin", "play", "--choices", EVIL.replace(",", "")]
    seen = on_a_terminal(*arguments)
    assert is_safe(seen), ascii(seen)
    assert TOLD in seen
    assert is_safe(on_a_terminal(*arguments, "--no-stream"))
    assert is_safe(on_a_terminal(*arguments, "--json"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{EVIL}\n"
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == EVIL


def test_an_error_is_shown_even_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", f"none{EVIL}"]) == 1
    told = capsys.readouterr().err
    assert is_safe(told)
    assert r"\x1b[2J" in told
    assert main([f"none{EVIL}"]) == 2
    assert is_safe(capsys.readouterr().err)


def test_a_log_line_is_one_line_of_text() -> None:
    record = logging.LogRecord(
        "edgelm", logging.WARNING, __file__, 1, "lost %s", (f"{EVIL}\n2026 INFO all is well",), None
    )
    line = _TextLines("%(levelname)s %(message)s").format(record)
    assert is_safe(line)
    assert "\n" not in line
    assert r"\x1b[2J" in line
    line = _JsonLines().format(record)
    assert is_safe(line)
    assert json.loads(line)["message"].startswith(f"lost {TOLD}")


def test_a_progress_line_is_redrawn_and_shows_names(monkeypatch: pytest.MonkeyPatch) -> None:
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
