"""The source of draft tokens, and how many are proposed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgelm.engine.speculation import (
    DRAFT_LENGTHS,
    HISTORY_TOKENS,
    MAX_OWNERS,
    MAX_PAUSE,
    NGRAM_SIZE,
    DraftState,
    Speculator,
)
from edgelm.types import UNCACHED_OWNER

tokens_lists = st.lists(st.integers(0, 2), max_size=40)


def after_last(tokens, gram):
    """Return what followed the latest earlier occurrence of `gram` in a list."""
    places = [at for at in range(len(tokens) - len(gram)) if tokens[at : at + len(gram)] == gram]
    return tokens[places[-1] + len(gram) :] if places else []


@given(tokens=tokens_lists, earlier=st.lists(tokens_lists, max_size=4), max_tokens=st.integers(-1, 9))
def test_a_draft_is_what_followed_the_latest_occurrence(tokens, earlier, max_tokens):
    speculator, draft_state = Speculator(), DraftState()
    draft_state.accept_rate = 1.0  # makes the maximum length the fastest
    for each in earlier:
        speculator.add_sequence(np.array(each, np.int32))
    found = speculator.propose(draft_state, np.array(tokens, np.int32), max_tokens).tolist()
    size = max([size for size in DRAFT_LENGTHS if size <= max_tokens], default=0)
    expected = after_last(tokens, tokens[-NGRAM_SIZE:]) if len(tokens) >= NGRAM_SIZE else []
    expected = (expected * size)[:size]  # a repetitive answer continues to repeat
    if not expected and len(tokens) >= NGRAM_SIZE:
        joined = [token for each in earlier for token in (-1, *each)]
        expected = after_last(joined, tokens[-NGRAM_SIZE:])[:size]
        expected = expected[: next((i for i, token in enumerate(expected) if token < 0), len(expected))]
    assert found == expected


@given(costs=st.lists(st.floats(1, 9), min_size=3, max_size=3), rate=st.floats(0.05, 0.95))
def test_the_draft_length_maximizes_tokens_per_second(costs, rate):
    speculator, draft_state = Speculator(), DraftState()
    times = {1: 1.0} | {size + 1: cost for size, cost in zip(sorted(DRAFT_LENGTHS), sorted(costs), strict=True)}
    speculator._pass_time_s = dict(times)
    draft_state.accept_rate = rate
    found = len(speculator.propose(draft_state, np.array([1, 2, 3] * 9, np.int32), 99))
    best = max((sum(rate**i for i in range(size + 1)) / times[size + 1], -size) for size in (0, *DRAFT_LENGTHS))
    assert found == -best[1]


def test_speculation_pauses_after_rejected_drafts():
    speculator, draft_state = Speculator(), DraftState()
    speculator._pass_time_s = {1: 1.0, 2: 1.2, 4: 2.0, 8: 3.0}
    tokens, tried = np.array([1, 2, 3] * 9, np.int32), []
    for _ in range(2000):
        guess = speculator.propose(draft_state, tokens, 99)
        tried.append(len(guess) > 0)
        if len(guess):
            speculator.record_pass(draft_state, len(guess) + 1, speculator._pass_time_s[len(guess) + 1], len(guess), 0)
    assert sum(tried) < 30
    assert any(tried[-2 * MAX_PAUSE :])


def test_only_the_oldest_history_is_removed():
    speculator = Speculator()
    for i in range(3 * HISTORY_TOKENS // 100):
        speculator.add_sequence(np.arange(100 * i, 100 * i + 100, dtype=np.int32))
        newest = 100 * i + 99
        assert is_known(speculator, newest)
        assert is_known(speculator, max(newest - HISTORY_TOKENS + 200, 50))
        assert len(speculator._earlier[None].tokens) <= 2 * HISTORY_TOKENS + 101
    assert not is_known(speculator, 50)


def is_known(speculator, token):
    gram = np.arange(token - NGRAM_SIZE, token, dtype=np.int32)
    return speculator.propose(DraftState(), gram, 1).tolist() == [token]


def test_the_initial_accept_rate_is_that_of_earlier_answers():
    speculator, history = Speculator(), np.array([1, 2, 3] * 9, np.int32)
    costs, begun = {1: 1.0, 2: 1.5, 4: 2.5, 8: 4.0}, []
    speculator._pass_time_s = dict(costs)
    for _ in range(1000):
        draft_state = DraftState()
        guessed = len(speculator.propose(draft_state, history, 99))
        speculator.record_pass(draft_state, guessed + 1, costs[guessed + 1], guessed, 0)
        begun.append(guessed > 0)
    assert begun[0]
    assert 0 < sum(begun[100:]) <= 90  # measured times decay, so speculation is tried again


def test_the_first_pass_of_a_size_does_not_count():
    speculator, draft_state = Speculator(), DraftState()
    history = np.array([1, 2, 3] * 9, np.int32)
    guessed = []
    for _ in range(3):
        for size in (0, *DRAFT_LENGTHS):
            speculator.record_pass(draft_state, size + 1, 50.0 if size else 1.0, 0, 0)
        guessed.append(len(speculator.propose(draft_state, history, 99)) > 0)
    assert guessed == [True, False, False]


def test_a_pass_that_was_slow_once_is_tried_again():
    speculator, draft_state = Speculator(), DraftState()
    speculator._pass_time_s = {1: 1.0} | {size + 1: 50.0 for size in DRAFT_LENGTHS}
    history = np.array([1, 2, 3] * 9, np.int32)
    assert not len(speculator.propose(draft_state, history, 99))
    for _ in range(3000):
        speculator.record_pass(draft_state, 1, 1.0, 0, 0)
    assert len(speculator.propose(draft_state, history, 99))


def test_owners_share_no_history():
    speculator, tokens = Speculator(), np.arange(10, dtype=np.int32)
    speculator.add_sequence(tokens, "a")
    speculator.add_sequence(np.arange(50, 60, dtype=np.int32), UNCACHED_OWNER)
    assert speculator.propose(DraftState(), tokens[:NGRAM_SIZE], 1, "a").tolist() == [NGRAM_SIZE]
    for other in (None, "b", UNCACHED_OWNER):
        assert speculator.propose(DraftState(), tokens[:NGRAM_SIZE], 1, other).tolist() == []
    uncached = np.arange(50, 50 + NGRAM_SIZE, dtype=np.int32)
    assert speculator.propose(DraftState(), uncached, 1, UNCACHED_OWNER).tolist() == []
    for i in range(2 * MAX_OWNERS):
        speculator.add_sequence(tokens, f"owner {i}")
    assert len(speculator._earlier) == MAX_OWNERS
