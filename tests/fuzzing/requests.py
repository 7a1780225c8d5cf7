"""Fuzzer of requests to `edgelm serve` at a real mosquitto: `python -m tests.fuzzing.requests --count 100000 --seed 1`.

Each valid request must get exactly one final message, with a completion or an error of a known code. Meanwhile another
client sends a short request every 0.3 s, which must not take longer than without the fuzzer. The service's memory must
not grow after warm-up, and the service must not end or log an internal error. `--only N` sends one request and shows
its final message.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import psutil
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.manifest import MANIFEST
from edgelm.errors import STATUS_OF_CODE
from edgelm.mqtt.request_codec import MAX_CORRELATION_BYTES

from . import HELPERS  # first: it makes the helpers importable
from .messages import MAX_TOKENS, Message, message

from broker import Broker  # isort: skip

BOARD, VICTIM = "fuzzed", "victim"
REASONS = {"stop", "length", "repetition", "cancelled", "deadline", "error"}
SLOW_DOWN = {"busy", "rate_limited"}
TIMEOUT_S = 20.0
"""Timeout of a request; its final message may come up to `GRACE_S` later."""
GRACE_S = 15.0
PAUSE_S = 0.3
WINDOW = 6
"""Concurrent requests: fewer than the board's queue holds, so that the other client is not refused."""
CONSTRAINED = 2
"""Concurrent requests with a constraint: their trials run one after another and must not delay the others."""
MAX_POSTPONED = 20
WARM_UP_SHARE = 0.2
"""Share of the requests that count as warm-up: afterwards caches are full and libraries are loaded."""


