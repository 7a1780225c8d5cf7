"""Loops of every period up to the maximum are detected; text without loops is not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.engine.repetition_guard import MAX_PERIOD, MIN_COPIES, MIN_LOOP_TOKENS, LoopDetector


def ends_at(tokens):
    """Return the number of tokens until a loop is detected; None if there is none."""
    detector, answer = LoopDetector(), np.array(tokens, np.int32)
    return next((size for size in range(1, answer.size + 1) if detector.detect(answer[:size])), None)


def plainly(tokens):
    """The same result by comparing slices."""
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
def test_detection_equals_comparing_slices(before, passage, copies, behind):
    tokens = [*before, *passage * copies, *behind]
    assert ends_at(tokens) == plainly(tokens)


@pytest.mark.parametrize("period", [1, 2, 7, 40, MAX_PERIOD])
def test_a_loop_is_detected_after_the_required_copies(period):
    beginning, passage = [1000, 1001], list(range(period))
    assert ends_at(beginning + passage * 100) == 2 + max(MIN_LOOP_TOKENS, MIN_COPIES * period)


@pytest.mark.parametrize("period", [MAX_PERIOD + 1, 1000])
def test_passages_over_the_maximum_are_not_loops(period):
    assert ends_at(list(range(period)) * 6) is None


def test_lists_of_different_entries_are_not_loops():
    tokens = [token for number in range(200) for token in (1, 2, 3, 100 + number)]
    assert ends_at(tokens) is None
