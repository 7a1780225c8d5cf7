"""With our kernels an answer does not depend on earlier requests, to the last bit of its logits.

A token's result does not depend on what is computed in the same pass.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.engine import engine as engines
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import EngineOptions
from edgelm.engine.sequence import Sequence
from edgelm.runtime import prepack
from edgelm.runtime.prepack import open_verified
from edgelm.system.board_cache import BoardCache
from edgelm.types import Constraint, Request, SamplingParams

KINDS = ["int4", "int5", "int8"]
SHARED = [int(token) for token in np.random.default_rng(0).integers(2, 300, 120)]
"""Prompts begin with a prefix of it."""


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tiny_checkpoint, export_to_cache, tmp_path_factory):
    """An engine with prefix cache and speculation, and one without."""
    path = export_to_cache(tiny_checkpoint(hidden=128, mlp=352, tied=False), quant=request.param)
    cache = BoardCache(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepack, "MIN_CACHED_BYTES", 0)
        bundle = open_verified(path, cache)
        warm = Engine(bundle, EngineOptions(threads=2, max_batch=3, board_cache=cache))
        cold = Engine(
            bundle, EngineOptions(threads=1, max_batch=1, prefix_cache_mb=0, speculation=False, board_cache=cache)
        )
        assert warm.runner.is_invariant
        yield warm, cold


def run(engine, *requests):
    """Return the completion of the first request, and the logits of each of its tokens."""
    seen = []
    advance = Sequence.advance

    def watched(sequence, logits):
        if sequence.id == requests[0].id:
            seen.append(logits.copy())
        return advance(sequence, logits)

    done = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sequence, "advance", watched)
        for request in requests:
            engine.add(request, time.monotonic())
        while engine.queued or engine.active:
            done |= {chunk.id: chunk.completion for chunk in engine.step() if chunk.done}
    return done[requests[0].id], np.array(seen)


prompts = st.builds(
    lambda shared, own: (*SHARED[:shared], *own), st.integers(0, 120), st.lists(st.integers(2, 300), max_size=20)
).filter(bool)
constraints = st.none() | st.just(Constraint("regex", "(yes|no), the dog ran and the dog sat (home|away) and [a-z]{4}"))


@st.composite
def requests(draw, name):
    sampling = SamplingParams(
        max_tokens=draw(st.integers(1, 24)),
        ignore_eos=True,
        **draw(st.sampled_from([{}, {}, {"temperature": 0.9, "seed": 7}])),
    )
    return Request(name, sampling, tokens=draw(prompts), constraint=draw(constraints))


@settings(max_examples=60)
@given(
    asked=requests("asked"),
    before=st.lists(st.tuples(requests("one"), requests("other"), st.booleans()), max_size=3),
    chunk=st.sampled_from([16, 40, 256]),
    guesses=st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, 6)), min_size=1, max_size=9),
)
def test_an_answer_does_not_depend_on_earlier_requests(pair, asked, before, chunk, guesses):
    warm, cold = pair
    expected, logits = run(cold, asked)
    history = [*asked.tokens, *expected.tokens]
    turn = iter(guesses * 99)

    def propose(draft_state, tokens, most, owner=None):
        """Draft tokens that are right up to a position."""
        size, wrong = next(turn)
        guess = np.array([*history[len(tokens) :], *range(9)][: min(size, most)], np.int32)
        if wrong is not None and wrong < len(guess):
            guess[wrong] = (guess[wrong] + 1) % 300
        return guess

    for one, other, together in before:
        run(warm, *([one, other] if together else [one]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "PREFILL_CHUNK", chunk)
        for _ in range(2):
            patch.setattr(warm._speculator, "propose", propose)
            found, own = run(warm, asked)
            assert found.tokens == expected.tokens
            assert np.array_equal(own, logits)


def test_the_prefix_cache_is_used(pair):
    """Otherwise the test above would show nothing."""
    warm, _ = pair
    request = Request("one", SamplingParams(max_tokens=9, ignore_eos=True), tokens=tuple(range(2, 52)))
    for _ in range(2):
        done, _ = run(warm, request)
    assert done.usage.cached_tokens == 49
    following = Request("two", request.sampling, tokens=(*request.tokens, *done.tokens, 5))
    cached = run(warm, following)[0].usage.cached_tokens
    assert cached == 58
