"""Moments summed some documents at a time equal those of all positions at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.reference import sums


@st.composite
def passes(draw):
    """A matrix, and documents: inputs in both models, drift of the stream, and whether each is followed."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=12))
    followed = [True, *draw(st.lists(st.booleans(), min_size=len(lengths) - 1, max_size=len(lengths) - 1))]
    weight = generator.normal(size=(rows, columns)).astype(np.float32)
    return weight, [
        (*generator.normal(size=(2, n, columns)).astype(np.float32), generator.normal(size=(n, rows)), known)
        for n, known in zip(lengths, followed, strict=True)
    ]


@given(given_passes=passes(), together=st.integers(1, 100), columns=st.integers(1, 9), wide=st.booleans())
@pytest.mark.parametrize("drifts", [True, False])
def test_sums_are_those_of_all_documents(given_passes, together, columns, wide, drifts):
    weight, documents = given_passes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "TOGETHER", together)
        patch.setattr(sums, "COLUMNS", columns)
        found = sums.Sums(weight.shape, weight, wide=wide)
        for own, full, drift, known in documents:
            found.add(own, full if known else None, drift.astype(np.float32) if known and drifts else None)
        moments = found.moments()
    every = np.concatenate([own for own, *_ in documents]).astype(np.float64)
    own, full, drift = (np.concatenate([each[i] for each in documents if each[3]]).astype(np.float64) for i in range(3))
    scale = len(every) / len(own)
    missing = drift if drifts else np.zeros_like(drift)
    if weight.shape[1] > weight.shape[0]:
        missing = missing + (full - own) @ weight.T
        assert moments.cross is None
    else:
        assert np.allclose(moments.cross, scale * (full - own).T @ own, rtol=1e-4, atol=1e-3)
    assert np.allclose(moments.second, every.T @ every, rtol=1e-4, atol=1e-3)
    assert np.array_equal(moments.second, moments.second.T)
    assert moments.count == len(every)
    expected = scale * missing.T @ own
    if moments.residual is None:
        assert not expected.any()
    else:
        assert np.allclose(moments.residual, expected, rtol=1e-4, atol=1e-3)


def test_without_a_followed_document_there_is_nothing_to_make_up_for():
    found = sums.Sums((2, 3), np.ones((2, 3), np.float32))
    found.add(np.ones((4, 3), np.float32))
    moments = found.moments()
    assert moments.residual is None
    assert np.array_equal(moments.second, np.full((3, 3), 4))
