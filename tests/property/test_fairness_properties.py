"""Requests come first, begin first; no answer waits longer than a chunk, and every request ends."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.bundle import open_bundle
from edgelm.drafts import SIZES
from edgelm.engine import Engine
from edgelm.errors import RequestError
from edgelm.memory import PREFILL_CHUNK
from edgelm.messages import Constraint, Request, SamplingParams

MAX_BATCH = 3
FORCED = Constraint("regex", "(yes|no)" + ", the dog" * 90 + " (home|away)")
"""Several hundred tokens without a choice, once the first is chosen."""


@pytest.fixture(scope="module")
def engine(float32_bundle):
    """Counts the tokens of every pass that is not one of decoding a batch."""
    engine = Engine(open_bundle(float32_bundle), threads=1, max_batch=MAX_BATCH, prefix_cache_mb=0)
    prefill, engine.passes = engine.session.prefill, []

    def counting(row, tokens, *more, **options):
        engine.passes.append(len(tokens))
        return prefill(row, tokens, *more, **options)

    engine.session.prefill = counting
    return engine


arrivals = st.lists(
    st.tuples(
        st.integers(0, 30),  # the step before which it comes
        st.sampled_from([1, 2, 9, 60, PREFILL_CHUNK, PREFILL_CHUNK + 1, 400]),
        st.integers(1, 20),
        st.booleans(),  # whether it is forced to say much
        st.none() | st.none() | st.integers(0, 40),  # the step before which it is cancelled
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
    """End what an example before left over."""
    engine.fail_all(RequestError("internal", "left over"))


@settings(max_examples=30)
@given(plan=arrivals)
def test_a_step_computes_a_chunk_at_most_and_the_first_come_is_the_first_served(plan, engine):
    clear(engine)
    came, begun, ended, step = [], [], [], 0
    while step <= max(entry[0] for entry in plan) or engine.queued or engine.active:
        for i, (start, length, most_tokens, is_forced, cancel) in enumerate(plan):
            if start == step:
                engine.add(make(str(i), length, most_tokens, is_forced), time.monotonic())
                came.append(str(i))
            if cancel == step:
                engine.cancel(str(i))
        engine.passes.clear()
        for chunk in engine.step():
            if chunk.token is not None and chunk.id not in begun:
                begun.append(chunk.id)
            if chunk.done:
                ended.append(chunk.id)
        assert sum(engine.passes) <= PREFILL_CHUNK + 1 + SIZES[0]  # guesses are a lone answer's own
        assert engine.active <= MAX_BATCH
        step += 1
        assert step < 3000
    assert sorted(ended) == sorted(came)
    assert begun == [name for name in came if name in begun]


@settings(max_examples=20)
@given(
    length=st.integers(1, 60),
    most_tokens=st.integers(2, 40),
    others=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 8), st.booleans()), min_size=1, max_size=5),
)
def test_an_answer_gets_a_token_each_step_whoever_else_comes(length, most_tokens, others, engine):
    """The others never cease to come."""
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
    assert min(got[:-1], default=1) >= 1  # the prompt is one chunk: from the first step on


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


def test_answers_that_are_forced_to_say_much_go_on_in_company_as_alone(engine):
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
