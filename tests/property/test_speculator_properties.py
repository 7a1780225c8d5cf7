"""Where guesses come from, and how many of them pay."""

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
    """What followed the latest earlier occurrence of `gram` in a list."""
    places = [at for at in range(len(tokens) - len(gram)) if tokens[at : at + len(gram)] == gram]
    return tokens[places[-1] + len(gram) :] if places else []


@given(tokens=tokens_lists, earlier=st.lists(tokens_lists, max_size=4), most=st.integers(-1, 9))
def test_a_guess_is_what_followed_the_last_time(tokens, earlier, most):
    drafter, draft_state = Speculator(), DraftState()
    draft_state.accept_rate = 1.0  # the most that is allowed pays
    for each in earlier:
        drafter.add_sequence(np.array(each, np.int32))
    found = drafter.propose(draft_state, np.array(tokens, np.int32), most).tolist()
    size = max([size for size in DRAFT_LENGTHS if size <= most], default=0)
    expected = after_last(tokens, tokens[-NGRAM_SIZE:]) if len(tokens) >= NGRAM_SIZE else []
    expected = (expected * size)[:size]  # an answer that repeats itself goes on to
    if not expected and len(tokens) >= NGRAM_SIZE:
        joined = [token for each in earlier for token in (-1, *each)]
        expected = after_last(joined, tokens[-NGRAM_SIZE:])[:size]
        expected = expected[: next((i for i, token in enumerate(expected) if token < 0), len(expected))]
    assert found == expected


@given(costs=st.lists(st.floats(1, 9), min_size=3, max_size=3), rate=st.floats(0.05, 0.95))
def test_as_much_is_guessed_as_pays(costs, rate):
    drafter, draft_state = Speculator(), DraftState()
    times = {1: 1.0} | {size + 1: cost for size, cost in zip(sorted(DRAFT_LENGTHS), sorted(costs), strict=True)}
    drafter._pass_time_s = dict(times)
    draft_state.accept_rate = rate
    found = len(drafter.propose(draft_state, np.array([1, 2, 3] * 9, np.int32), 99))
    best = max((sum(rate**i for i in range(size + 1)) / times[size + 1], -size) for size in (0, *DRAFT_LENGTHS))
    assert found == -best[1]


def test_wrong_guesses_cost_less_and_less():
    drafter, draft_state = Speculator(), DraftState()
    drafter._pass_time_s = {1: 1.0, 2: 1.2, 4: 2.0, 8: 3.0}
    tokens, tried = np.array([1, 2, 3] * 9, np.int32), []
    for _ in range(2000):
        guess = drafter.propose(draft_state, tokens, 99)
        tried.append(len(guess) > 0)
        if len(guess):
            drafter.record_pass(draft_state, len(guess) + 1, drafter._pass_time_s[len(guess) + 1], len(guess), 0)
    assert sum(tried) < 30
    assert any(tried[-2 * MAX_PAUSE :])


def test_what_was_said_long_ago_is_forgotten_and_no_more():
    drafter = Speculator()
    for i in range(3 * HISTORY_TOKENS // 100):
        drafter.add_sequence(np.arange(100 * i, 100 * i + 100, dtype=np.int32))
        newest = 100 * i + 99
        assert is_known(drafter, newest)
        assert is_known(drafter, max(newest - HISTORY_TOKENS + 200, 50))
        assert len(drafter._earlier[None].tokens) <= 2 * HISTORY_TOKENS + 101
    assert not is_known(drafter, 50)


def is_known(drafter, token):
    gram = np.arange(token - NGRAM_SIZE, token, dtype=np.int32)
    return drafter.propose(DraftState(), gram, 1).tolist() == [token]


def test_an_answer_begins_as_earlier_ones_fared():
    drafter, history = Speculator(), np.array([1, 2, 3] * 9, np.int32)
    costs, begun = {1: 1.0, 2: 1.5, 4: 2.5, 8: 4.0}, []
    drafter._pass_time_s = dict(costs)
    for _ in range(1000):
        draft_state = DraftState()
        guessed = len(drafter.propose(draft_state, history, 99))
        drafter.record_pass(draft_state, guessed + 1, costs[guessed + 1], guessed, 0)
        begun.append(guessed > 0)
    assert begun[0]
    assert 0 < sum(begun[100:]) <= 90  # costs are forgotten, so it is tried again


def test_the_first_pass_of_a_size_does_not_count():
    drafter, draft_state = Speculator(), DraftState()
    history = np.array([1, 2, 3] * 9, np.int32)
    guessed = []
    for _ in range(3):
        for size in (0, *DRAFT_LENGTHS):
            drafter.record_pass(draft_state, size + 1, 50.0 if size else 1.0, 0, 0)
        guessed.append(len(drafter.propose(draft_state, history, 99)) > 0)
    assert guessed == [True, False, False]


def test_a_pass_that_was_slow_once_is_tried_again():
    drafter, draft_state = Speculator(), DraftState()
    drafter._pass_time_s = {1: 1.0} | {size + 1: 50.0 for size in DRAFT_LENGTHS}
    history = np.array([1, 2, 3] * 9, np.int32)
    assert not len(drafter.propose(draft_state, history, 99))
    for _ in range(3000):
        drafter.record_pass(draft_state, 1, 1.0, 0, 0)
    assert len(drafter.propose(draft_state, history, 99))


def test_what_another_owner_said_is_no_guess():
    drafter, told = Speculator(), np.arange(10, dtype=np.int32)
    drafter.add_sequence(told, "a")
    drafter.add_sequence(np.arange(50, 60, dtype=np.int32), UNCACHED_OWNER)
    assert drafter.propose(DraftState(), told[:NGRAM_SIZE], 1, "a").tolist() == [NGRAM_SIZE]
    for other in (None, "b", UNCACHED_OWNER):
        assert drafter.propose(DraftState(), told[:NGRAM_SIZE], 1, other).tolist() == []
    assert (
        drafter.propose(DraftState(), np.arange(50, 50 + NGRAM_SIZE, dtype=np.int32), 1, UNCACHED_OWNER).tolist() == []
    )
    for i in range(2 * MAX_OWNERS):
        drafter.add_sequence(told, f"owner {i}")
    assert len(drafter._earlier) == MAX_OWNERS
