"""The MQTT check of the smoke test: the service and a client send a request and its answer through a broker."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Final

from edgelm.errors import EdgelmError, MissingExtraError
from edgelm.mqtt.broker_config import BrokerConfig, BrokerUrl
from edgelm.mqtt.local_broker import make_local_broker
from edgelm.mqtt.request_client import RequestClient, run_request
from edgelm.mqtt.request_codec import GenerateRequest
from edgelm.mqtt.service_config import ServeConfig
from edgelm.mqtt.service_setup import serve_in_background
from edgelm.system.installation import install_command

from .check_report import SmokeCheck

if TYPE_CHECKING:
    from edgelm import Completion

ANSWER_TIMEOUT_S: Final = 240.0
"""Long enough for an emulated processor."""


def check_round_trip(
    bundle: str, threads: int | None, prompt: str, answer: Completion, broker: str | None
) -> SmokeCheck:
    """Serve the bundle at a broker, send it a request, and compare its answer with the given one.

    Parameters
    ----------
    bundle, threads
        The bundle to serve, and the number of threads.
    prompt, answer
        The prompt, and its greedy answer without MQTT.
    broker
        The broker's URL. None starts mosquitto or else the embedded broker; without both the check is skipped.
    """
    try:
        if broker is not None:
            return _check_at(broker, broker, bundle, threads, prompt, answer)
        with make_local_broker() as started:
            return _check_at(started.url, started.name, bundle, threads, prompt, answer)
    except MissingExtraError:
        message = f"no broker: apt-get install mosquitto, or {install_command('broker')}, or --broker URL"
        return SmokeCheck("mqtt", "skipped", message)
    except EdgelmError as error:
        return SmokeCheck("mqtt", "failed", str(error))


def _check_at(url: str, name: str, bundle: str, threads: int | None, prompt: str, answer: Completion) -> SmokeCheck:
    board = f"smoke-{uuid.uuid4().hex[:8]}"
    config = ServeConfig(mqtt=url, board=board, model=bundle, threads=threads, max_batch=1)
    sampling = {"max_tokens": max(1, len(answer.tokens)), "temperature": 0.0, "seed": 0}
    request = GenerateRequest(
        uuid.uuid4().hex, prompt=prompt, sampling=sampling, stream=True, timeout_s=ANSWER_TIMEOUT_S
    )
    with serve_in_background(config), RequestClient(BrokerConfig(url=BrokerUrl.parse(url)), board) as client:
        started = time.perf_counter()
        pieces: list[str] = []
        outcome = run_request(client, request, pieces.append)
        elapsed_ms = 1000 * (time.perf_counter() - started)
    if outcome.error is not None:
        return SmokeCheck("mqtt", "failed", f"{outcome.error.code}: {outcome.error.message}")
    if not outcome.completion.text == "".join(pieces) == answer.text:
        return SmokeCheck("mqtt", "failed", f"expected the answer {answer.text!r}, got {outcome.completion.text!r}")
    inference_ms = outcome.completion.timing.total_ms
    message = f"the same answer through {name} in {elapsed_ms:.0f} ms, of which inference {inference_ms:.0f} ms"
    return SmokeCheck("mqtt", "ok", message, {"elapsed_ms": elapsed_ms, "inference_ms": inference_ms})
