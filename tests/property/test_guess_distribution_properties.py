"""Sampled answers have the distribution of the model's own probabilities, guesses or not.

Counts of whole answers stand against exact probabilities, multiplied out along every answer that the sampling settings
allow. The significance is that of the likelihood ratio (the G-test's statistic) among counts drawn from these
probabilities: exact for rare answers too. What is random is seeded, so the verdict is always the same.
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
ASKED = 3000
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
    """Guesses whenever there is something to guess: a longer pass costs it nothing."""
    engine = Engine(opened, EngineOptions(threads=1, max_batch=1))
    monkeypatch.setattr(engine._speculator, "_pass_time_s", {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0})
    monkeypatch.setattr(engine._speculator, "_record_time", lambda tokens, seconds: None)
    entropy = np.random.default_rng(11)
    monkeypatch.setattr("edgelm.sampling.sampler.os.urandom", entropy.bytes)
    return engine


def probabilities(session, kind):
    """Every possible answer, and how probable it is."""
    found, open_ones = {}, {(): 1.0}
    while open_ones:
        answer, before = open_ones.popitem()
        if len(answer) == LENGTH:
            found[answer] = before
            continue
        logits = session.prefill(0, np.array(PROMPT + answer), 0)[0].astype(np.float64)
        likeliest = np.argsort(-logits, kind="stable")[: kind["top_k"]]
        shares = np.exp((logits[likeliest] - logits.max()) / kind["temperature"])
        above = np.cumsum(shares) - shares
        shares[above >= kind.get("top_p", 1.0) * shares.sum()] = 0
        for token, share in zip(likeliest.tolist(), shares / shares.sum(), strict=True):
            if share:
                open_ones[(*answer, token)] = before * share
    return found


def ask(engine, kind, monkeypatch):
    """How often each answer came, and of how many tokens guessed how many were right."""
    counts, guessed = Counter(), [0, 0]
    learn = engine._speculator.record_pass

    def noting(draft_state, tokens, seconds, size, right):
        guessed[0] += size
        guessed[1] += right
        learn(draft_state, tokens, seconds, size, right)

    monkeypatch.setattr(engine._speculator, "record_pass", noting)
    sampling = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **kind)
    for _ in range(ASKED):
        engine.add(Request("one", sampling, tokens=PROMPT), time.monotonic())
        while engine.queued or engine.active:
            for chunk in engine.step():
                if chunk.done:
                    counts[chunk.completion.tokens] += 1
    return counts, *guessed


def significance(counts, expected):
    """The share of counts drawn from the expected probabilities that are at least as far from them."""
    if counts.keys() - expected.keys():
        return 0.0  # what cannot be
    shares = np.array(list(expected.values()))
    drawn = np.random.default_rng(12).multinomial(counts.total(), shares / shares.sum(), 9999)
    found = np.array([counts[answer] for answer in expected])
    mean = counts.total() * shares
    far = [(each * np.log(np.maximum(each, 1) / mean)).sum(axis=-1) for each in (found, drawn)]
    return (1 + (far[1] >= far[0]).sum()) / (1 + len(drawn))


@KINDS
def test_guesses_keep_the_distribution(engine, kind, monkeypatch):
    expected = probabilities(engine.runner, kind)
    counts, guessed, right = ask(engine, kind, monkeypatch)
    assert len(expected) > 50
    assert counts.total() == ASKED
    assert min(right, guessed - right) > ASKED / 10  # true and false ones
    assert significance(counts, expected) > SIGNIFICANCE


def accept(sample, wanted):
    """Take every guess."""
    return sample() if wanted is None else wanted


def draw_again(sample, wanted):
    """Give a guess that did not come true another chance, as who draws from the whole distribution after a refusal."""
    token = sample()
    return token if wanted in (None, token) else sample()


@KINDS
@pytest.mark.parametrize("biased", [accept, draw_again])
def test_biased_acceptance_is_found(engine, kind, biased, monkeypatch):
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
