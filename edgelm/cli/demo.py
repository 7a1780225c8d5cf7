"""`edgelm demo`: run a broker, a board and a client on this machine, send three requests over MQTT, and stop."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from edgelm.bundle.bundle_folder import Bundle, open_bundle
from edgelm.cli.ask import make_request
from edgelm.errors import EdgelmError
from edgelm.mqtt.broker_config import BrokerConfig, BrokerUrl
from edgelm.mqtt.local_broker import EmbeddedBroker, make_local_broker
from edgelm.mqtt.request_client import RequestClient, run_request
from edgelm.mqtt.response_codec import FinalMessage
from edgelm.mqtt.service_config import ServeConfig
from edgelm.mqtt.service_setup import serve_in_background
from edgelm.mqtt.topics import BoardTopics

BOARD: Final = "demo"
PROMPTS: Final = (
    "play some jazz by Miles Davis on spotify",
    "book a table for four at an italian restaurant in Boston tomorrow",
    "will it rain in Berlin on friday",
)
ANSWER_TIMEOUT_S: Final = 60.0

NEXT: Final = (
    ("serve --mqtt mqtt://localhost:1883", "answer requests at your own broker"),
    ('ask "add Adele to my running playlist"', "send a request; from another machine: --broker URL --board NAME"),
    ("models", "list larger models: edgelm pull NAME, then edgelm chat NAME"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--embedded-broker", action="store_true", help="use the embedded broker even if mosquitto is installed"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; return 0 only if every request was answered."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # stop broker and board then too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    print("edgelm demo: a small language model answers over MQTT, all on this machine.\n", flush=True)
    with ExitStack() as stack:
        broker = stack.enter_context(EmbeddedBroker() if args.embedded_broker else make_local_broker())
        _show("broker", f"{broker.name}, {broker.url}")
        bundle = open_bundle("builtin")
        _show("model", _describe(bundle))
        config = ServeConfig(mqtt=broker.url, board=BOARD, embedded_broker=isinstance(broker, EmbeddedBroker))
        stack.enter_context(serve_in_background(config))
        _show("board", f"{BOARD!r} listens on {BoardTopics(BOARD).generate()}")
        client = stack.enter_context(RequestClient(BrokerConfig(url=BrokerUrl.parse(broker.url)), BOARD))
        answered = sum(_ask(client, number, prompt) for number, prompt in enumerate(PROMPTS, 1))
    if answered < len(PROMPTS):
        raise EdgelmError(f"{answered} of {len(PROMPTS)} requests were answered")
    print(f"\nAll {answered} answered; broker and board are stopped.\n\nNext", flush=True)
    program = _program()
    for arguments, purpose in NEXT:
        print(f"  {program} {arguments:<42} {purpose}", flush=True)
    return 0


def _program() -> str:
    """Return how a shell starts this program: by its name if that finds it, else by its path."""
    started = Path(sys.argv[0])
    found = shutil.which("edgelm")
    if started.name != "edgelm" or (found is not None and Path(found).samefile(started)):
        return "edgelm"
    return os.path.relpath(started)


def _show(label: str, text: str) -> None:
    print(f"  {label:8}{text}", flush=True)


def _describe(bundle: Bundle) -> str:
    manifest = bundle.manifest
    millions, megabytes = manifest.parameters / 1e6, bundle.bytes / 1e6
    return f"built-in: {millions:.1f} M parameters, {manifest.quant}, {megabytes:.1f} MB on disk"


def _ask(client: RequestClient, number: int, prompt: str) -> bool:
    """Send one request, print its answer as it arrives, and return whether it is complete."""
    print(f"\n  {number}  {prompt}\n     ", end="", flush=True)
    request = make_request(prompt, stream=True, chunk_ms=0, timeout_s=ANSWER_TIMEOUT_S)
    outcome: FinalMessage = run_request(client, request, lambda delta: print(delta, end="", flush=True))
    if outcome.error is not None:
        print(f"failed: {outcome.error.message}", flush=True)
        return False
    timing, usage = outcome.completion.timing, outcome.completion.usage
    print(
        f"\n     first token {timing.ttft_ms:.0f} ms, all {usage.completion_tokens} tokens {timing.total_ms:.0f} ms, "
        f"{timing.tok_s:.0f} tokens/s",
        flush=True,
    )
    return True
