"""The worker: bounded queue, cancelling, deadlines, draining, closing."""

from __future__ import annotations

import threading
import time

import pytest
from clients import PATIENCE_S, Client, ask, occupy

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import EngineOptions
from edgelm.errors import EdgelmError, RequestError
from edgelm.types import Constraint


def test_chunks_concatenate_to_answers_and_are_counted(start_worker):
    worker = start_worker(max_batch=2)
    clients = [ask(worker, f"r{i}", max_tokens=3 + i) for i in range(4)]
    for i, client in enumerate(clients):
        done = client.completion()
        assert (done.id, done.finish_reason, len(done.tokens)) == (f"r{i}", "length", 3 + i)
        assert "".join(chunk.delta for chunk in client.chunks) == done.text
        timing = done.timing
        assert 0 <= timing.queue_ms <= timing.ttft_ms <= timing.total_ms
    stats = worker.call(lambda _: worker.stats())
    assert (stats.queued, stats.active, stats.completed) == (0, 0, 4)
    assert stats.tok_s > 0
    assert worker.failure is None


def test_a_full_queue_is_busy_with_retry_after_s(start_worker):
    worker = start_worker(max_batch=1, queue_size=2)
    running = occupy(worker)
    waiting = [ask(worker, f"w{i}") for i in range(2)]
    with pytest.raises(RequestError) as caught:
        ask(worker, "one too many")
    assert (caught.value.code, caught.value.status) == ("busy", 503)
    assert caught.value.retry_after_s > 0
    assert worker.stats().queued == 2
    worker.cancel("busy")
    running.gate.set()
    assert all(client.completion().finish_reason == "length" for client in waiting)
    assert ask(worker, "one too many").completion().finish_reason == "length"


def test_a_request_id_is_in_use_until_its_answer_is_complete(start_worker):
    worker = start_worker()
    running = occupy(worker, "same")
    with pytest.raises(RequestError) as caught:
        ask(worker, "same")
    assert caught.value.code == "id_conflict"
    worker.cancel("same")
    running.gate.set()
    assert running.completion().finish_reason == "cancelled"
    assert ask(worker, "same").completion().finish_reason == "length"


def test_cancelling_ends_a_running_and_a_waiting_request(start_worker):
    worker = start_worker(max_batch=1)
    running = occupy(worker)
    waiting, spared = ask(worker, "waiting"), ask(worker, "spared")
    assert worker.cancel("busy")
    assert worker.cancel("waiting")
    assert not worker.cancel("unheard of")
    running.gate.set()
    done = running.completion()
    assert done.finish_reason == "cancelled"
    assert 1 <= len(done.tokens) < 400
    assert (waiting.completion().finish_reason, waiting.completion().tokens) == ("cancelled", ())
    assert spared.completion().finish_reason == "length"
    assert not worker.cancel("busy")


def test_a_late_cancel_does_not_affect_the_next_request_with_the_id(start_worker):
    worker = start_worker()
    second = Client()

    def first(chunk):
        if chunk.seq == 2:  # the last token; the last chunk belongs to the same step
            assert worker.cancel("same")
        if chunk.done:
            ask(worker, "same", client=second, max_tokens=7)

    ask(worker, "same", client=first, max_tokens=3)
    done = second.completion()
    assert (done.finish_reason, len(done.tokens)) == ("length", 7)


def test_a_deadline_ends_a_running_request_with_the_answer_so_far(start_worker):
    worker = start_worker()
    client = Client(gate=True)
    ask(worker, "late", client=client, max_tokens=400, deadline=time.monotonic() + 1)
    assert client.first.wait(PATIENCE_S)
    time.sleep(1.05)
    client.gate.set()
    done = client.completion()
    assert done.finish_reason == "deadline"
    assert len(done.tokens) < 400
    assert done.error is None


def test_a_deadline_ends_a_waiting_request(start_worker):
    worker = start_worker(max_batch=1)
    running = occupy(worker)
    waiting = ask(worker, "late", deadline=time.monotonic() + 0.05)
    time.sleep(0.1)
    running.gate.set()
    assert (waiting.completion().finish_reason, waiting.completion().tokens) == ("deadline", ())
    assert worker.cancel("busy")
    assert running.completion().finish_reason == "cancelled"


def test_a_prompt_that_does_not_fit_states_both_lengths(start_worker):
    worker = start_worker()
    context = worker.context
    done = ask(worker, "long", prompt=tuple([5] * (context + 3))).completion()
    assert (done.finish_reason, done.error.code) == ("error", "bad_request")
    assert str(context + 3) in done.error.message
    assert str(context) in done.error.message
    just = ask(worker, "just", prompt=tuple([5] * (context - 1)), max_tokens=9).completion()
    assert (just.finish_reason, len(just.tokens)) == ("length", 1)


@pytest.mark.parametrize("prompt", [(), (-1,), (10**9,)])
def test_a_prompt_without_tokens_or_with_unknown_ones_is_refused(prompt, start_worker):
    done = ask(start_worker(), "odd", prompt=prompt).completion()
    assert (done.finish_reason, done.error.code) == ("error", "bad_request")


def test_an_invalid_constraint_fails_only_its_request(start_worker):
    worker = start_worker()
    done = ask(worker, "bad", constraint=Constraint("regex", "(")).completion()
    assert done.error.code == "bad_request"
    assert ask(worker, "after").completion().finish_reason == "length"


def test_draining_finishes_requests_and_refuses_new_ones(start_worker):
    worker = start_worker()
    running = occupy(worker)
    waiting = ask(worker, "waiting")
    worker.drain()
    with pytest.raises(RequestError) as caught:
        ask(worker, "new")
    assert caught.value.code == "draining"
    worker.cancel("busy")
    running.gate.set()
    assert waiting.completion().finish_reason == "length"


def test_closing_ends_every_request_and_call_with_an_error(start_worker):
    worker = start_worker(max_batch=1)
    running = occupy(worker)
    waiting = [ask(worker, f"w{i}") for i in range(3)]
    errors = []

    def call():
        try:
            worker.call(lambda engine: engine.context)
        except EdgelmError as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    while not worker._calls:
        time.sleep(0.001)
    closer = threading.Thread(target=worker.close, args=(PATIENCE_S,))
    closer.start()
    while not worker._is_closing:
        time.sleep(0.001)
    running.gate.set()
    for client in (running, *waiting):
        done = client.completion()
        assert (done.finish_reason, done.error.code) == ("error", "interrupted")
    closer.join()
    caller.join()
    assert len(errors) == 1
    for refused in (lambda: ask(worker, "new"), lambda: worker.call(lambda engine: 1)):
        with pytest.raises(EdgelmError):
            refused()
    worker.close()  # may be called again


def test_a_call_runs_on_the_thread_and_returns_or_raises(start_worker):
    worker = start_worker()
    assert worker.call(lambda engine: (engine, threading.current_thread().name)) == (worker._engine, "edgelm-worker")
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda engine: 1 // 0)
    assert ask(worker, "after").completion().finish_reason == "length"


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"context": 0}, {"context": 10**9}, {"threads": 0}])
def test_an_option_out_of_range_is_refused(options, bundle):
    with pytest.raises(EdgelmError, match=next(iter(options))):
        Engine(open_bundle(bundle), EngineOptions(**options))
