"""The worker's thread: bounded, cancellable, honest about failure, and over when it is told to be."""

from __future__ import annotations

import threading
import time

import pytest

from edgelm.bundle import open_bundle
from edgelm.engine import Engine
from edgelm.errors import EdgelmError, RequestError
from edgelm.messages import Constraint, Request, SamplingParams
from edgelm.worker import Worker

PATIENCE_S = 60.0
PROMPT = (5, 6, 7, 8)


class Client:
    """Collects the chunks of one request. With `gate` the worker waits in the first chunk until it is opened."""

    def __init__(self, gate=False):
        self.chunks = []
        self.done = threading.Event()
        self.first = threading.Event()
        self.gate = threading.Event()
        if not gate:
            self.gate.set()

    def __call__(self, chunk):
        self.chunks.append(chunk)
        self.first.set()
        if chunk.done:
            self.done.set()
        assert self.gate.wait(PATIENCE_S)

    def completion(self):
        assert self.done.wait(PATIENCE_S)
        assert [chunk.done for chunk in self.chunks] == [False] * (len(self.chunks) - 1) + [True]
        return self.chunks[-1].completion


@pytest.fixture
def start(bundle):
    """Start a worker of a fresh engine; closed after the test."""
    workers = []

    def begin(max_batch=1, queue_size=8):
        worker = Worker(Engine(open_bundle(bundle), threads=1, max_batch=max_batch), queue_size)
        worker.start()
        workers.append(worker)
        return worker

    yield begin
    for worker in workers:
        worker.close(PATIENCE_S)
        assert not worker._thread.is_alive()


def ask(worker, name, *, client=None, max_tokens=5, deadline=None, prompt=PROMPT, constraint=None):
    client = client or Client()
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    worker.submit(Request(name, sampling, tokens=prompt, deadline=deadline, constraint=constraint), client)
    return client


def occupy(worker, name="busy"):
    """Submit a long request, and return once the worker waits in its first chunk."""
    client = ask(worker, name, client=Client(gate=True), max_tokens=400)
    assert client.first.wait(PATIENCE_S)
    return client


def test_answers_come_in_pieces_and_are_counted(start):
    worker = start(max_batch=2)
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


def test_a_full_queue_is_busy_and_says_when_to_come_back(start):
    worker = start(max_batch=1, queue_size=2)
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


def test_a_request_id_is_taken_until_its_answer_is_complete(start):
    worker = start()
    running = occupy(worker, "same")
    with pytest.raises(RequestError) as caught:
        ask(worker, "same")
    assert caught.value.code == "id_conflict"
    worker.cancel("same")
    running.gate.set()
    assert running.completion().finish_reason == "cancelled"
    assert ask(worker, "same").completion().finish_reason == "length"


def test_cancelling_ends_a_running_and_a_waiting_request(start):
    worker = start(max_batch=1)
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


def test_a_late_cancel_does_not_meet_the_next_request_of_that_id(start):
    worker = start()
    second = Client()

    def first(chunk):
        if chunk.seq == 2:  # the last token; the final message is in the same step's chunks
            assert worker.cancel("same")
        if chunk.done:
            ask(worker, "same", client=second, max_tokens=7)

    ask(worker, "same", client=first, max_tokens=3)
    done = second.completion()
    assert (done.finish_reason, len(done.tokens)) == ("length", 7)


def test_a_deadline_ends_a_running_request_with_what_it_has(start):
    worker = start()
    client = Client(gate=True)
    ask(worker, "late", client=client, max_tokens=400, deadline=time.monotonic() + 1)
    assert client.first.wait(PATIENCE_S)
    time.sleep(1.05)
    client.gate.set()
    done = client.completion()
    assert done.finish_reason == "deadline"
    assert len(done.tokens) < 400
    assert done.error is None


