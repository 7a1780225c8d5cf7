"""Hidden states stored as float16 with scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.calibration.hidden_states import HiddenStates

ARRAYS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.floats(-(2.0**60), 2.0**60, width=32)
)


@given(st.lists(ARRAYS, min_size=1, max_size=3))
def test_eleven_bits_relative_to_the_largest_of_a_position_are_kept(arrays):
    states = HiddenStates(enumerate(arrays), is_float16=True)
    assert len(states) == len(arrays)
    for number, array in enumerate(arrays):
        largest = np.abs(array).max(axis=1, keepdims=True)
        allowed = np.maximum(np.abs(array) * 2.0**-10, largest * 2.0**-24) + 1e-30
        assert (np.abs(states[number] - array) <= allowed).all()


@given(st.lists(ARRAYS, min_size=1, max_size=3))
def test_float32_states_are_unchanged(arrays):
    states = HiddenStates(enumerate(arrays))
    for number, array in enumerate(arrays):
        np.testing.assert_array_equal(states[number], array)


@given(ARRAYS, ARRAYS, st.booleans())
def test_a_document_can_be_replaced(first, second, is_float16):
    states = HiddenStates([(7, first), (2, first)], is_float16=is_float16)
    states[2] = second
    again = HiddenStates(enumerate([first, second]), is_float16=is_float16)
    assert 7 in states
    assert 0 not in states
    for number, other in ((7, 0), (2, 1)):
        np.testing.assert_array_equal(states[number], again[other])
