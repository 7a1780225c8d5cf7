"""Hypothesis strategies and checks that the tests of all quantization methods share."""

from __future__ import annotations

import numpy as np
from edgelm_export.quantize.quantizer import Quantizer, choose_scale_dtype
from edgelm_export.quantize.spec import QuantSpec
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from naive_quantize import as_python, choose_grids


def specs(methods):
    """Every combination of bits, block size and symmetry that a matrix may have, with one of the methods."""
    method = st.sampled_from(methods)
    return st.builds(
        QuantSpec, st.sampled_from([4, 8]), st.sampled_from([16, 32, 64, 128]), st.booleans(), method
    ) | st.builds(QuantSpec, st.sampled_from([5, 6]), st.sampled_from([32, 64, 128]), st.just(True), method)


@st.composite
def matrices(draw):
    """Matrix float32 [1-5, 1-200]: normal rows of very different magnitudes, or arbitrary values up to 2^100."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 200))
    if draw(st.booleans()):
        generator = np.random.default_rng(draw(st.integers(0, 2**32)))
        size = 10.0 ** generator.uniform(-6, 3, (rows, 1))
        return (generator.normal(size=(rows, columns)) * size).astype(np.float32)
    elements = st.floats(-(2.0**100), 2.0**100, width=32)
    return draw(hnp.arrays(np.float32, (rows, columns), elements=elements, fill=elements))


def importances(columns):
    """Importance float32 [columns] in [0, 100]."""
    return hnp.arrays(np.float32, columns, elements=st.floats(0, 100, width=32))


def quantize(weight, spec, **known):
    """Quantize a matrix with the scale dtype that its largest weight needs."""
    dtype = choose_scale_dtype(float(np.abs(weight).max()), spec.bits)
    return Quantizer(spec, scale_dtype=dtype, **known).quantize(weight)


def blocks_of(values, block_size):
    """[N, K] -> float64 [N, blocks, block_size], padded with zeros."""
    rows, columns = values.shape
    padded = np.pad(values, ((0, 0), (0, -columns % block_size)))
    return padded.reshape(rows, -1, block_size).astype(np.float64)


def block_errors(weight, read, importance, block_size, power):
    """The sum of importance * |error|^power in each block, float64 [N, blocks]."""
    return blocks_of(importance * np.abs(weight.astype(np.float64) - read) ** power, block_size).sum(axis=2)


def check_kernel(kernel, naive_grid, *, compiled, weight, importance, spec, half):
    """Assert that a `choose_grids` kernel equals a plain-loop grid (block, importance, bits, symmetric, half)."""
    weight = weight[:2, :70]
    importance = importance[: weight.shape[1]] + np.float32(1e-6)
    blocks = -(-weight.shape[1] // spec.block_size)
    scales, zeros = np.full((2, len(weight), blocks), np.nan, np.float32)
    options = (spec.block_size, spec.bits, spec.symmetric, half)
    (kernel if compiled else as_python(kernel))(weight, importance, *options, scales, zeros)
    expected = choose_grids(weight, importance, *options, naive_grid)
    assert np.array_equal(scales, expected[0])
    assert np.array_equal(zeros, expected[1])
