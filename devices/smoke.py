"""The smoke test for a new board: inference, an answer over MQTT, and the board's condition.

Each check is one line. Speed, memory and temperature are reported without a limit.
"""

from __future__ import annotations

import contextlib
import platform
import time
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import edgelm
from edgelm.errors import EdgelmError
from edgelm.runtime.prepack import verify_kernels
from edgelm.system.memory import measure_memory_mb

from .check_report import SmokeCheck, SmokeReport
from .detect import DetectedBoard, detect_board
from .round_trip import check_round_trip

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgelm import Completion, Model

PROMPT: Final = "play some jazz by Miles Davis on spotify"
INTENT: Final = "PlayMusic"
"""The intent in the built-in model's answer to `PROMPT`."""

MAX_TOKENS: Final = 64
PACKAGES: Final = ("edgelm", "onnxruntime", "numpy", "tokenizers", "paho-mqtt")

GREEDY: Final[dict[str, Any]] = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "seed": 0}
"""Requests with a seed are decoded without speculation, whose draft length depends on the machine's speed."""


def run_smoke_test(
    bundle: str = "builtin",
    *,
    prompt: str | None = None,
    threads: int | None = None,
    broker: str | None = None,
    on_check: Callable[[SmokeCheck], None] | None = None,
) -> SmokeReport:
    """Check this board with a bundle.

    Parameters
    ----------
    bundle
        A bundle's directory, or "builtin".
    prompt
        Prompt for greedy decoding. None is `PROMPT`, whose answer is checked for the built-in bundle.
    threads
        Threads for inference; None is the runtime's default.
    broker
        URL of an MQTT broker for the MQTT check; None starts one.
    on_check
        Called with each check when it is done.
    """
    board = detect_board()
    checks: list[SmokeCheck] = []

    def note(check: SmokeCheck) -> None:
        checks.append(check)
        if on_check is not None:
            on_check(check)

    note(_describe_board(board))
    note(_describe_packages())
    started = time.perf_counter()
    try:
        model = edgelm.load(bundle, threads=threads)
    except EdgelmError as error:
        note(SmokeCheck("load", "failed", str(error)))
        return SmokeReport(board, bundle, None, (), tuple(checks))
    load_s = time.perf_counter() - started
    with model:
        quant = model.manifest.quant
        note(SmokeCheck("load", "ok", f"{bundle} ({quant}) in {load_s:.1f} s, hashes verified", {"load_s": load_s}))
        intent = INTENT if bundle == "builtin" and prompt is None else None
        text = PROMPT if prompt is None else prompt
        answer = model.generate(text, **GREEDY)
        note(check_answer(answer, intent))
        note(_check_kernels(model, threads))
        note(_check_stream(model, text, answer))
    note(check_round_trip(bundle, threads, text, answer, broker))
    after = detect_board()
    for check in (_report_speed(answer), _report_memory(after), _report_temperature(after), _check_throttling(after)):
        note(check)
    return SmokeReport(board, bundle, quant, answer.tokens, tuple(checks))


def _describe_board(board: DetectedBoard) -> SmokeCheck:
    title = board.model or (board.profile.title if board.profile else f"unknown {board.machine} board")
    if board.profile and board.matched_by == "processor" and not board.model:
        title = f"a board with the processor of a {board.profile.title}"
    memory = f", {board.memory_bytes / 1e9:.1f} GB" if board.memory_bytes else ""
    return SmokeCheck("board", "info", f"{title}: {board.cores} x {board.processor or board.machine}{memory}")


def _describe_packages() -> SmokeCheck:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    versions["edgelm"] = edgelm.__version__
    return SmokeCheck(
        "software", "info", ", ".join(f"{name} {version}" for name, version in versions.items()), versions
    )


def check_answer(answer: Completion, intent: str | None) -> SmokeCheck:
    """Check that the answer has the expected intent; without one, that it is not empty."""
    values = answer.to_dict()
    if intent is None:
        message = f"{len(answer.tokens)} tokens, {answer.finish_reason}: {answer.text!r}"
        return SmokeCheck("answer", "ok" if answer.tokens else "failed", message, values)
    got = answer.json.get("intent") if isinstance(answer.json, dict) else None
    message = answer.text if got == intent else f"expected the intent {intent}, got {answer.text!r}"
    return SmokeCheck("answer", "ok" if got == intent else "failed", message, values)


def _check_kernels(model: Model, threads: int | None) -> SmokeCheck:
    """Compile and run our kernels, which larger bundles use (small bundles use onnxruntime's)."""
    try:
        return SmokeCheck("kernels", "ok", verify_kernels(model.bundle, threads))
    except EdgelmError as error:
        return SmokeCheck("kernels", "failed", str(error))
    except OSError as error:
        return SmokeCheck("kernels", "skipped", f"larger models run on onnxruntime's kernels: {error}")


def _check_stream(model: Model, text: str, answer: Completion) -> SmokeCheck:
    """Repeat the request as a stream: the tokens must be the same, and the chunks must add up to the text."""
    *pieces, last = model.stream(text, **GREEDY)
    streamed = "".join(chunk.delta for chunk in (*pieces, last))
    again = last.completion
    if again is None or again.tokens != answer.tokens:
        return SmokeCheck("again", "failed", "the same prompt gave different tokens the second time")
    if streamed != answer.text:
        return SmokeCheck("again", "failed", f"the streamed chunks {streamed!r} differ from the text {answer.text!r}")
    return SmokeCheck("again", "ok", f"the same {len(answer.tokens)} tokens, streamed in {len(pieces) + 1} chunks")


def _report_speed(answer: Completion) -> SmokeCheck:
    timing = answer.timing
    message = f"first token after {timing.ttft_ms:.0f} ms, then {timing.tok_s:.0f} tokens/s"
    return SmokeCheck("speed", "info", message, {"ttft_ms": timing.ttft_ms, "tok_s": timing.tok_s})


def _report_memory(board: DetectedBoard) -> SmokeCheck:
    used, available = measure_memory_mb(), board.memory_available_bytes
    message = f"peak {used['rss_peak_mb']:.0f} MB" if used else "not reported by this machine"
    if available:
        message += f", {available / 1e6:.0f} MB still available"
    return SmokeCheck("memory", "info", message, {**used, "available_bytes": available})


def _report_temperature(board: DetectedBoard) -> SmokeCheck:
    celsius = board.temperature_c
    if celsius is None:
        return SmokeCheck("temperature", "skipped", "not reported by this machine")
    return SmokeCheck("temperature", "info", f"{celsius:.1f} degrees Celsius", {"celsius": celsius})


def _check_throttling(board: DetectedBoard) -> SmokeCheck:
    """Fail if the board is throttled now: its power supply or cooling is insufficient."""
    found = board.throttling
    if found is None:
        return SmokeCheck("throttling", "skipped", "reported by a Raspberry Pi only")
    past = f" (since boot: {', '.join(found.since_boot)})" if found.since_boot else ""
    if found.now:
        return SmokeCheck(
            "throttling", "failed", f"{', '.join(found.now)} now{past}: check the power supply and the cooling"
        )
    return SmokeCheck("throttling", "ok", f"none{past}")
