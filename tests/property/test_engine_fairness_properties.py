"""A step computes at most one prefill chunk, long prompts do not delay short ones, and every request ends."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import EngineOptions
from edgelm.engine.speculation import DRAFT_LENGTHS
from edgelm.errors import RequestError
from edgelm.runtime.memory_plan import PREFILL_CHUNK
from edgelm.types import Constraint, Request, SamplingParams

MAX_BATCH = 3
FORCED = Constraint("regex", "(yes|no)" + ", the dog" * 90 + " (home|away)")
"""Several hundred forced tokens after the first token."""


@pytest.fixture(scope="module")
def engine(float32_bundle):
    """An engine whose `passes` are the token counts of all calls of `prefill`."""
    engine = Engine(open_bundle(float32_bundle), EngineOptions(threads=1, max_batch=MAX_BATCH, prefix_cache_mb=0))
    prefill, engine.passes = engine.runner.prefill, []

    def counting(row, tokens, *more, **options):
        engine.passes.append(len(tokens))
        return prefill(row, tokens, *more, **options)

    engine.runner.prefill = counting
    return engine


arrivals = st.lists(
    st.tuples(
        st.integers(0, 30),  # step before which the request arrives
        st.sampled_from([1, 2, 9, 60, PREFILL_CHUNK, PREFILL_CHUNK + 1, 400]),
        st.integers(1, 20),
        st.booleans(),  # whether its constraint forces many tokens
        st.none() | st.none() | st.integers(0, 40),  # step before which it is cancelled
    ),
    min_size=1,
    max_size=10,
)


def make(name, length, most_tokens, is_forced):
    if is_forced:
        return Request(name, SamplingParams(max_tokens=400), prompt="x", constraint=FORCED)
    tokens = tuple(np.random.default_rng(length).integers(2, 300, length).tolist())
    return Request(name, SamplingParams(max_tokens=most_tokens, ignore_eos=True), tokens=tokens)


def clear(engine):
    """End the requests of the example before."""
    engine.fail_all(RequestError("internal", "left over"))


@settings(max_examples=30)
@given(plan=arrivals)
def test_a_step_computes_at_most_one_chunk_and_prompts_of_equal_length_stay_in_order(plan, engine):
    clear(engine)
    arrived, started, ended, step = [], [], [], 0
    while step <= max(entry[0] for entry in plan) or engine.queued or engine.active:
        for i, (start, length, most_tokens, is_forced, cancel) in enumerate(plan):
            if start == step:
                engine.add(make(str(i), length, most_tokens, is_forced), time.monotonic())
                arrived.append(str(i))
            if cancel == step:
                engine.cancel(str(i))
        engine.passes.clear()
        for chunk in engine.step():
            if chunk.token is not None and chunk.id not in started:
                started.append(chunk.id)
            if chunk.done:
                ended.append(chunk.id)
        assert sum(engine.passes) <= PREFILL_CHUNK + 1 + DRAFT_LENGTHS[0]  # draft tokens: only if one sequence runs
        assert engine.active <= MAX_BATCH
        step += 1
        assert step < 3000
    assert sorted(ended) == sorted(arrived)
    from_tokens = [name for name in arrived if name in started and not plan[int(name)][3]]  # others: text
    for i, first in enumerate(from_tokens):
        for later in from_tokens[i + 1 :]:
            if plan[int(first)][1] <= plan[int(later)][1]:
                assert started.index(first) < started.index(later), "earlier and not longer: answered first"


@settings(max_examples=20)
@given(
    length=st.integers(1, 60),
    most_tokens=st.integers(2, 40),
    others=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 8), st.booleans()), min_size=1, max_size=5),
)
def test_an_answer_gets_a_token_each_step_while_others_arrive(length, most_tokens, others, engine):
    """Other requests arrive without end."""
    clear(engine)
    engine.add(make("one", length, most_tokens, False), time.monotonic())
    got, step = [], 0
    while True:
        if engine.queued < 2:
            engine.add(make(f"other {step}", *others[step % len(others)]), time.monotonic())
        tokens = [chunk for chunk in engine.step() if chunk.id == "one"]
        got.append(sum(chunk.token is not None for chunk in tokens))
        if any(chunk.done for chunk in tokens):
            break
        step += 1
    assert sum(got) == most_tokens
    waited = next(i for i, count in enumerate(got) if count)
    assert waited <= 1, "the prompt is one chunk, and at most one shorter prompt goes first"
    assert min(got[waited:-1], default=1) >= 1


@settings(max_examples=10)
@given(waiting=st.integers(1, 12), lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4))
def test_more_requests_than_rows_wait_and_are_all_answered(waiting, lengths, engine):
    clear(engine)
    names = [str(i) for i in range(MAX_BATCH + waiting)]
    for i, name in enumerate(names):
        engine.add(make(name, lengths[i % len(lengths)], 3, False), time.monotonic())
    assert engine.queued == len(names)
    done = {}
    while engine.queued or engine.active:
        done |= {chunk.id: chunk.completion for chunk in engine.step() if chunk.done}
    assert sorted(done) == sorted(names)
    assert all(len(done[name].tokens) == 3 for name in names)


def test_answers_with_many_forced_tokens_are_the_same_in_a_batch(engine):
    def run(*names):
        done = {}
        for name in names:
            engine.add(make(name, 0, 0, True), time.monotonic())
        while engine.queued or engine.active:
            done |= {chunk.id: chunk.completion.tokens for chunk in engine.step() if chunk.done}
        return [done[name] for name in names]

    alone = run("one")
    assert len(alone[0]) > PREFILL_CHUNK
    assert run("one", "two", "three") == 3 * alone


SMALL_CHUNK = 8


@pytest.fixture
def small_chunks(monkeypatch):
    """Make the prompts of these tests take many chunks."""
    monkeypatch.setattr("edgelm.engine.engine.PREFILL_CHUNK", SMALL_CHUNK)


def steps_until_started(engine, name, before_each=lambda step: None):
    """Count the steps until a request's first token."""
    for step in range(3000):
        before_each(step)
        if any(chunk.id == name and chunk.token is not None for chunk in engine.step()):
            return step + 1
    raise AssertionError(f"{name} never began")


