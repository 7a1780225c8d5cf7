"""The kernels in machine code, for each kind of processor that this one can stand in for, against their plain loops."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import naive_kernels as naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding
from native_nodes import run, session_of

from edgelm.native.compile import compile_kernels
from edgelm.native.formats import BLOCKS, Format
from edgelm.native.packing import packed_codes
from edgelm.native.registration import Operators
from edgelm.native.targets import TARGETS

FORMATS = [Format(bits, block) for bits in (4, 8) for block in BLOCKS]
formats = st.sampled_from(FORMATS)
seeds = st.integers(0, 2**32 - 1)


def runnable(target):
    """Whether this processor has what a target needs."""
    features = binding.get_host_cpu_features()
    return target.triple.startswith(platform.machine()) and all(features.get(name) for name in target.features)


@pytest.fixture(scope="module", params=[target for target in TARGETS if runnable(target)], ids=lambda t: t.name)
def operators(request, tmp_path_factory):
    """Every format's operator, compiled for one kind of processor."""
    target = request.param
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    features = ",".join(f"+{name}" for name in target.features)
    library.write_bytes(compile_kernels(target, FORMATS, "", features))
    return Operators(library, FORMATS)


def matrix(rng, form, size, columns):
    """Random codes and scales of a matrix, and a bias."""
    blocks = -(-size // form.block)
    codes = rng.integers(0, 256, (columns, blocks, form.block_bytes), np.uint8)
    scales = (rng.normal(size=(columns, blocks)) * 0.01).astype(np.float16)
    return codes, scales, rng.normal(size=columns).astype(np.float32)


def inputs(rng, rows, size):
    """Activations of very different sizes, some of them 0."""
    x = rng.normal(size=(rows, size)) * 10.0 ** rng.integers(-6, 6, (rows, 1))
    x[rng.random((rows, size)) < 0.1] = 0
    x[rng.random(rows) < 0.1] = 0
    return x.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(formats, st.integers(1, 150), st.integers(1, 40), st.integers(1, 11), st.booleans(), seeds)
def test_products_are_those_of_plain_loops(operators, form, size, columns, rows, biased, seed):
    rng = np.random.default_rng(seed)
    codes, scales, bias = matrix(rng, form, size, columns)
    x = inputs(rng, rows, size)
    bias = bias if biased else None
    found = run(session_of(operators, form, size, columns, bias=biased), x, codes, scales, form.bits, bias)
    expected = naive.matmul(x, codes, scales, form.bits, form.block, bias)
    bound = naive.matmul(abs(x), np.full_like(codes, 0xFF), abs(scales), form.bits, form.block, None)
    assert found.shape == expected.shape
    np.testing.assert_array_less(abs(found - expected), 1e-5 * bound + 1e-5)


@settings(max_examples=40, deadline=None)
@given(formats, st.integers(1, 300), st.integers(1, 70), st.integers(1, 20), st.integers(1, 3), seeds)
def test_a_row_alone_gives_the_same_bits_as_in_company(operators, form, size, columns, rows, threads, seed):
    rng = np.random.default_rng(seed)
    codes, scales, bias = matrix(rng, form, size, columns)
    x = inputs(rng, rows, size)
    session = session_of(operators, form, size, columns, bias=True, threads=threads)
    together = run(session, x, codes, scales, form.bits, bias)
    for row in range(rows):
        alone = run(session, x[row : row + 1], codes, scales, form.bits, bias)
        np.testing.assert_array_equal(alone[0], together[row])
    deeper = run(session, x.reshape(1, rows, 1, size), codes, scales, form.bits, bias)
    np.testing.assert_array_equal(deeper, together.reshape(1, rows, 1, columns))


@settings(max_examples=15, deadline=None)
@given(formats, st.integers(200, 1500), st.integers(1, 9), seeds)
def test_wide_products_are_those_of_their_columns(operators, form, columns, rows, seed):
    """Wide ones are cut into parts for the threads, of which the last may be short."""
    rng = np.random.default_rng(seed)
    codes, scales, bias = matrix(rng, form, 64, columns)
    x = inputs(rng, rows, 64)
    found = run(session_of(operators, form, 64, columns, bias=True), x, codes, scales, form.bits, bias)
    narrow = session_of(operators, form, 64, 16, bias=True)
    for first in range(0, columns, 16):
        some = slice(first, first + 16)
        parts = [np.concatenate([each[some], each[:16]])[:16] for each in (codes, scales, bias)]
        alone = run(narrow, x, parts[0], parts[1], form.bits, parts[2])
        np.testing.assert_array_equal(found[:, some], alone[:, : columns - first])


@settings(max_examples=40, deadline=None)
@given(formats, st.integers(1, 150), st.integers(1, 40), st.integers(1, 5), seeds)
def test_gated_products_are_those_of_the_gated_values(operators, form, size, columns, rows, seed):
    """A value that falls between two codes may go either way, so a few codes may differ by one."""
    rng = np.random.default_rng(seed)
    codes, scales, _ = matrix(rng, form, size, columns)
    gates, values = rng.normal(size=(2, rows, size)).astype(np.float32) * np.array([[[6]], [[1]]], np.float32)
    x = np.array([[naive.silu(g) * v for g, v in zip(*pair, strict=True)] for pair in zip(gates, values, strict=True)])
    session = session_of(operators, form, size, columns, gated=True)
    found = run(session, np.concatenate([gates, values], 1), codes, scales, form.bits)
    expected = naive.matmul(x.astype(np.float32), codes, scales, form.bits, form.block, None)
    step = float(abs(x).max()) / 127 * float(abs(scales.astype(np.float32)).max()) * 2 ** (form.bits - 1)
    np.testing.assert_array_less(abs(found - expected), 2.5 * step + 1e-5)
    assert np.mean(abs(found - expected) > 0.1 * step) < 0.3


@pytest.mark.parametrize("value", [-200.0, -90.0, -87.5, -1e-3, 0.0, 1e-3, 30.0, 90.0, 3e38])
def test_gates_of_any_size_are_right(operators, value):
    form = Format(8, 16)
    codes = np.full((1, 1, 16), 129, np.uint8)
    gates = np.zeros((1, 32), np.float32)
    gates[0, 0], gates[0, 16] = value, 1
    found = run(session_of(operators, form, 16, 1, gated=True), gates, codes, np.ones((1, 1), np.float16), 8)
    np.testing.assert_allclose(found[0, 0], naive.silu(max(value, -700)), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-31, 1e-29, 1e30, 3e38])
