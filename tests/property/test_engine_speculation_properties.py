"""Draft tokens and forced tokens save passes, and change no answer."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import EngineOptions
from edgelm.errors import RequestError
from edgelm.runtime.memory_plan import PREFILL_CHUNK
from edgelm.text.constraint_compiler import Matcher
from edgelm.types import Constraint, Request, SamplingParams


@pytest.fixture(scope="module")
def opened(float32_bundle):
    return open_bundle(float32_bundle)


@pytest.fixture(scope="module")
def engines(opened):
    """Without speculation and with it."""
    return [Engine(opened, EngineOptions(threads=1, max_batch=3, speculation=guesses)) for guesses in (False, True)]


def run(engine, *requests):
    """Return the chunks of each of several simultaneous requests."""
    chunks = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request, time.monotonic())
    while engine.queued or engine.active:
        for chunk in engine.step():
            chunks[chunk.id].append(chunk)
    for request in requests:
        done = chunks[request.id][-1].completion
        assert "".join(chunk.delta for chunk in chunks[request.id]) == done.text
        assert tuple(chunk.token for chunk in chunks[request.id][:-1]) == done.tokens
        assert [chunk.seq for chunk in chunks[request.id]] == list(range(len(chunks[request.id])))
    return [chunks[request.id][-1].completion for request in requests]


def passes(engine, monkeypatch):
    """Return a list that gets the number of tokens of every pass."""
    sizes = []
    prefill, decode = engine.runner.prefill, engine.runner.decode

    def counted(call, count):
        def run_it(*args, **options):
            sizes.append(count(*args))
            return call(*args, **options)

        return run_it

    monkeypatch.setattr(engine.runner, "prefill", counted(prefill, lambda row, tokens, *_: len(tokens)))
    monkeypatch.setattr(engine.runner, "decode", counted(decode, lambda tokens, *_: 1))
    return sizes


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    length=st.integers(1, 40),
    most_tokens=st.integers(1, 24),
    guesses=st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, 6)), min_size=1, max_size=24),
)
def test_draft_tokens_do_not_change_an_answer(engines, seed, temperature, length, most_tokens, guesses):
    """The draft tokens are right up to any position."""
    generator = np.random.default_rng(seed)
    prompt = tuple(generator.integers(2, 300, length).tolist())
    sampling = SamplingParams(max_tokens=most_tokens, temperature=temperature, top_p=0.9, logprobs=1)
    request = Request("one", sampling, tokens=prompt)
    plain, guessing = engines
    entropy = generator.bytes(16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgelm.sampling.sampler.os.urandom", lambda size: entropy[:size])
        expected = run(plain, request)[0]
    asked = iter(guesses * most_tokens)

    def propose(draft_state, tokens, most, owner=None):
        size, wrong = next(asked)
        answer = [*expected.tokens, *range(9)][len(tokens) - length :]
        guess = np.array(answer[: min(size, most)], np.int32)
        if wrong is not None and wrong < len(guess):
            guess[wrong] = (guess[wrong] + 1) % 300
        return guess

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgelm.sampling.sampler.os.urandom", lambda size: entropy[:size])
        patch.setattr(guessing._speculator, "propose", propose)
        found = run(guessing, request)[0]
    assert (found.tokens, found.text, found.finish_reason) == (expected.tokens, expected.text, expected.finish_reason)
    worth = [[entry.logprob for entry in each.logprobs] for each in (found, expected)]
    np.testing.assert_allclose(*worth, atol=1e-4)


def test_accepted_draft_tokens_save_passes(engines, monkeypatch):
    plain, guessing = engines
    request = Request("one", SamplingParams(max_tokens=24, ignore_eos=True), tokens=(5, 6, 7))
    expected = run(plain, request)[0]
    following = np.array(expected.tokens, np.int32)
    monkeypatch.setattr(
        guessing._speculator,
        "propose",
        lambda draft_state, tokens, most, owner: following[len(tokens) - 3 :][: min(7, most)],
    )
    sizes = passes(guessing, monkeypatch)
    assert run(guessing, request)[0].tokens == expected.tokens
    assert sizes[-3:] == [8, 8, 7]  # 23 tokens after the first take three passes


def test_a_seeded_answer_uses_no_draft_tokens(engines, monkeypatch):
    """Passes of other lengths round differently, so a quantized model could choose another token."""
    _, guessing = engines
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)
    sizes = passes(guessing, monkeypatch)
    monkeypatch.setattr(guessing._speculator, "propose", lambda draft_state, tokens, most, owner: tokens[:3])
    for _ in range(2):
        sizes.clear()
        done = run(guessing, Request("one", sampling, tokens=tuple([5, 6, 7] * 9)))[0]
        assert (sizes, done.usage.cached_tokens) == ([27, *[1] * 11], 0)


def test_a_repetitive_answer_takes_fewer_passes(engines, monkeypatch):
    _, guessing = engines
    request = Request("one", SamplingParams(max_tokens=100, ignore_eos=True), tokens=tuple([9, 8, 7, 6, 5] * 20))
    monkeypatch.setattr(guessing.runner, "prefill", repeating(guessing.runner.prefill, [9, 8, 7, 6, 5]))
    monkeypatch.setattr(guessing.runner, "decode", repeating(guessing.runner.decode, [9, 8, 7, 6, 5]))
    measured_alike(guessing, monkeypatch)
    sizes = passes(guessing, monkeypatch)
    done = run(guessing, request)[0]
    assert done.tokens == tuple([9, 8, 7, 6, 5] * 20)
    assert len(sizes) < 60


def measured_alike(engine, monkeypatch):
    """Replace the measured pass times, which depend on the load of the machine."""
    monkeypatch.setattr(engine._speculator, "_pass_time_s", {1: 1.0, 2: 1.1, 4: 1.3, 8: 1.6})
    monkeypatch.setattr(engine._speculator, "_record_time", lambda tokens, seconds: None)


def repeating(call, cycle):
    """Return the call with logits in which each token is followed by the next one of a cycle."""

    def run_it(*args, **options):
        tokens = args[0] if len(args) == 2 else args[1]
        logits = call(*args, **options).copy()
        for row, token in zip(logits, tokens[-len(logits) :], strict=True):
            row[cycle[(cycle.index(token) + 1) % len(cycle)]] = 1e6
        return logits

    return run_it


def test_draft_tokens_come_from_an_earlier_answer(opened, monkeypatch):
    engine = Engine(opened, EngineOptions(threads=1, max_batch=1, prefix_cache_mb=0))
    request = Request("one", SamplingParams(max_tokens=24, ignore_eos=True), tokens=(5, 6, 7))
    measured_alike(engine, monkeypatch)
    sizes = passes(engine, monkeypatch)
    expected = run(engine, request)[0]
    first = len(sizes)
    assert run(engine, request)[0].tokens == expected.tokens
    assert len(sizes) - first < first


# --- forced tokens ---


def test_many_forced_tokens_are_computed_in_chunks(engines, monkeypatch):
    _, engine = engines
    sizes = passes(engine, monkeypatch)
    constraint = Constraint("regex", "(yes|no)" + ", the dog" * 90 + " (home|away)")
    done = run(engine, Request("one", SamplingParams(max_tokens=400), prompt="x", constraint=constraint))[0]
    assert done.usage.forced_tokens > PREFILL_CHUNK
    assert max(sizes, default=0) <= PREFILL_CHUNK


def test_with_logprobs_every_token_is_sampled(engines):
    constraint = Constraint("regex", "the dog ran (home|away)")
    done = run(engines[1], Request("one", SamplingParams(logprobs=1), prompt="x", constraint=constraint))[0]
    assert done.usage.forced_tokens == 0
    assert [entry.token for entry in done.logprobs] == list(done.tokens)


def test_a_failing_constraint_keeps_the_tokens_before(engines, monkeypatch):
    accept, left = Matcher.accept, [3]

    def failing(matcher, token):
        left[0] -= 1
        if left[0] < 0:
            raise RequestError("bad_request", "too complex")
        accept(matcher, token)

    monkeypatch.setattr(Matcher, "accept", failing)
    constraint = Constraint("regex", "the dog ran home (and|or) away")
    done = run(engines[1], Request("one", SamplingParams(), prompt="x", constraint=constraint))[0]
    assert (done.finish_reason, done.error.message) == ("error", "too complex")
    assert 0 < len(done.text) < len("the dog ran home")


def test_forced_tokens_take_no_separate_pass(engines, monkeypatch):
    _, engine = engines
    constraint = Constraint("regex", r'\{"playful": "(park|kitchen)"\}')
    sizes = passes(engine, monkeypatch)
    request = Request("one", SamplingParams(max_tokens=80), prompt="Turn off", constraint=constraint)
    done = run(engine, request)[0]
    assert done.json in ({"playful": "park"}, {"playful": "kitchen"})
    assert 0 < done.usage.forced_tokens < done.usage.completion_tokens
    assert len(sizes) <= done.usage.completion_tokens - done.usage.forced_tokens + 1


def test_an_answer_of_forced_tokens_takes_no_pass(engines, monkeypatch):
    _, engine = engines
    sizes = passes(engine, monkeypatch)
    constraint = Constraint("choices", ("the dog ran",))
    done = run(engine, Request("one", SamplingParams(), prompt="x", constraint=constraint))[0]
    assert (done.text, done.finish_reason, sizes) == ("the dog ran", "stop", [])
    assert done.usage.forced_tokens == done.usage.completion_tokens > 0


@settings(max_examples=20)
@given(limit=st.integers(1, 12), stop=st.none() | st.sampled_from(["dog", "ran", "g r"]), company=st.integers(1, 3))
def test_limits_and_stops_hold_within_forced_tokens(engines, limit, stop, company):
    _, engine = engines
    sampling = SamplingParams(max_tokens=limit, stop=() if stop is None else (stop,))
    constraint = Constraint("regex", "the dog ran (home|away) and the dog ran (home|away)")
    requests = [Request(str(i), sampling, prompt="x", constraint=constraint) for i in range(company)]
    for done in run(engine, *requests):
        assert done.usage.completion_tokens <= limit
        assert stop is None or stop not in done.text
        whole = [f"the dog ran {a} and the dog ran {b}" for a in ("home", "away") for b in ("home", "away")]
        assert any(each.startswith(done.text) for each in whole)
        if done.finish_reason == "length":
            assert done.usage.completion_tokens == limit


def test_answers_with_forced_tokens_are_the_same_in_a_batch(engines):
    _, engine = engines
    patterns = [
        "the dog (ran|sat) on the (mat|park)",
        "(yes|no), the girl played with (her|the) dog",
        "[0-9]{3} lights",
    ]
    requests = [
        Request(str(i), SamplingParams(max_tokens=40), prompt="Once upon", constraint=Constraint("regex", pattern))
        for i, pattern in enumerate(patterns)
    ]
    alone = [run(engine, request)[0] for request in requests]
    together = run(engine, *requests)
    assert [done.tokens for done in together] == [done.tokens for done in alone]
    assert all(done.usage.forced_tokens for done in alone)
