"""A failure in a step, a detokenizer or a callback ends only the affected requests, with an error."""

from __future__ import annotations

import threading
import time

import pytest
from clients import ask, occupy


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_a_failing_step_ends_requests_with_errors_and_the_next_works(part, start_worker):
    worker = start_worker(max_batch=2)

    def break_once(engine):
        real = getattr(engine.runner, part)

        def fail(*given, **options):
            setattr(engine.runner, part, real)
            raise OSError("a fault on purpose")

        setattr(engine.runner, part, fail)

    expected = ask(worker, "before").completion().tokens
    running = occupy(worker)
    waiting = [ask(worker, f"w{i}") for i in range(3)]
    caller = threading.Thread(target=worker.call, args=(break_once,))
    caller.start()
    while not worker._calls:
        time.sleep(0.001)
    running.gate.set()
    for client in (running, *waiting):
        done = client.completion()
        assert (done.finish_reason, done.error.code) == ("error", "internal")
        assert "on purpose" in done.error.message
    caller.join()
    assert worker.failure is None
    assert worker.stats().active == worker.stats().queued == 0
    assert ask(worker, "after").completion().tokens == expected


def test_a_failing_step_does_not_lose_chunks_that_were_ready(start_worker):
    worker = start_worker(max_batch=2)
    running = occupy(worker)
    other = ask(worker, "other", max_tokens=300)

    def break_decode(engine):
        real = engine.runner.decode

        def fail(*given):
            engine.runner.decode = real
            raise OSError("a fault on purpose")

        engine.runner.decode = fail

    caller = threading.Thread(target=worker.call, args=(break_decode,))
    caller.start()
    while not worker._calls:
        time.sleep(0.001)
    worker.cancel("busy")  # takes effect in the step that fails
    running.gate.set()
    assert running.completion().finish_reason == "cancelled"
    assert other.completion().error.code == "internal"
    caller.join()


def test_requests_end_even_if_the_detokenizer_fails(start_worker):
    worker = start_worker(max_batch=2)
    running = occupy(worker)
    other = ask(worker, "other", max_tokens=300)

    def fail(*given):
        raise ValueError("not a text")

    def break_decoder(engine):
        (sequence,) = engine._scheduler.running
        sequence._decoder.push = sequence._decoder.finish = fail

    caller = threading.Thread(target=worker.call, args=(break_decoder,))
    caller.start()
    while not worker._calls:
        time.sleep(0.001)
    running.gate.set()
    for client in (running, other):
        assert client.completion().error.code == "internal"
    caller.join()
    assert ask(worker, "after").completion().finish_reason == "length"


def test_a_failing_callback_does_not_affect_other_requests(start_worker, caplog):
    worker = start_worker(max_batch=2)
    running = occupy(worker)

    def broken(chunk):
        raise LookupError("no one home")

    ask(worker, "broken", client=broken, max_tokens=400)
    neighbour = ask(worker, "neighbour")
    worker.cancel("busy")
    running.gate.set()
    assert neighbour.completion().finish_reason == "length"
    assert running.completion().finish_reason == "cancelled"
    assert "no one home" in caplog.text
    assert worker.failure is None
    assert ask(worker, "after").completion().finish_reason == "length"