@dataclass
class Report:
    """Results of a run."""

    sent: int = 0
    seconds: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    quiet_s: float = 0.0
    """The other client's longest wait without the fuzzer."""
    waits_s: list[float] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)
    """(Requests sent, MB of the service) over time."""

    def found(self, what: str) -> None:
        """Record and print a finding."""
        self.findings.append(what)
        print(what, flush=True)

    @property
    def worst_s(self) -> float:
        return max(self.waits_s, default=0.0)

    @property
    def growth_mb(self) -> float:
        """Growth of the service's memory from warm-up to the end, between medians over a tenth of the time.

        Medians, because compiling a constraint may need much memory for a moment.
        """
        warm = [size for number, size in self.memory if number >= WARM_UP_SHARE * self.sent]
        part = max(1, len(warm) // 10)
        return statistics.median(warm[-part:] or [0.0]) - statistics.median(warm[:part] or [0.0])

    def __str__(self) -> str:
        late = sum(wait > self.quiet_s + 1 for wait in self.waits_s)
        lines = [
            f"{self.sent} requests in {self.seconds:.0f} s, {self.sent / max(self.seconds, 1e-9):.0f} a second",
            f"finals: {dict(self.codes.most_common())}",
            f"another client waited {self.quiet_s * 1e3:.0f} ms at most when alone, then"
            f" {statistics.median(self.waits_s or [0]) * 1e3:.0f} ms (median) and {self.worst_s * 1e3:.0f} ms at most,"
            f" {late} of {len(self.waits_s)} times over a second longer",
            "memory in MB: " + " ".join(f"{size:.0f}" for _, size in self.memory[:: max(1, len(self.memory) // 20)])
            + f"; {self.growth_mb:+.1f} once warm, {max((size for _, size in self.memory), default=0):.0f} at most",
            f"{len(self.findings)} findings",
        ]  # fmt: skip
        return "\n".join([*lines, *self.findings[:40]])


class Link:
    """A connection that receives final messages."""

    def __init__(self, port: int, *topics: str) -> None:
        self._ready = threading.Event()
        self.on_final: Any = None
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self.client.on_connect = lambda *_: self.client.subscribe([(topic, 1) for topic in topics])
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.on_message = lambda _client, _data, heard: self.on_final(heard)
        self.client.on_disconnect = self._lost
        self.client.max_inflight_messages_set(1000)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        if not self._ready.wait(20):
            raise RuntimeError("no subscription")

    def send(self, made: Message, mark: bytes) -> None:
        """Publish a message whose correlation data ends with `mark`."""
        topic = f"edgelm/{BOARD}/{made.action}" + ("" if made.client is None else f"/{made.client}")
        properties = Properties(PacketTypes.PUBLISH)
        properties.CorrelationData = (made.correlation or b"") + mark
        for name, value in {
            "ResponseTopic": made.reply or None,
            "MessageExpiryInterval": made.expiry_s,
            "UserProperty": made.user or None,
            "ContentType": made.content_type,
            "PayloadFormatIndicator": None if made.is_text is None else int(made.is_text),
        }.items():
            if value is not None:
                setattr(properties, name, value)
        self.client.publish(topic, made.payload, 1, properties=properties)

    def _lost(self, *told: Any) -> None:
        if told[3].is_failure:
            print(f"the broker closes a fuzzer's connection: {told[3]}", flush=True)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Attack(Link):
    """Sends fuzzed requests, `WINDOW` at a time, and counts their final messages."""

    def __init__(self, port: int, report: Report) -> None:
        self._report = report
        self._changed = threading.Condition()
        self._open: dict[bytes, tuple[int, float, bool, bool]] = {}
        self._postponed: deque[tuple[Message, int]] = deque()
        self._answered: Counter[bytes] = Counter()
        self._ids: dict[str, bytes] = {}
        """Marks of requests whose correlation data is too long to be returned, by the id that replaces it."""
        self._pause_s = 0.0
        super().__init__(
            port, "fuzz/#", f"edgelm/{BOARD}/response", "edgelm/client/+/response", "edgelm/other/response"
        )
        self.on_final = self._take
        self.heard: dict[bytes, Any] = {}
        """Latest final messages, for `--only`."""

    def fire(self, made: Message, number: int) -> None:
        """Send a request when the window allows it; one with a constraint may be sent after later ones."""
        if made.is_constrained:
            self._postponed.append((made, number))
            with self._changed:
                has_place = self._has_place(CONSTRAINED, constrained=True)
            if not has_place and len(self._postponed) <= MAX_POSTPONED:
                return
            made, number = self._postponed.popleft()
        self._send(made, number)

    def finish(self) -> None:
        """Send postponed requests, and wait for the remaining final messages."""
        while self._postponed:
            self._send(*self._postponed.popleft())
        with self._changed:
            while any(strict for _, _, strict, _ in self._open.values()):
                self._changed.wait(1)
                self._drop_overdue()

    def _send(self, made: Message, number: int) -> None:
        mark = b"#%010d" % number
        with self._changed:
            while not self._has_place(CONSTRAINED if made.is_constrained else WINDOW, constrained=made.is_constrained):
                self._changed.wait(1)
                self._drop_overdue()
            pause_s, self._pause_s = self._pause_s, self._pause_s * 0.9
            if made.action == "generate":
                self._open[mark] = (number, time.monotonic(), made.is_strict, made.is_constrained)
                if len(made.correlation or b"") > MAX_CORRELATION_BYTES:
                    self._ids[hashlib.sha256((made.correlation or b"") + mark).hexdigest()] = mark
        if pause_s > 1e-3:
            time.sleep(pause_s)
        self._report.sent += 1
        self.send(made, mark)

    def _has_place(self, window: int, *, constrained: bool) -> bool:
        return sum(each == constrained and strict for _, _, strict, each in self._open.values()) < window

    def _drop_overdue(self) -> None:
        """Report requests whose timeout has passed as findings."""
        now = time.monotonic()
        for mark, (number, since, strict, _) in list(self._open.items()):
            if now - since > TIMEOUT_S + GRACE_S:
                del self._open[mark]
                if strict:
                    self._report.found(f"request {number} has no final after {now - since:.0f} s")

    def _take(self, heard: Any) -> None:
        mark = bytes(getattr(heard.properties, "CorrelationData", b""))[-11:]
        try:
            body = json.loads(heard.payload)
        except ValueError:
            self._report.found(f"no JSON on {heard.topic}: {heard.payload[:80]!r}")
            return
        mark = self._ids.get(str(body.get("id")), mark)
        if not mark.startswith(b"#") or not body.get("done"):
            return
        with self._changed:
            number = int(mark[1:])
            self._open.pop(mark, None)
            self._answered[mark] += 1
            self.heard[mark] = body
            if len(self.heard) > 100:
                self.heard.pop(next(iter(self.heard)))
            error, reason = body.get("error"), body.get("finish_reason")
            code = error["code"] if error else reason
            self._report.codes[str(code)] += 1
            if self._answered[mark] > 1:
                self._report.found(f"request {number} has {self._answered[mark]} finals")
            if reason not in REASONS or (error and error["code"] not in STATUS_OF_CODE) or "internal" in str(code):
                self._report.found(f"request {number} ended with {reason!r}, {str(error)[:200]}")
            if code in SLOW_DOWN:
                self._pause_s = min(0.5, self._pause_s + 0.02)
            self._changed.notify()


class Victim(Link):
    """Sends short requests and measures their time."""

    def __init__(self, port: int) -> None:
        self._final = threading.Event()
        self._body: dict[str, Any] = {}
        self._count = 0
        super().__init__(port, f"edgelm/client/{VICTIM}/response")
        self.on_final = self._take

    def ask(self, **more: Any) -> float:
        """Return the seconds until the final message. Raises `RuntimeError` if it is missing or an error."""
        self._count += 1
        self._final.clear()
        begun = time.monotonic()
        payload = json.dumps({"prompt": f"lights on {self._count}", "max_tokens": 2, **more}).encode()
        self.send(Message(payload, client=VICTIM), b"!%d" % self._count)
        if not self._final.wait(TIMEOUT_S + GRACE_S):
            raise RuntimeError("the other client gets no answer")
        if self._body["error"]:
            raise RuntimeError(f"the other client is refused: {self._body['error']}")
        return time.monotonic() - begun

    def _take(self, heard: Any) -> None:
        body = json.loads(heard.payload)
        if body.get("done") and bytes(heard.properties.CorrelationData) == b"!%d" % self._count:
            self._body = body
            self._final.set()


class Board:
    """`edgelm serve` with a copy of the built-in model and short completions.

    Its caches are smaller than usual, so that they are full after warm-up; later growth is a leak.
    """

    def __init__(self, folder: Path, port: int) -> None:
        bundle = folder / "bundle"
        shutil.copytree(open_bundle("builtin", verify=False).path, bundle)
        manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
        manifest["sampling"]["max_tokens"] = MAX_TOKENS
        (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")
        self._log_file = folder / "log"
        program = "import sys; from edgelm import cli; from edgelm.engine import constraint_cache; constraint_cache.CONSTRAINT_CACHE_BYTES //= 8; sys.exit(cli.main())"
        command = [sys.executable, "-c", program, "serve", "--mqtt", f"mqtt://127.0.0.1:{port}"]
        command += ["--board", BOARD, "--model", str(bundle), "--threads", "1", "--prefix-cache-mb", "4"]
        environment = {
            **os.environ,
            "EDGELM_MAX_TIMEOUT_S": str(TIMEOUT_S),
            "EDGELM_REPLY_TOPICS": "#",
            "EDGELM_DATA_DIR": str(folder),
            "PYTHONPATH": str(Path(HELPERS).parents[1]),
        }
        with self._log_file.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 60
        while "serving" not in self.log and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if "serving" not in self.log:
            raise RuntimeError(f"the board does not serve: {self.log}")

    @property
    def log(self) -> str:
        return self._log_file.read_text("utf-8", "replace")

    def memory_mb(self) -> float:
        """Return the resident memory without child processes; 0 after its end."""
        try:
            return psutil.Process(self.process.pid).memory_info().rss / 1e6
        except psutil.Error:
            return 0.0

    def close(self) -> int:
        """Stop the service; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextmanager
def served(folder: Path) -> Iterator[tuple[Board, int]]:
    """Yield a board at its own broker, with the broker's port."""
    broker = Broker(folder).start()
    try:
        board = Board(folder, broker.port)
        try:
            yield board, broker.port
        finally:
            board.close()
    finally:
        broker.stop()


def run(count: int, seed: int, *, max_seconds: float, quiet_s: float = 5.0, first: int = 0) -> Report:
    """Send `count` requests, for at most `max_seconds`."""
    report = Report()
    with tempfile.TemporaryDirectory(prefix="edgelm-fuzz-") as folder, served(Path(folder)) as (board, port):
        victim, attack = Victim(port), Attack(port, report)
        victim.ask(temperature=0.5)  # the first sampled request compiles kernels
        victim.ask(choices=["on", "off"])
        alone = [victim.ask() for _ in range(max(3, int(quiet_s / PAUSE_S))) if not time.sleep(PAUSE_S)]
        report.quiet_s = max(alone)
        over = threading.Event()

        def watch() -> None:
            try:
                while not over.wait(PAUSE_S):
                    report.waits_s.append(victim.ask())
                    if report.waits_s[-1] > report.quiet_s + 1:
                        print(f"a wait of {report.waits_s[-1]:.2f} s near request {report.sent}", flush=True)
                    report.memory.append((report.sent, board.memory_mb()))
            except RuntimeError as error:
                report.found(f"{error}, near request {report.sent}")

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            _attack(attack, board, report, range(first, first + count), seed, max_seconds)
        finally:
            over.set()
            watcher.join()
            attack.close()
            victim.close()
        if board.process.poll() is not None:
            report.found(f"the service ended with {board.process.returncode} near request {report.sent}")
        elif code := board.close():
            report.found(f"the service ended with {code} after SIGTERM")
        if "Traceback" in board.log or "ERROR" in board.log:
            report.found(f"the service's log has an error: {board.log[-2000:]}")
    return report


def _attack(attack: Attack, board: Board, report: Report, numbers: range, seed: int, max_seconds: float) -> None:
    begun = reported = time.monotonic()
    for number in numbers:
        attack.fire(message(seed, number), number)
        now = time.monotonic()
        if board.process.poll() is not None or now > begun + max_seconds:
            break
        if now > reported + 60:
            reported = now
            print(f"{report.sent} sent, {board.memory_mb():.0f} MB, {len(report.findings)} findings", flush=True)
    if board.process.poll() is None:
        attack.finish()
    report.seconds = time.monotonic() - begun


def only(number: int, seed: int) -> None:
    """Send one request and show its final message."""
    made, report = message(seed, number), Report()
    with tempfile.TemporaryDirectory(prefix="edgelm-fuzz-") as folder, served(Path(folder)) as (board, port):
        print(made)
        attack = Attack(port, report)
        begun = time.monotonic()
        attack.fire(made, number)
        attack.finish()
        time.sleep(0.5)
        print(f"{time.monotonic() - begun:.2f} s", attack.heard, report.findings, board.log[-2000:], sep="\n")
        attack.close()


def main() -> int:
    """Run the fuzzer as a command; return 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first request (0)")
    parser.add_argument("--most-s", type=float, default=3 * 3600.0, help="time limit in seconds (10800)")
    parser.add_argument("--only", type=int, help="send one request and show its final message")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child processes too
    if given.only is not None:
        only(given.only, given.seed)
        return 0
    report = run(given.count, given.seed, max_seconds=given.most_s, first=given.first)
    print(report)
    failed = report.findings or report.worst_s > report.quiet_s + 1 or report.growth_mb > 20
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
