"""The MatMul and Gather kernels, compiled for each target that this processor supports, against plain loops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import naive_kernels as naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_nodes import gather_rows, inputs, matrix, panels, product, run

from edgelm.kernels.abi import SUPPORTED_FORMATS, WeightFormat

formats = st.sampled_from(SUPPORTED_FORMATS)
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(formats, st.integers(1, 150), st.integers(1, 40), st.integers(1, 11), st.booleans(), seeds)
def test_products_equal_plain_loops(library, fmt, size, columns, rows, biased, seed):
    rng = np.random.default_rng(seed)
    codes, scales, bias = matrix(rng, fmt, size, columns)
    x = inputs(rng, rows, size)
    bias = bias if biased else None
    found = run(product(library, fmt, size, codes, scales, bias=bias), x)
    expected = naive.matmul(x, codes, scales, fmt.bits, fmt.block_size, bias)
    bound = naive.matmul(abs(x), np.full_like(codes, 0xFF), abs(scales), fmt.bits, fmt.block_size, None)
    assert found.shape == expected.shape
    np.testing.assert_array_less(abs(found - expected), 1e-5 * bound + 1e-5)


@settings(max_examples=40, deadline=None)
@given(formats, st.integers(1, 300), st.integers(1, 70), st.integers(1, 20), st.integers(1, 3), seeds)
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(library, fmt, size, columns, rows, threads, seed):
    rng = np.random.default_rng(seed)
    codes, scales, bias = matrix(rng, fmt, size, columns)
    x = inputs(rng, rows, size)
    session = product(library, fmt, size, codes, scales, bias=bias, threads=threads)
    together = run(session, x)
    for row in range(rows):
        np.testing.assert_array_equal(run(session, x[row : row + 1])[0], together[row])
    deeper = run(session, x.reshape(1, rows, 1, size))
    np.testing.assert_array_equal(deeper, together.reshape(1, rows, 1, columns))


@settings(max_examples=15, deadline=None)
@given(formats, st.integers(200, 1500), st.integers(1, 9), seeds)
def test_wide_products_equal_products_of_their_columns(library, fmt, columns, rows, seed):
    """Wide products are divided into tasks for the threads; the last task may be short."""
    rng = np.random.default_rng(seed)
    codes, scales, bias = matrix(rng, fmt, 64, columns)
    x = inputs(rng, rows, 64)
    found = run(product(library, fmt, 64, codes, scales, bias=bias), x)
    for first in range(0, columns, 16):
        some = slice(first, first + 16)
        alone = run(product(library, fmt, 64, codes[some], scales[some], bias=bias[some]), x)
        np.testing.assert_array_equal(found[:, some], alone)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-31, 1e-29, 1e30, 3e38])
def test_activations_of_any_size_are_correct(library, value):
    fmt = WeightFormat(4, 32)
    codes, scales, _ = matrix(np.random.default_rng(0), fmt, 40, 20)
    scales *= np.float16(1e-2)
    x = np.full((1, 40), value, np.float32)
    found = run(product(library, fmt, 40, codes, scales), x)
    expected = naive.matmul(x, codes, scales, 4, 32, None)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-29 + value * 1e-4)


def test_a_graph_works_after_others_are_destroyed(library):
    fmt = WeightFormat(4, 32)
    codes, scales, _ = matrix(np.random.default_rng(0), fmt, 64, 32)
    x = np.ones((1, 64), np.float32)
    kept = product(library, fmt, 64, codes, scales)
    expected = run(kept, x)
    for _ in range(20):
        run(product(library, fmt, 64, codes, scales), x)
    np.testing.assert_array_equal(run(kept, x), expected)


COLLECTING = """
import gc, sys
from pathlib import Path
import numpy as np
from kernel_nodes import product, run
from edgelm.kernels.abi import WeightFormat

codes, scales = np.zeros((32, 2, 16), np.uint8), np.ones((32, 2), np.float16)
session = product(Path(sys.argv[1]), WeightFormat(4, 32), 64, codes, scales)
gc.collect()
filler = [bytearray(1000) for _ in range(10000)]
for _ in range(100):
    print(run(session, np.ones((1, 64), np.float32))[0, 0])
"""


def test_operators_are_not_garbage_collected(library):
    """In a separate process, because a failure is a crash."""
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", COLLECTING, str(library)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, set(done.stdout.split())) == (0, {"-512.0"}), done.stderr


@settings(max_examples=40)
@given(formats, st.integers(1, 50), st.integers(1, 3), seeds)
def test_panels_have_the_documented_layout(fmt, columns, blocks, seed):
    codes, _, _ = matrix(np.random.default_rng(seed), fmt, blocks * fmt.block_size, columns)
    found = panels(codes, fmt)
    real = np.arange(len(found) * 16) < columns  # the weights of padding columns are arbitrary
    lanes = found.reshape(len(found), -1, 16, 4)
    expected = np.array(naive.packed(codes, fmt.bits), np.uint8).reshape(lanes.shape)
    wanted = real.reshape(-1, 1, 16, 1)
    np.testing.assert_array_equal(np.where(wanted, lanes, 0), np.where(wanted, expected, 0))


@settings(max_examples=40, deadline=None)
@given(formats, st.integers(1, 50), st.integers(1, 3), st.lists(st.integers(1, 4), max_size=3), seeds)
def test_gathered_rows_are_exact(library, fmt, columns, blocks, shape, seed):
    rng = np.random.default_rng(seed)
    codes, scales, _ = matrix(rng, fmt, blocks * fmt.block_size, columns)
    indices = rng.integers(-columns, columns, shape)
    found = gather_rows(library, fmt, codes, scales, indices)
    table = [
        [weight * np.float32(scale) for weight, scale in naive.row(codes, scales, fmt.bits, n)] for n in range(columns)
    ]
    np.testing.assert_array_equal(found, np.array(table, np.float32)[indices])


@pytest.mark.parametrize("fmt", SUPPORTED_FORMATS, ids=str)
def test_indices_outside_the_table_are_clamped(library, fmt):
    codes, scales, _ = matrix(np.random.default_rng(0), fmt, fmt.block_size, 21)
    far = np.array([21, 2**62, -22, -(2**62)])
    found = gather_rows(library, fmt, codes, scales, far)
    np.testing.assert_array_equal(found, gather_rows(library, fmt, codes, scales, np.array([20, 20, 0, 0])))
