"""Sampled answers have the distribution of the model's probabilities, with draft tokens too.

Counts of whole answers are compared with exact probabilities, the product along every answer that the sampling
parameters allow. The significance is that of the likelihood ratio (the statistic of the G-test) among counts drawn from
these probabilities, which is exact for rare answers too. All randomness is seeded, so the result is always the same.
"""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import EngineOptions
from edgelm.sampling import Sampler
from edgelm.types import Request, SamplingParams

PROMPT = (5, 6, 7)
LENGTH = 5
ANSWERS = 3000
SIGNIFICANCE = 0.001
SETTINGS = [
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 0.7, "top_k": 4, "top_p": 0.9},
]
KINDS = pytest.mark.parametrize("kind", SETTINGS, ids=["top_k", "top_k-top_p"])


@pytest.fixture(scope="module")
def opened(float32_bundle):
    return open_bundle(float32_bundle)


@pytest.fixture
def engine(opened, monkeypatch):
    """An engine that always proposes draft tokens if it can: longer passes are set to cost nothing."""
    engine = Engine(opened, EngineOptions(threads=1, max_batch=1))
    monkeypatch.setattr(engine._speculator, "_pass_time_s", {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0})
    monkeypatch.setattr(engine._speculator, "_record_time", lambda tokens, seconds: None)
    entropy = np.random.default_rng(11)
    monkeypatch.setattr("edgelm.sampling.sampler.os.urandom", entropy.bytes)
    return engine


def probabilities(runner, kind):
    """Return the probability of every possible answer."""
    found, open_ones = {}, {(): 1.0}
    while open_ones:
        answer, before = open_ones.popitem()
        if len(answer) == LENGTH:
            found[answer] = before
            continue
        logits = runner.prefill(0, np.array(PROMPT + answer), 0)[0].astype(np.float64)
        likeliest = np.argsort(-logits, kind="stable")[: kind["top_k"]]
        shares = np.exp((logits[likeliest] - logits.max()) / kind["temperature"])
        above = np.cumsum(shares) - shares
        shares[above >= kind.get("top_p", 1.0) * shares.sum()] = 0
        for token, share in zip(likeliest.tolist(), shares / shares.sum(), strict=True):
            if share:
                open_ones[(*answer, token)] = before * share
    return found


def ask(engine, kind, monkeypatch):
    """Return the counts of answers, of draft tokens and of accepted draft tokens."""
    counts, guessed = Counter(), [0, 0]
    record_pass = engine._speculator.record_pass

    def counted(draft_state, tokens, seconds, size, right):
        guessed[0] += size
        guessed[1] += right
        record_pass(draft_state, tokens, seconds, size, right)

    monkeypatch.setattr(engine._speculator, "record_pass", counted)
    sampling = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **kind)
    for _ in range(ANSWERS):
        engine.add(Request("one", sampling, tokens=PROMPT), time.monotonic())
        while engine.queued or engine.active:
            for chunk in engine.step():
                if chunk.done:
                    counts[chunk.completion.tokens] += 1
    return counts, *guessed


def significance(counts, expected):
    """Return the share of counts drawn from the expected probabilities that are at least as far from them."""
    if counts.keys() - expected.keys():
        return 0.0  # an impossible answer
    shares = np.array(list(expected.values()))
    drawn = np.random.default_rng(12).multinomial(counts.total(), shares / shares.sum(), 9999)
    found = np.array([counts[answer] for answer in expected])
    mean = counts.total() * shares
    far = [(each * np.log(np.maximum(each, 1) / mean)).sum(axis=-1) for each in (found, drawn)]
    return (1 + (far[1] >= far[0]).sum()) / (1 + len(drawn))


@KINDS
def test_draft_tokens_keep_the_distribution(engine, kind, monkeypatch):
    expected = probabilities(engine.runner, kind)
    counts, guessed, right = ask(engine, kind, monkeypatch)
    assert len(expected) > 50
    assert counts.total() == ANSWERS
    assert min(right, guessed - right) > ANSWERS / 10  # both accepted and rejected ones
    assert significance(counts, expected) > SIGNIFICANCE


def accept(sample, wanted):
    """Accept every draft token."""
    return sample() if wanted is None else wanted


def draw_again(sample, wanted):
    """Sample again if the draft token is rejected, which is wrong: the rejected token may be drawn again."""
    token = sample()
    return token if wanted in (None, token) else sample()


@KINDS
@pytest.mark.parametrize("biased", [accept, draw_again])
def test_biased_acceptance_is_detected(engine, kind, biased, monkeypatch):
    expected = probabilities(engine.runner, kind)
    wanted = {}
    propose, sample = engine._speculator.propose, Sampler.sample

    def noted(draft_state, tokens, most, owner):
        guess = propose(draft_state, tokens, most, owner)
        wanted.clear()
        wanted.update(enumerate(guess.tolist(), len(tokens)))
        return guess

    def biased_sample(self, logits, mask, history):
        return biased(lambda: sample(self, logits, mask, history), wanted.pop(len(history), None))

    monkeypatch.setattr(engine._speculator, "propose", noted)
    monkeypatch.setattr(Sampler, "sample", biased_sample)
    counts, *_ = ask(engine, kind, monkeypatch)
    assert significance(counts, expected) <= SIGNIFICANCE