def test_a_deadline_passes_in_the_queue_too(start):
    worker = start(max_batch=1)
    running = occupy(worker)
    waiting = ask(worker, "late", deadline=time.monotonic() + 0.05)
    time.sleep(0.1)
    running.gate.set()
    assert (waiting.completion().finish_reason, waiting.completion().tokens) == ("deadline", ())
    assert worker.cancel("busy")
    assert running.completion().finish_reason == "cancelled"


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_a_failing_step_ends_in_errors_and_the_next_request_works(part, start):
    worker = start(max_batch=2)

    def break_once(engine):
        real = getattr(engine.session, part)

        def fail(*given, **options):
            setattr(engine.session, part, real)
            raise OSError("the memory is on fire")

        setattr(engine.session, part, fail)

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
        assert "on fire" in done.error.message
    caller.join()
    assert worker.failure is None
    assert worker.stats().active == worker.stats().queued == 0
    assert ask(worker, "after").completion().tokens == expected


def test_a_failing_step_does_not_lose_the_last_chunk_of_another(start):
    worker = start(max_batch=2)
    running = occupy(worker)
    other = ask(worker, "other", max_tokens=300)

    def break_decode(engine):
        real = engine.session.decode

        def fail(*given):
            engine.session.decode = real
            raise OSError("the memory is on fire")

        engine.session.decode = fail

    caller = threading.Thread(target=worker.call, args=(break_decode,))
    caller.start()
    while not worker._calls:
        time.sleep(0.001)
    worker.cancel("busy")  # ended in the step that fails
    running.gate.set()
    assert running.completion().finish_reason == "cancelled"
    assert other.completion().error.code == "internal"
    caller.join()


def test_a_text_that_cannot_be_decoded_still_ends_everyone(start):
    worker = start(max_batch=2)
    running = occupy(worker)
    other = ask(worker, "other", max_tokens=300)

    def fail(*given):
        raise ValueError("not a text")

    def break_decoder(engine):
        (sequence,) = engine._running
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


def test_a_receiver_that_fails_costs_nobody_else(start, caplog):
    worker = start(max_batch=2)
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


def test_a_prompt_that_does_not_fit_states_both_lengths(start):
    worker = start()
    context = worker.engine.context
    done = ask(worker, "long", prompt=tuple([5] * (context + 3))).completion()
    assert (done.finish_reason, done.error.code) == ("error", "bad_request")
    assert str(context + 3) in done.error.message
    assert str(context) in done.error.message
    just = ask(worker, "just", prompt=tuple([5] * (context - 1)), max_tokens=9).completion()
    assert (just.finish_reason, len(just.tokens)) == ("length", 1)


@pytest.mark.parametrize("prompt", [(), (-1,), (10**9,)])
def test_a_prompt_of_no_or_unknown_tokens_is_refused(prompt, start):
    done = ask(start(), "odd", prompt=prompt).completion()
    assert (done.finish_reason, done.error.code) == ("error", "bad_request")


def test_a_bad_constraint_is_the_requests_own_error(start):
    worker = start()
    done = ask(worker, "bad", constraint=Constraint("regex", "(")).completion()
    assert done.error.code == "bad_request"
    assert ask(worker, "after").completion().finish_reason == "length"


def test_draining_finishes_what_there_is_and_takes_no_more(start):
    worker = start()
    running = occupy(worker)
    waiting = ask(worker, "waiting")
    worker.drain()
    with pytest.raises(RequestError) as caught:
        ask(worker, "new")
    assert caught.value.code == "draining"
    worker.cancel("busy")
    running.gate.set()
    assert waiting.completion().finish_reason == "length"


def test_closing_tells_everyone(start):
    worker = start(max_batch=1)
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
    while not worker._closing:
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
    worker.close()  # twice is fine


def test_a_call_runs_on_the_worker_and_brings_back_what_came_of_it(start):
    worker = start()
    assert worker.call(lambda engine: (engine, threading.current_thread().name)) == (worker.engine, "edgelm-worker")
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda engine: 1 // 0)
    assert ask(worker, "after").completion().finish_reason == "length"


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"context": 0}, {"context": 10**9}, {"threads": 0}])
def test_an_option_out_of_range_is_refused(options, bundle):
    with pytest.raises(EdgelmError, match=next(iter(options))):
        Engine(open_bundle(bundle), **options)
