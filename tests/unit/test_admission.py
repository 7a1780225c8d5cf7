"""Preparation of prompts and kernels on background threads: same answers, same order, no other request waits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import edgelm
from edgelm.bundle.manifest import MANIFEST
from edgelm.engine import admission
from edgelm.engine.admission import SHORT_TEXT_LENGTH
from edgelm.errors import RequestError
from edgelm.model import Model

if not (Path(edgelm.__file__).parent / "builtin" / MANIFEST).is_file():
    pytest.skip(
        "the built-in bundle is absent: python -m edgelm_export.distill.builtin_recipe makes it",
        allow_module_level=True,
    )

LONG = "play some jazz " * (SHORT_TEXT_LENGTH // 10)
PATIENCE_S = 30.0


@pytest.fixture
def model() -> Iterator[Model]:
    with edgelm.load("builtin", max_batch=2) as opened:
        yield opened


class Held:
    """An `encode` that blocks for a long text until `release` is set."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.release = threading.Event(), threading.Event()
        self.threads: list[str] = []
        tokenizer = model.tokenizer
        encode = tokenizer.encode

        def slow(text: str, add_special_tokens: bool = True) -> list[int]:
            self.threads.append(threading.current_thread().name)
            if len(text) > SHORT_TEXT_LENGTH:
                self.begun.set()
                assert self.release.wait(PATIENCE_S)
            return encode(text, add_special_tokens)

        monkeypatch.setattr(tokenizer, "encode", slow)


@pytest.fixture
def held(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    holding = Held(model, monkeypatch)
    yield holding
    holding.release.set()


def ended(function: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Start a thread that calls a function; return it and a list that gets the result or error."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(function())
        except RequestError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_a_long_prompt_does_not_delay_other_requests(model: Model, held: Held) -> None:
    thread, results = ended(lambda: model.generate(LONG, raw=True, max_tokens=2))
    assert held.begun.wait(PATIENCE_S)
    assert model.generate("play jazz", max_tokens=2).text  # while the other one is prepared
    assert not results
    held.release.set()
    thread.join(PATIENCE_S)
    assert isinstance(results[0], RequestError)  # the prompt is longer than the context
    assert results[0].code == "bad_request"
    assert str(model.context) in results[0].message
    assert {"edgelm-prompts", "edgelm-worker"} == set(held.threads)


def test_requests_of_a_session_stay_in_order_behind_a_long_prompt(model: Model, held: Held) -> None:
    first, failed = ended(lambda: model.generate(LONG, raw=True, session="a", max_tokens=2))
    assert held.begun.wait(PATIENCE_S)
    second, answered = ended(lambda: model.generate("play jazz", raw=True, session="a", max_tokens=2))
    time.sleep(0.2)
    assert not answered
    held.release.set()
    first.join(PATIENCE_S)
    second.join(PATIENCE_S)
    assert isinstance(failed[0], RequestError)
    assert getattr(answered[0], "turn", None) == 1  # the failed request did not change the session


def test_a_request_ends_at_its_deadline_while_its_prompt_is_tokenized(model: Model, held: Held) -> None:
    done = model.generate(LONG, raw=True, session="a", max_tokens=2, timeout_s=0.3)
    assert (done.finish_reason, done.text) == ("deadline", "")
    held.release.set()
    assert model.generate("play jazz", raw=True, session="a", max_tokens=2).turn == 1


def test_answers_do_not_depend_on_the_thread_that_tokenizes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(session: str) -> list[tuple[str, int | None]]:
        said = [model.generate("play some jazz", session=session, max_tokens=9) for _ in range(2)]
        said.append(model.generate(messages=[{"role": "user", "content": "set <|endoftext|> an alarm"}], max_tokens=9))
        return [(each.text, each.turn) for each in said]

    at_once = answers("a")
    monkeypatch.setattr(admission, "SHORT_TEXT_LENGTH", -1)
    assert answers("b") == at_once


def test_a_panic_of_the_tokenizer_fails_only_its_request(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def broken(text: str, add_special_tokens: bool = True) -> list[int]:
        raise Panic("index out of bounds")

    with monkeypatch.context() as patched:
        patched.setattr(model.tokenizer, "encode", broken)
        for prompt in ("short", LONG):
            with pytest.raises(RequestError, match="Panic: index out of bounds") as caught:
                model.generate(prompt, raw=True, max_tokens=2)
            assert caught.value.code == "internal"
    assert model.generate("play jazz", max_tokens=2).text


def test_encoding_releases_the_gil(model: Model) -> None:
    tokenizer = model.tokenizer
    text = " " * 1_000_000
    begun = time.monotonic()
    tokenizer.encode(text)
    alone = time.monotonic() - begun
    thread, _ = ended(lambda: tokenizer.encode(text))
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 5, f"{turns} turns while it encoded, which takes {alone:.2f} s"


FIRST_SAMPLED = """
import sys, threading, time
import edgelm
from edgelm.sampling import are_kernels_loaded, sampler
begun, release = threading.Event(), threading.Event()
load = sampler._load_kernels
def slow():
    begun.set()
    assert release.wait(30)
    return load()
sampler._load_kernels = slow
with edgelm.load("builtin", max_batch=2) as model:
    assert not are_kernels_loaded()
    said = []
    thread = threading.Thread(target=lambda: said.append(model.generate("play", temperature=0.7, max_tokens=2, seed=1)))
    thread.start()
    assert begun.wait(30)
    assert model.generate("play jazz", max_tokens=2).tokens  # while the other one is prepared
    assert not are_kernels_loaded() and not said
    release.set()
    thread.join(60)
    assert are_kernels_loaded() and said[0].tokens
"""


def test_loading_the_kernels_does_not_delay_other_requests() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_SAMPLED], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


ENSURE = """
import sys
from edgelm.sampling import ensure_compiled, are_kernels_loaded, precompilation
run, runs = precompilation.subprocess.run, []
precompilation.subprocess.run = lambda *a, **k: runs.append(a) or run(*a, **k)
ensure_compiled()
print(are_kernels_loaded(), "numba" in sys.modules, len(runs))
"""


def test_kernels_are_compiled_at_the_first_start_in_a_child_process(tmp_path: Path) -> None:
    def start(folder: Path) -> list[str]:
        environment = {"EDGELM_CACHE_DIR": str(folder), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, "-c", ENSURE], capture_output=True, text=True, timeout=240, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    first, second = start(tmp_path / "cache"), start(tmp_path / "cache")
    assert (first, second) == (["False", "False", "1"], ["False", "False", "0"])
    assert list((tmp_path / "cache").rglob("*.nbi"))