def test_activations_of_any_size_are_right(operators, value):
    form = Format(4, 32)
    codes, scales, _ = matrix(np.random.default_rng(0), form, 40, 20)
    x = np.full((1, 40), value, np.float32)
    found = run(session_of(operators, form, 40, 20), x, codes, scales * np.float16(1e-2), 4)
    expected = naive.matmul(x, codes, scales * np.float16(1e-2), 4, 32, None)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-29 + value * 1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_no_number_stays_none(operators, value, gated):
    form = Format(4, 32)
    codes, scales, _ = matrix(np.random.default_rng(0), form, 128, 20)
    x = np.random.default_rng(1).normal(size=(3, 256 if gated else 128)).astype(np.float32)
    x[1, 70 + 128 * gated] = value
    found = run(session_of(operators, form, 128, 20, gated=gated), x, codes, scales, 4)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


def test_a_graph_lives_on_when_others_are_gone(operators):
    form = Format(4, 32)
    codes, scales, _ = matrix(np.random.default_rng(0), form, 64, 32)
    x = np.ones((1, 64), np.float32)
    kept = session_of(operators, form, 64, 32)
    expected = run(kept, x, codes, scales, 4)
    for _ in range(20):
        run(session_of(operators, form, 64, 32), x, codes, scales, 4)
    np.testing.assert_array_equal(run(kept, x, codes, scales, 4), expected)


FORGETFUL = """
import gc, sys
from pathlib import Path
import numpy as np
from native_nodes import run, session_of
from edgelm.native.formats import Format
from edgelm.native.registration import Operators

form = Format(4, 32)
session = session_of(Operators(Path(sys.argv[1]), [form]), form, 64, 32)
gc.collect()
filler = [bytearray(1000) for _ in range(10000)]
codes, scales = np.zeros((32, 2, 16), np.uint8), np.ones((32, 2), np.float16)
for _ in range(100):
    print(run(session, np.ones((1, 64), np.float32), codes, scales, 4)[0, 0])
"""


def test_operators_outlive_what_python_remembers_of_them(operators):
    """In a process of its own, since the alternative is a crash."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", FORGETFUL, str(operators.path)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, set(done.stdout.split())) == (0, {"-512.0"}), done.stderr


@settings(max_examples=40)
@given(st.sampled_from([4, 8]), st.integers(1, 50), st.integers(1, 3), st.sampled_from(BLOCKS), seeds)
def test_panels_are_laid_out_as_described(bits, columns, blocks, block, seed):
    codes = np.random.default_rng(seed).integers(0, 256, (columns, blocks, block * bits // 8), np.uint8)
    found = packed_codes(codes, bits)
    real = np.arange(len(found) * 16) < columns  # columns that fill up the last panel have no weights that count
    lanes = found.reshape(len(found), -1, 16, 4)
    expected = np.array(naive.packed(codes, bits), np.uint8).reshape(lanes.shape)
    wanted = real.reshape(-1, 1, 16, 1)
    np.testing.assert_array_equal(np.where(wanted, lanes, 0), np.where(wanted, expected, 0))
