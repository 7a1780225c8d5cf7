"""Operators that the MatMul kernels compute together with a product: SwiGLU, RMSNorm, addition."""

from __future__ import annotations

import naive_kernels as naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_nodes import inputs, matrix, product, run

from edgelm.kernels.abi import SUPPORTED_FORMATS, WeightFormat

formats = st.sampled_from(SUPPORTED_FORMATS)
seeds = st.integers(0, 2**32 - 1)


def assert_products_of(found, x, codes, scales, fmt):
    """Compare products. Values between two codes may be rounded either way, so a few codes may differ by one.

    16-bit codes are so fine that float32 rounding changes about one in a hundred, so more of them may differ.
    """
    maximum, usual = (2.5, 0.1) if fmt.code_bytes == 1 else (6, 1)
    expected = naive.matmul(x.astype(np.float32), codes, scales, fmt.bits, fmt.block_size, None)
    largest = abs(x).max(1, keepdims=True)
    step = largest / fmt.max_code * float(abs(scales.astype(np.float32)).max()) * 2 ** (fmt.bits - 1)
    assert found.shape == expected.shape
    apart = abs(found - expected)
    assert (apart < maximum * step + 1e-5).all()
    assert np.mean(apart > usual * step) < 0.3


@settings(max_examples=40, deadline=None)
@given(formats, st.integers(1, 150), st.integers(1, 40), st.integers(1, 5), seeds)
def test_gated_products_equal_products_of_the_gated_values(library, fmt, size, columns, rows, seed):
    rng = np.random.default_rng(seed)
    codes, scales, _ = matrix(rng, fmt, size, columns)
    gates, values = rng.normal(size=(2, rows, size)).astype(np.float32) * np.array([[[6]], [[1]]], np.float32)
    x = np.array([[naive.silu(g) * v for g, v in zip(*pair, strict=True)] for pair in zip(gates, values, strict=True)])
    found = run(product(library, fmt, size, codes, scales, gated=True), np.concatenate([gates, values], 1))
    assert_products_of(found, x, codes, scales, fmt)


@pytest.mark.parametrize("value", [-200.0, -90.0, -87.5, -1e-3, 0.0, 1e-3, 30.0, 90.0, 3e38])
def test_gates_of_any_size_are_correct(library, value):
    codes = np.full((1, 1, 16), 129, np.uint8)
    gates = np.zeros((1, 32), np.float32)
    gates[0, 0], gates[0, 16] = value, 1
    found = run(product(library, WeightFormat(8, 16), 16, codes, np.ones((1, 1), np.float16), gated=True), gates)
    np.testing.assert_allclose(found[0, 0], naive.silu(max(value, -700)), rtol=1e-6, atol=1e-30)


@settings(max_examples=40, deadline=None)
@given(formats, st.integers(1, 150), st.integers(1, 40), st.integers(1, 5), st.sampled_from([1e-12, 1e-5, 0.5]), seeds)
def test_normed_products_equal_products_of_the_normed_rows(library, fmt, size, columns, rows, epsilon, seed):
    rng = np.random.default_rng(seed)
    codes, scales, _ = matrix(rng, fmt, size, columns)
    x, weight = inputs(rng, rows, size), rng.normal(size=size).astype(np.float32)
    found = run(product(library, fmt, size, codes, scales, norm=weight, epsilon=epsilon), x)
    normed = np.array([naive.normed(row, weight, epsilon) for row in x])
    assert_products_of(found, normed, codes, scales, fmt)


@pytest.mark.parametrize("epsilon", [1e-6, 3.0])
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-15, 1e-3, 1.0, -1e18])
def test_norms_of_rows_of_any_size_are_correct(library, value, epsilon):
    codes = np.full((1, 1, 16), 129, np.uint8)
    weight = np.full(1, 0.7, np.float32)
    session = product(library, WeightFormat(8, 16), 1, codes, np.ones((1, 1), np.float16), norm=weight, epsilon=epsilon)
    found = run(session, np.full((1, 1), value, np.float32))
    np.testing.assert_allclose(found[0], naive.normed([value], weight, epsilon), rtol=1e-6, atol=2e-30)


@settings(max_examples=40, deadline=None)
@given(
    formats, st.integers(1, 300), st.integers(1, 70), st.integers(1, 11), st.integers(1, 3),
    st.sampled_from(["gated", "normed"]), seeds,
)  # fmt: skip
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(library, fmt, size, columns, rows, threads, kind, seed):
    rng = np.random.default_rng(seed)
    codes, scales, bias = matrix(rng, fmt, size, columns)
    x = inputs(rng, rows, size if kind == "normed" else 2 * size)
    skip = rng.normal(size=(rows, columns)).astype(np.float32)
    norm = rng.normal(size=size).astype(np.float32)
    before = {"norm": norm, "epsilon": 1e-5} if kind == "normed" else {"gated": True}
    session = product(library, fmt, size, codes, scales, bias=bias, skip=True, threads=threads, **before)
    together = run(session, x, skip)
    for row in range(rows):
        np.testing.assert_array_equal(run(session, x[row : row + 1], skip[row : row + 1])[0], together[row])


@settings(max_examples=40, deadline=None)
@given(
    formats, st.integers(1, 100), st.one_of(st.integers(1, 70), st.sampled_from([16, 32, 48, 600])),
    st.integers(1, 11), st.booleans(), st.booleans(), seeds,
)  # fmt: skip
def test_skip_is_added_last_and_exactly(library, fmt, size, columns, rows, biased, normed, seed):
    rng = np.random.default_rng(seed)
    codes, scales, bias = matrix(rng, fmt, size, columns)
    x = inputs(rng, rows, size)
    skip = (rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-3, 3, (rows, 1))).astype(np.float32)
    options = {"bias": bias} if biased else {}
    if normed:
        options |= {"norm": rng.normal(size=size).astype(np.float32), "epsilon": 1e-5}
    plain = run(product(library, fmt, size, codes, scales, **options), x)
    session = product(library, fmt, size, codes, scales, skip=True, **options)
    np.testing.assert_array_equal(run(session, x, skip), plain + skip)
    deeper = run(session, x.reshape(1, rows, 1, size), skip.reshape(1, rows, 1, columns))
    np.testing.assert_array_equal(deeper[0, :, 0], plain + skip)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["plain", "gated", "normed"])
@pytest.mark.parametrize("fmt", [WeightFormat(bits, 32) for bits in (4, 5, 6, 8)], ids=str)
def test_nan_reaches_only_its_own_row(library, value, kind, fmt):
    codes, scales, _ = matrix(np.random.default_rng(0), fmt, 128, 20)
    x = np.random.default_rng(1).normal(size=(3, 256 if kind == "gated" else 128)).astype(np.float32)
    x[1, 198 if kind == "gated" else 70] = value
    options = {"gated": {"gated": True}, "normed": {"norm": np.ones(128, np.float32), "epsilon": 1e-5}}
    found = run(product(library, fmt, 128, codes, scales, **options.get(kind, {})), x)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()
