"""Requests that join and leave a batch at any step get the same answers as alone."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import EngineOptions
from edgelm.runtime.memory_plan import PREFILL_CHUNK
from edgelm.runtime.runner import open_runner
from edgelm.types import Request, SamplingParams

MAX_BATCH = 3
LONGEST = 16
LENGTHS = [1, 2, 3, 5, 8, 17, 40, 63, 64, 65, 120, PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 300]
GAPS = {"fp32": 0.02}
"""Minimum difference of the two largest log-probabilities; below it, rounding in another batch size could decide."""
QUANTIZED_GAP = 0.1


@dataclass(frozen=True)
class Known:
    """A prompt with its answer of up to `longest` tokens, computed alone."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    reason: str
    longest: int


@pytest.fixture(scope="module")
def opened(bundle):
    return open_bundle(bundle)


@pytest.fixture(scope="module", params=[0, 1], ids=["no prefix cache", "small prefix cache"])
def engine(opened, request):
    """Without a prefix cache, and with one that is too small for all sequences."""
    return Engine(opened, EngineOptions(threads=1, max_batch=MAX_BATCH, prefix_cache_mb=request.param))


@pytest.fixture(scope="module")
def known(opened):
    """Prompts of many lengths, whose greedy answers do not depend on rounding."""
    alone = Engine(opened, EngineOptions(threads=1, max_batch=1))
    generator = np.random.default_rng(3)
    least = GAPS.get(opened.manifest.quant, QUANTIZED_GAP)
    found = []
    for length in LENGTHS * 6:
        if length + 8 > alone.context:
            continue
        prompt = tuple(generator.integers(2, min(300, opened.manifest.vocab_size), length).tolist())
        request = Request("alone", SamplingParams(max_tokens=LONGEST, logprobs=2), tokens=prompt)
        completion = run_alone(alone, request)
        gaps = [entry.top[0][1] - entry.top[1][1] for entry in completion.logprobs]
        clear = next((i for i, gap in enumerate(gaps) if gap <= least), LONGEST)
        if clear == LONGEST:
            found.append(Known(prompt, completion.tokens, completion.finish_reason, LONGEST))
        elif clear >= 4:
            found.append(Known(prompt, completion.tokens[:clear], "length", clear))
    assert len(found) >= 8
    assert any(entry.longest == LONGEST for entry in found)
    assert any(len(entry.prompt) > PREFILL_CHUNK for entry in found) or alone.context <= PREFILL_CHUNK
    return found


def run_alone(engine, request):
    engine.add(request, time.monotonic())
    while True:
        for chunk in engine.step():
            if chunk.done:
                assert engine.active == engine.queued == 0
                return chunk.completion


@dataclass
class Planned:
    """A request that arrives before step `start` and is cancelled before step `cancel`."""

    which: int
    max_tokens: int
    start: int
    cancel: int | None
    late: bool


plans = st.lists(
    st.builds(
        Planned,
        which=st.integers(0, 999),
        max_tokens=st.integers(1, LONGEST),
        start=st.integers(0, 25),
        cancel=st.none() | st.none() | st.integers(0, 40),
        late=st.sampled_from([False] * 9 + [True]),
    ),
    min_size=1,
    max_size=9,
)


def check_rows(engine):
    running, prefilling = (
        [sequence.row for sequence in kind] for kind in (engine._scheduler.running, engine._scheduler.prefilling)
    )
    assert running == list(range(len(running)))
    assert sorted(prefilling) == list(range(len(running), len(running) + len(prefilling)))
    assert engine.active <= MAX_BATCH


@settings(max_examples=50)
@given(plan=plans)
def test_a_batch_answers_as_each_alone(plan, engine, known):
    chosen = {str(i): known[planned.which % len(known)] for i, planned in enumerate(plan)}
    chunks = {name: [] for name in chosen}
    step = 0
    while step <= max(planned.start for planned in plan) or engine.queued or engine.active:
        for i, planned in enumerate(plan):
            if planned.start == step:
                sampling = SamplingParams(max_tokens=min(planned.max_tokens, chosen[str(i)].longest))
                deadline = time.monotonic() if planned.late else None
                request = Request(str(i), sampling, tokens=chosen[str(i)].prompt, deadline=deadline)
                engine.add(request, time.monotonic())
            if planned.cancel == step:
                engine.cancel(str(i))
        for chunk in engine.step():
            chunks[chunk.id].append(chunk)
        check_rows(engine)
        step += 1
        assert step < 1000
    for i, planned in enumerate(plan):
        expected, given_out = chosen[str(i)], chunks[str(i)]
        check_answer(planned, expected, given_out)


