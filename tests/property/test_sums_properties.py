"""Moments summed in batches of documents equal those of all positions at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.calibration import moment_sums


@st.composite
def passes(draw):
    """A matrix and its documents: inputs in both models, drift of the residual stream, weights, is_held_out."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=12))
    held = [False, *draw(st.lists(st.booleans(), min_size=len(lengths) - 1, max_size=len(lengths) - 1))]
    weight = generator.normal(size=(rows, columns)).astype(np.float32)
    return weight, [
        (
            *generator.normal(size=(2, n, columns)).astype(np.float32),
            generator.normal(size=(n, rows)).astype(np.float32),
            generator.uniform(0, 2, n).astype(np.float32),
            is_held_out,
        )
        for n, is_held_out in zip(lengths, held, strict=True)
    ]


@given(given_passes=passes(), batch=st.integers(1, 100), columns=st.integers(1, 9), float32=st.booleans())
@pytest.mark.parametrize("drifts", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_sums_equal_those_of_all_documents(given_passes, batch, columns, float32, drifts, weighted):
    weight, documents = given_passes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moment_sums, "MIN_BATCH_VALUES", batch)
        patch.setattr(moment_sums, "COLUMN_CHUNK", columns)
        found = moment_sums.MomentAccumulator(weight.shape, weight, sums_float32=float32)
        for own, full, drift, weights, held in documents:
            found.add(own, full, drift if drifts else None, weights if weighted else None, is_held_out=held)
        moments = found.moments()

    def concatenated(is_held_out):
        own, full, drift, weights = (
            np.concatenate([each[i] for each in documents if each[4] == is_held_out]).astype(np.float64)
            for i in range(4)
        )
        roots = np.sqrt(weights if weighted else np.ones_like(weights))[:, None]
        return own * roots, full * roots, drift * roots if drifts else np.zeros_like(drift)

    own, full, missing = concatenated(is_held_out=False)
    if weight.shape[1] > weight.shape[0]:
        missing = missing + (full - own) @ weight.T
        assert moments.input_drift is None
    else:
        assert np.allclose(moments.input_drift, (full - own).T @ own, rtol=1e-4, atol=1e-3)
    assert np.allclose(moments.hessian, own.T @ own, rtol=1e-4, atol=1e-3)
    assert np.array_equal(moments.hessian, moments.hessian.T)
    assert moments.count == len(own)
    expected = missing.T @ own
    if moments.residual_drift is None:
        assert not expected.any()
    else:
        assert np.allclose(moments.residual_drift, expected, rtol=1e-4, atol=1e-3)
    if not any(held for *_, held in documents):
        assert moments.held_out is None
        return
    own, full, missing = concatenated(is_held_out=True)
    assert np.allclose(moments.held_out.inputs, own, rtol=1e-5, atol=1e-6)
    assert np.allclose(moments.held_out.target, full @ weight.T + missing, rtol=1e-4, atol=1e-4)


def test_without_unquantized_inputs_there_is_no_drift():
    found = moment_sums.MomentAccumulator((2, 3), np.ones((2, 3), np.float32))
    found.add(np.ones((4, 3), np.float32))
    found.add(np.full((1, 3), 2, np.float32), is_held_out=True)
    moments = found.moments()
    assert moments.residual_drift is None
    assert moments.input_drift is None
    assert np.array_equal(moments.hessian, np.full((3, 3), 4))
    assert np.array_equal(moments.held_out.inputs, np.full((1, 3), 2))
    assert moments.held_out.target is None
