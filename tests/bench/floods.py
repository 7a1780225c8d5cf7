"""Effect of a flooding client on another client: python tests/bench/floods.py [--rounds N] [KIND ...]

Runs mosquitto, `edgelm serve` and a flooding process on this machine. Another client sends one streamed request after
the other. Measured are the time to its first token, alternately without and with the flood, and the board's memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import queue
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import psutil
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from broker import Broker

BOARD = "flooded"
TOPIC = f"edgelm/{BOARD}/generate"
NOBODY = b"\x08" + struct.pack(">H", 12) + b"reply/nobody"
PATIENCE_S = 5.0


def text(value: bytes) -> bytes:
    return struct.pack(">H", len(value)) + value


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def packet(topic: str, payload: bytes, properties: bytes = b"", mid: int = 0, flags: int = 0) -> bytes:
    """Return a PUBLISH packet; of QoS 1 if a packet identifier is given."""
    qos = 2 if mid else 0
    body = text(topic.encode()) + (struct.pack(">H", mid) if mid else b"")
    body += varint(len(properties)) + properties + payload
    return bytes([0x30 | qos | flags]) + varint(len(body)) + body


USER = b"\x26" + text(b"k") + text(b"v" * 65_000)
NEST = b'{"prompt":"x","json_schema":' + b'{"a":' * 250 + b"1" + b"}" * 250 + b"}"
KINDS: dict[str, list[bytes]] = {
    "empty": [packet(f"{TOPIC}/m", b"")],
    "unnamed": [packet(TOPIC, b"hello")],
    "names": [packet(f"{TOPIC}/m{i}", b"hello") for i in range(50_000)],
    "user-properties": [packet(f"{TOPIC}/m", b"", 3 * USER + NOBODY)],
    "correlation": [packet(f"{TOPIC}/m", b"", b"\x09" + text(b"c" * 60_000) + NOBODY)],
    "long-prompt": [packet(f"{TOPIC}/m", b"lorem ipsum dolor " * 3600)],
    "wrong-64k": [packet(f"{TOPIC}/m", b'{"prompt":"x","q":[' + b"1," * 32_000 + b"1]}")],
    "wrong-250k": [packet(f"{TOPIC}/m", b'{"prompt":"x","q":[' + b"1," * 124_000 + b"1]}")],
    "nested": [packet(f"{TOPIC}/m", NEST)],
    "sessions": [packet(f"{TOPIC}/m", json.dumps({"prompt": "x", "session": f"s{i}"}).encode()) for i in range(5000)],
    "cancels": [packet(f"edgelm/{BOARD}/cancel", b"")],
    "status": [packet(f"edgelm/{BOARD}/status", b"offline", flags=1)],
    "qos-1": [packet(f"{TOPIC}/m", b"hello", mid=i + 1) for i in range(60_000)],
    "hog": [],
}
"""Packets that the flooding client sends repeatedly; `hog` keeps twelve long requests open instead."""


def connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    name = text(b"flood" + os.urandom(4).hex().encode())
    body = text(b"MQTT") + bytes([5, 2]) + struct.pack(">H", 600) + b"\0" + name
    sock.sendall(b"\x10" + varint(len(body)) + body)
    sock.recv(100)
    return sock


def flood(port: int, kind: str, sent: Any) -> None:
    """Send packets until the process is terminated; count them in `sent`."""
    packets = KINDS[kind]
    chunks, size = [], 0
    for index, each in enumerate(itertools.cycle(packets)):
        chunks.append(each)
        size += len(each)
        if index + 1 >= len(packets) and size >= 65_536:
            break
    count, data = len(chunks), b"".join(chunks)
    sock = connect(port)
    while True:
        for at in range(0, len(data), 65_536):
            sock.sendall(data[at : at + 65_536])
            if kind == "qos-1":
                sock.setblocking(False)
                try:
                    while sock.recv(65_536):
                        pass
                except BlockingIOError:
                    pass
                sock.setblocking(True)
        with sent.get_lock():
            sent.value += count


class Victim:
    """A client that measures the time to the first token of its requests."""

    def __init__(self, port: int, name: str) -> None:
        self._heard: queue.Queue[tuple[float, dict[str, Any]]] = queue.Queue()
        self._topic = f"{TOPIC}/{name}"
        self._reply = f"edgelm/client/{name}/response"
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.on_socket_open = lambda _c, _d, s: s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client.on_message = lambda _c, _d, m: self._heard.put((time.perf_counter(), json.loads(m.payload)))
        ready = queue.Queue[bool]()
        self._client.on_connect = lambda *_: self._client.subscribe(self._reply, 1)
        self._client.on_subscribe = lambda *_: ready.put(True)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        ready.get(timeout=PATIENCE_S)

    def send(self, **body: Any) -> str:
        name = uuid.uuid4().hex[:12]
        properties = Properties(PacketTypes.PUBLISH)
        properties.CorrelationData, properties.ResponseTopic = name.encode(), self._reply
        self._client.publish(self._topic, json.dumps(body), 1, properties=properties)
        return name

    def ask(self) -> tuple[float | None, str]:
        """Send a request. Return the seconds to the first token, or None, and the error code or finish reason."""
        begun = time.perf_counter()
        name = self.send(prompt="play some jazz", stream=True, chunk_ms=0, max_tokens=12)
        first = None
        while True:
            try:
                at, body = self._heard.get(timeout=PATIENCE_S)
            except queue.Empty:
                return first, "lost"
            if body["id"] == name and not body["done"] and first is None:
                first = at - begun
            if body["id"] == name and body["done"]:
                return first, (body["error"] or {}).get("code") or body["finish_reason"]

    def finals(self) -> int:
        """Return the number of final messages received since the last call."""
        count = 0
        while not self._heard.empty():
            count += self._heard.get()[1]["done"]
        return count

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def rss_mb(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 1e6


def phase(victim: Victim, seconds: float) -> tuple[list[float], list[str]]:
    """Send requests for `seconds`, with a pause of 20 ms after each."""
    times, ends = [], []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        took, end = victim.ask()
        ends.append(end)
        if took is not None:
            times.append(took)
        time.sleep(0.02)
    return times, ends


def attack(kind: str, port: int, victim: Victim, seconds: float) -> tuple[list[float], list[str], int]:
    if kind == "hog":
        hog = Victim(port, "hog")
        body = {"prompt": "play jazz", "max_tokens": 1_000_000, "ignore_eos": True, "timeout_s": 300}
        for _ in range(12):
            hog.send(**body)
        times, ends, sent = [], [], 12
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            more = phase(victim, 0.01)
            times += more[0]
            ends += more[1]
            for _ in range(hog.finals()):
                hog.send(**body)
                sent += 1
        hog._client.publish(f"edgelm/{BOARD}/cancel/hog", b"")
        time.sleep(0.5)
        hog.close()
        return times, ends, sent
    sent = multiprocessing.get_context("fork").Value("q", 0)
    process = multiprocessing.get_context("fork").Process(target=flood, args=(port, kind, sent), daemon=True)
    process.start()
    try:
        time.sleep(0.5)
        times, ends = phase(victim, seconds)
    finally:
        process.terminate()
        process.join()
    return times, ends, sent.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], default=[])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="builtin")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    broker = Broker(folder).start()
    log = (folder / "board.log").open("wb")
    command = [sys.executable, "-m", "edgelm", "serve", "--mqtt", broker.url, "--board", BOARD, "--model", args.model]
    command += [
        "--prefix-cache-mb",
        "4",
    ]  # small, so that the first flood fills it and later growth is not the prefix cache
    board = subprocess.Popen(command, stderr=log)
    victim = None
    try:
        while b"serving" not in (folder / "board.log").read_bytes():
            time.sleep(0.1)
        victim = Victim(broker.port, "victim")
        phase(victim, 2)
        print("| flood | packets | quiet, ms | under it, ms | times | worst | lost or refused | MB before, after |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        for kind in args.kinds or KINDS:
            quiet, under, ends, sent = [], [], [], 0
            before = rss_mb(board.pid)
            ratios = []
            for _ in range(args.rounds):
                calm = phase(victim, args.seconds / 2)[0]
                times, ended, packets = attack(kind, broker.port, victim, args.seconds)
                quiet += calm
                under += times
                ends += ended
                sent += packets
                ratios.append(statistics.median(times) / statistics.median(calm) if times else float("inf"))
                time.sleep(0.5)
            bad = [end for end in ends if end not in {"stop", "length"}]
            calm_ms, under_ms = 1e3 * statistics.median(quiet), 1e3 * statistics.median(under or [0])
            p95_ms = 1e3 * statistics.quantiles(under or [0, 0], n=20)[-1]
            print(
                f"| {kind} | {sent:,} | {calm_ms:.1f} | {under_ms:.1f} (p95 {p95_ms:.1f}) |"
                f" {statistics.median(ratios):.2f} | {max(ratios):.2f} | {len(bad)} of {len(ends)} |"
                f" {before:.0f}, {rss_mb(board.pid):.0f} |",
                flush=True,
            )
    finally:
        if victim is not None:
            victim.close()
        board.terminate()
        board.wait(20)
        broker.stop()
        print((folder / "board.log").read_text()[-2000:], file=sys.stderr)


if __name__ == "__main__":
    main()
