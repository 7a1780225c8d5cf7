"""Loops are found, whatever their period, soon after they begin; text that does not loop is let pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.engine.repetition import MAX_PERIOD, MIN_COPIES, MIN_LOOP_TOKENS, LoopDetector


def ends_at(tokens):
    """How many tokens it takes until a loop is found; None where none is."""
    detector, answer = LoopDetector(), np.array(tokens, np.int32)
    return next((size for size in range(1, answer.size + 1) if detector.detect(answer[:size])), None)


def plainly(tokens):
    """The same by comparing slices."""
    for size in range(1, len(tokens) + 1):
        for period in range(1, MAX_PERIOD + 1):
            whole = max(MIN_LOOP_TOKENS, MIN_COPIES * period)
            tail = tokens[size - whole : size]
            if size >= whole and tail[period:] == tail[:-period]:
                return size
    return None


@given(
    before=st.lists(st.integers(0, 3), max_size=40),
    passage=st.lists(st.integers(0, 3), min_size=1, max_size=MAX_PERIOD + 4),
    copies=st.integers(1, 9),
    behind=st.lists(st.integers(0, 3), max_size=10),
)
def test_a_loop_is_found_where_slices_find_it(before, passage, copies, behind):
    tokens = [*before, *passage * copies, *behind]
    assert ends_at(tokens) == plainly(tokens)


@pytest.mark.parametrize("period", [1, 2, 7, 40, MAX_PERIOD])
def test_a_loop_ends_after_its_copies(period):
    beginning, passage = [1000, 1001], list(range(period))
    assert ends_at(beginning + passage * 100) == 2 + max(MIN_LOOP_TOKENS, MIN_COPIES * period)


@pytest.mark.parametrize("period", [MAX_PERIOD + 1, 1000])
def test_long_passages_are_let_pass(period):
    assert ends_at(list(range(period)) * 6) is None


def test_lists_of_different_entries_are_let_pass():
    tokens = [token for number in range(200) for token in (1, 2, 3, 100 + number)]
    assert ends_at(tokens) is None
