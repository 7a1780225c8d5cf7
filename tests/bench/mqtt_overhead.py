"""Overhead of MQTT over the engine: `python tests/bench/mqtt_overhead.py [BUNDLE]`, run by hand on an idle machine.

Runs a board process, mosquitto and this client over loopback, with TCP_NODELAY everywhere. The engine makes one step in
PACE_S, so that every token is a chunk. Limits (p95): 10 ms added to the first token, 5 ms for a chunk, and 1 ms of the
board's CPU time for each chunk.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import edgelm.mqtt.service_setup
from edgelm.cli import main
from edgelm.engine.engine import Engine
from edgelm.mqtt.broker_config import BrokerConfig, BrokerUrl
from edgelm.mqtt.local_broker import Mosquitto, find_mosquitto
from edgelm.mqtt.pending_response import PendingResponse
from edgelm.mqtt.request_client import RequestClient
from edgelm.mqtt.request_codec import GenerateRequest
from edgelm.mqtt.response_codec import ResponseChunk
from edgelm.types import Chunk

PACE_S = 0.01
TOKENS = 100
REQUESTS = 20
BOARD = "bench"


class PacedEngine(Engine):
    """An engine whose steps take at least `PACE_S`."""

    def step(self) -> list[Chunk]:
        time.sleep(PACE_S)
        return super().step()


def serve(record: Path, url: str, bundle: str) -> int:
    """Serve; record when each piece of text left the worker, and the CPU time at the start and end of a response."""
    left: dict[str, list[tuple[float, int]]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    real = PendingResponse.on_chunk

    def record_chunk(response: PendingResponse, chunk: Chunk) -> None:
        if chunk.delta:
            left[response.id].append((time.monotonic(), len(chunk.delta)))
        if chunk.done or response.id not in cpu:
            cpu[response.id].append(time.process_time())
        real(response, chunk)

    PendingResponse.on_chunk = record_chunk  # type: ignore[method-assign]
    edgelm.mqtt.service_setup.Engine = PacedEngine  # type: ignore[misc]
    code = main(["serve", "--mqtt", url, "--model", bundle, "--board", BOARD, "--threads", "1", "--no-speculation"])
    record.write_text(json.dumps({"left": left, "cpu": cpu}))
    return code


Pieces = list[tuple[float, int]]
"""Time of each piece of text, in seconds of `time.monotonic`, and its number of characters."""


def measure(url: str) -> tuple[dict[str, Pieces], list[float], dict[bool, list[str]]]:
    """Send requests. Return the chunks' times by request, the overheads of first tokens, and the ids by `stream`."""
    came: dict[str, Pieces] = {}
    first_ms: list[float] = []
    ids: dict[bool, list[str]] = {True: [], False: []}
    with RequestClient(BrokerConfig(url=BrokerUrl.parse(url)), BOARD) as request_client:
        for number in range(2 * REQUESTS + 2):
            stream = number % 2 == 0
            sampling = {"max_tokens": TOKENS, "ignore_eos": True}
            request = GenerateRequest(
                uuid.uuid4().hex, "Once upon a time", sampling=sampling, stream=stream, chunk_ms=0
            )
            asked = time.monotonic()
            pieces: Pieces = []
            for response in request_client.stream(request):
                if isinstance(response, ResponseChunk):
                    pieces.append((time.monotonic(), len(response.delta)))
                elif number >= 2 and stream:  # the first two requests are for warm-up
                    came[request.id] = pieces
                    first_ms.append(1e3 * (pieces[0][0] - asked) - response.completion.timing.ttft_ms)
            if number >= 2:
                ids[stream].append(request.id)
    return came, first_ms, ids


def delays_ms(left: Pieces, came: Pieces) -> list[float]:
    """Return the delay of each chunk after the first, from when its oldest text left the worker."""
    starts = dict(zip(accumulate((size for _, size in left), initial=0), (at for at, _ in left), strict=False))
    ends = accumulate((size for _, size in came), initial=0)
    return [1e3 * (at - starts[start]) for start, (at, _) in list(zip(ends, came, strict=False))[1:]]


def report(what: str, values: list[float], limit: float) -> None:
    """Print a row: p50, p95, maximum, limit."""
    p95 = statistics.quantiles(values, n=20)[-1]
    verdict = "ok" if p95 <= limit else "OVER"
    print(f"{what:24} n={len(values):5}  p50 {statistics.median(values):6.2f}  p95 {p95:6.2f}  max {max(values):6.2f}"
          f"  limit {limit:g} ms  {verdict}")  # fmt: skip


def run(bundle: str) -> int:
    """Measure and print the results."""
    program = find_mosquitto()
    if program is None:
        print("mosquitto is not installed", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, Mosquitto(program) as broker:
        record = Path(folder) / "record.json"
        command = [sys.executable, __file__, "serve", str(record), broker.url, bundle]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as board:
            assert board.stderr is not None
            for line in board.stderr:
                if "serving" in line:
                    break
            try:
                came, first_ms, ids = measure(broker.url)
            finally:
                board.terminate()
                with suppress(ValueError):
                    board.communicate(timeout=60)
        noted = json.loads(record.read_text())
    chunk_ms = [delay for request_id in came for delay in delays_ms(noted["left"][request_id], came[request_id])]
    cpu = {kind: statistics.median(noted["cpu"][i][-1] - noted["cpu"][i][0] for i in ids[kind]) for kind in ids}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {REQUESTS} answers of {TOKENS} tokens")
    report("first token, added", first_ms, 10)
    report("chunk, from the worker", chunk_ms, 5)
    print(f"CPU time of a chunk      {1e3 * (cpu[True] - cpu[False]) / TOKENS:.2f} ms  limit 1 ms")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(Path(sys.argv[2]), sys.argv[3], sys.argv[4]))
    sys.exit(run(sys.argv[1] if len(sys.argv) > 1 else "builtin"))