@pytest.mark.parametrize("started", [1, 2, 5])
def test_a_short_prompt_does_not_wait_for_a_long_one(engine, small_chunks, started):
    clear(engine)
    engine.add(make("long", 400, 3, False), time.monotonic())
    for _ in range(started):
        engine.step()
    engine.add(make("short", SMALL_CHUNK, 3, False), time.monotonic())
    assert steps_until_started(engine, "short") <= 2


def test_a_long_prompt_gets_at_least_half_of_the_steps(engine, small_chunks):
    """Short prompts arrive without end."""
    clear(engine)
    engine.add(make("long", 400, 3, False), time.monotonic())

    def another(step):
        if engine.queued + engine.active < MAX_BATCH:
            engine.add(make(f"short {step}", SMALL_CHUNK, 1, False), time.monotonic())

    assert steps_until_started(engine, "long", another) <= 2 * (400 // SMALL_CHUNK) + 1


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(
        st.tuples(st.integers(0, 25), st.integers(1, 120), st.integers(1, 12), st.none() | st.integers(0, 40)),
        min_size=2,
        max_size=7,
    )
)
def test_interleaved_prompts_are_answered_as_alone(engine, small_chunks, plan):
    """Sequences change rows if a short prompt overtakes, and if a request ends."""

    def ask(wanted):
        clear(engine)
        done, step = {}, 0
        while step <= max(plan[i][0] for i in wanted) or engine.queued or engine.active:
            for i in wanted:
                start, length, most_tokens, cancel = plan[i]
                if start == step:
                    engine.add(make(str(i), length, most_tokens, False), time.monotonic())
                if cancel == step and len(wanted) > 1:
                    engine.cancel(str(i))
            done |= {int(chunk.id): chunk.completion for chunk in engine.step() if chunk.done}
            step += 1
        return done

    together = ask(range(len(plan)))
    for i, completion in together.items():
        if completion.finish_reason != "cancelled":
            assert completion.tokens == ask([i])[i].tokens
