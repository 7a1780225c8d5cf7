"""Factors computed in place equal numpy's, at sizes below, at and above the size of a panel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.quantize import triangular

sizes = st.sampled_from([1, 2, 3, 63, 64, 65, 129, 256, 257, 520])
seeds = st.integers(0, 2**32)


def moments(size, seed):
    x = np.random.default_rng(seed).normal(size=(2 * size + 3, size))
    return x.T @ x / len(x) + 0.1 * np.eye(size)


@settings(max_examples=30)
@given(size=sizes, seed=seeds)
def test_a_matrix_becomes_its_cholesky_factor(size, seed):
    second = moments(size, seed)
    found = second.astype(np.float32)
    found[np.triu_indices(size, 1)] = 7  # the upper half is not read
    triangular.factor_cholesky(found)
    assert np.allclose(found, np.linalg.cholesky(second), rtol=0, atol=1e-4)


@settings(max_examples=30)
@given(size=sizes, seed=seeds)
def test_a_triangle_becomes_its_inverse(size, seed):
    lower = np.linalg.cholesky(moments(size, seed))
    found = lower.astype(np.float32)
    triangular.invert_lower_triangle(found)
    assert np.allclose(found, np.linalg.inv(lower), rtol=0, atol=1e-4)
    assert not np.triu(found, 1).any()


@settings(max_examples=30)
@given(size=sizes, seed=seeds)
def test_the_inverse_goes_above_the_diagonal(size, seed):
    lower = np.linalg.cholesky(moments(size, seed))
    found = lower.astype(np.float32)
    triangular.write_inverse_transpose(found)
    assert np.array_equal(np.tril(found), lower.astype(np.float32))
    assert np.allclose(np.triu(found, 1), -np.triu(np.linalg.inv(lower).T, 1), rtol=0, atol=1e-4)


@given(size=sizes, seed=seeds)
def test_a_flip_equals_the_reversed_transpose(size, seed):
    matrix = np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32)
    found = matrix.copy()
    triangular.flip_antidiagonal(found)
    assert np.array_equal(found, matrix.T[::-1, ::-1])


@pytest.mark.parametrize("size", [3, 300])
def test_a_matrix_that_is_not_positive_definite_is_refused(size):
    matrix = np.eye(size, dtype=np.float32)
    matrix[-1, -1] = -1
    with pytest.raises(np.linalg.LinAlgError):
        triangular.factor_cholesky(matrix)