def check_answer(planned, expected, chunks):
    assert [chunk.seq for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    done = chunks[-1].completion
    assert "".join(chunk.delta for chunk in chunks) == done.text
    assert tuple(chunk.token for chunk in chunks[:-1]) == done.tokens
    assert done.usage.completion_tokens == len(done.tokens)
    if planned.late:
        ended = "cancelled" if planned.cancel == planned.start else "deadline"
        assert (done.finish_reason, done.tokens) == (ended, ())
        return
    assert done.tokens == expected.answer[: len(done.tokens)]
    if done.finish_reason == "cancelled":
        assert planned.cancel is not None
        return
    asked = min(planned.max_tokens, expected.longest)
    assert len(done.tokens) == min(asked, len(expected.answer))
    assert done.finish_reason == ("length" if asked <= len(expected.answer) else expected.reason)


@settings(max_examples=15)
@given(which=st.lists(st.integers(0, 999), min_size=1, max_size=5), seed=st.integers(0, 2**63 - 1))
def test_a_seed_gives_the_same_answer_in_any_batch(which, seed, engine, known, float32_bundle):
    sampling = SamplingParams(max_tokens=6, temperature=0.7, top_k=5, seed=seed)
    prompts = [known[i % len(known)].prompt for i in which]
    alone = [run_alone(engine, Request("one", sampling, tokens=prompt)).tokens for prompt in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), sampling, tokens=prompt), time.monotonic())
    together = {}
    while engine.queued or engine.active:
        together |= {chunk.id: chunk.completion.tokens for chunk in engine.step() if chunk.done}
    assert [together[str(i)] for i in range(len(prompts))] == alone


@settings(max_examples=20)
@given(cuts=st.lists(st.tuples(st.integers(0, 999), st.integers(1, 300)), min_size=2, max_size=8), whole=st.booleans())
def test_a_shared_prefix_is_not_computed_again(cuts, whole, opened, known):
    engine = Engine(opened, EngineOptions(threads=1, max_batch=MAX_BATCH, speculation=False))
    prefill = engine.runner.prefill
    computed, earlier = [], []

    def counting(row, tokens, *given_too, **more):
        computed.append(len(tokens))
        return prefill(row, tokens, *given_too, **more)

    engine.runner.prefill = counting
    for which, cut in cuts:
        entry = known[which % len(known)]
        tokens = entry.prompt if whole else entry.prompt[: 1 + cut % len(entry.prompt)]
        computed.clear()
        done = run_alone(engine, Request("one", SamplingParams(max_tokens=4), tokens=tokens))
        shared = max((common(tokens[:-1], other) for other in earlier), default=0)
        assert done.usage.cached_tokens == shared
        assert sum(computed) == len(tokens) - shared
        if whole:
            assert done.tokens == entry.answer[: len(done.tokens)]
        earlier.append(tokens + (done.tokens if done.finish_reason == "stop" else done.tokens[:-1]))


def common(one, other):
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_a_prompt_that_continues_an_answer_reuses_it(opened):
    engine = Engine(opened, EngineOptions(threads=1, max_batch=1))
    tokens, known_tokens = tuple(range(5, 25)), 0
    for turn in range(4):
        done = run_alone(engine, Request(str(turn), SamplingParams(max_tokens=5, ignore_eos=True), tokens=tokens))
        assert done.usage.cached_tokens == known_tokens
        known_tokens = len(tokens) + len(done.tokens) - 1  # the last token was never computed
        tokens = (*tokens, *done.tokens, *range(30 + turn, 40 + turn))


@settings(max_examples=20)
@given(length=st.integers(1, 40), cuts=st.lists(st.integers(1, 40), max_size=5))
def test_write_row_restores_what_read_row_returned(length, cuts, opened):
    session = open_runner(opened, rows=2, threads=1)
    tokens, following = np.arange(5, 5 + length), np.array([3])
    session.prefill(0, tokens, 0)
    ends = sorted({*(cut for cut in cuts if cut < length), length})
    session.write_row(1, [session.read_row(0, start, end) for start, end in zip([0, *ends], ends, strict=False)])
    expected = session.prefill(0, following, length).copy()
    assert np.array_equal(session.prefill(1, following, length), expected)


def test_requests_that_arrive_together_share_a_prefix(opened):
    engine = Engine(opened, EngineOptions(threads=1, max_batch=MAX_BATCH))
    for i in range(MAX_BATCH):
        engine.add(Request(str(i), SamplingParams(max_tokens=4), tokens=(*range(5, 65), 70 + i)), time.monotonic())
    done = {}
    while engine.queued or engine.active:
        done |= {chunk.id: chunk.completion for chunk in engine.step() if chunk.done}
    assert [done[str(i)].usage.cached_tokens for i in range(MAX_BATCH)] == [0, 60, 60]


@settings(max_examples=10)
@given(which=st.integers(0, 999), length=st.integers(2, 200))
def test_scoring_does_not_change_running_requests(which, length, engine, known):
    entry = known[which % len(known)]
    engine.add(Request("one", SamplingParams(max_tokens=entry.longest), tokens=entry.prompt), time.monotonic())
    scores, chunks = [], []
    tokens = list(range(2, length + 2))
    while engine.queued or engine.active:
        chunks += engine.step()
        scores.append(engine.score(tokens))
    assert chunks[-1].completion.tokens == entry.answer
    assert all(np.array_equal(score, scores[0]) for score in scores)
    assert len(scores[0]) == length - 1
