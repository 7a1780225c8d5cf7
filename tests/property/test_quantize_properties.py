"""Quantized matrices without calibration: how far weights move, that searches help, that kernels equal their twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import naive_quantize
from edgelm_export.quantize import grids, quantizer, rounding
from edgelm_export.quantize.moments import Moments
from edgelm_export.quantize.pack import PackedMatrix, dequantize, pack, unpack_codes, unpack_zero_points
from edgelm_export.quantize.quantizer import Quantizer, choose_scale_dtype
from edgelm_export.quantize.spec import QuantSpec

METHODS = ["rtn", "clip", "hqq"]
specs = st.builds(
    QuantSpec, st.sampled_from([4, 8]), st.sampled_from([16, 32, 64, 128]), st.booleans(), st.sampled_from(METHODS)
) | st.builds(
    QuantSpec, st.sampled_from([5, 6]), st.sampled_from([32, 64, 128]), st.just(True), st.sampled_from(METHODS)
)


@st.composite
def matrices(draw, elements=None):
    """Random normal rows of very different sizes, or anything that hypothesis thinks of."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 200))
    if draw(st.booleans()):
        generator = np.random.default_rng(draw(st.integers(0, 2**32)))
        size = 10.0 ** generator.uniform(-6, 3, (rows, 1))
        return (generator.normal(size=(rows, columns)) * size).astype(np.float32)
    elements = elements or st.floats(-(2.0**100), 2.0**100, width=32)
    return draw(hnp.arrays(np.float32, (rows, columns), elements=elements, fill=elements))


def importances(columns):
    return hnp.arrays(np.float32, columns, elements=st.floats(0, 100, width=32))


def quantize(weight, spec, **known):
    dtype = choose_scale_dtype(float(np.abs(weight).max()), spec.bits)
    return Quantizer(spec, scale_dtype=dtype, **known).quantize(weight)


def blocks_of(values, block_size):
    rows, columns = values.shape
    padded = np.pad(values, ((0, 0), (0, -columns % block_size)))
    return padded.reshape(rows, -1, block_size).astype(np.float64)


@given(weight=matrices(), spec=specs)
def test_a_weight_moves_at_most_half_a_step_unless_its_grid_ends(weight, spec):
    packed = quantize(weight, spec)
    codes = unpack_codes(packed)
    step = np.abs(packed.scales.astype(np.float64))[:, :, None]
    error = np.abs(blocks_of(weight, spec.block_size) - blocks_of(dequantize(packed), spec.block_size))
    inside = (codes > 0) & (codes < 2**spec.bits - 1)
    assert (error <= np.where(inside, step / 2, np.inf) * (1 + 1e-5) + 1e-37).all()


@given(weight=matrices(), spec=specs)
def test_a_plain_grid_reaches_both_ends_of_a_block(weight, spec):
    spec = QuantSpec(spec.bits, spec.block_size, spec.symmetric, "rtn")
    packed = Quantizer(spec, scale_dtype=np.float32).quantize(weight)
    error = np.abs(blocks_of(weight, spec.block_size) - blocks_of(dequantize(packed), spec.block_size))
    steps = error / np.abs(packed.scales.astype(np.float64))[:, :, None]
    assert (steps <= 1 + 1e-3).all()  # one step: symmetric grids end a step short on one side, zero points are rounded


@given(weight=matrices(), spec=specs)
def test_zero_stays_zero_and_padding_is_zero(weight, spec):
    weight[:, ::3] = 0
    packed = quantize(weight, spec)
    assert np.isfinite(packed.scales).all()
    assert (packed.scales != 0).all()
    assert (dequantize(packed)[weight == 0] == 0).all()
    codes = unpack_codes(packed).reshape(len(weight), -1)
    zeros = np.repeat(unpack_zero_points(packed), spec.block_size, axis=1)
    assert (codes == zeros)[:, weight.shape[1] :].all()
    assert (packed.zero_points is None) == spec.symmetric


@given(data=st.data(), weight=matrices(), spec=specs)
def test_the_search_never_does_worse_than_rounding(data, weight, spec):
    importance = data.draw(importances(weight.shape[1]))

    def error(method):
        read = dequantize(
            quantize(weight, QuantSpec(spec.bits, spec.block_size, spec.symmetric, method), importance=importance)
        )
        power = 0.7 if method == "hqq" else 2
        return read, lambda of: importance * np.abs(weight.astype(np.float64) - of) ** power

    rounded, _ = error("rtn")
    weights = quantizer._normalized(importance).astype(np.float64)
    for method, power in (("clip", 2), ("hqq", 0.7)):
        found, _ = error(method)
        before, after = (
            blocks_of(weights * np.abs(weight.astype(np.float64) - read) ** power, spec.block_size).sum(axis=2)
            for read in (rounded, found)
        )
        largest = blocks_of(weights * np.abs(weight.astype(np.float64)) ** power, spec.block_size).sum(axis=2)
        assert (after <= before * (1 + 1e-5) + 1e-6 * largest).all()  # values are read back in float32


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-45, 4e-44, 1e-40, 1e-38, 1e-6, 1e6, 3e38])
def test_blocks_of_extreme_size_stay_finite_and_close(size, method, symmetric):
    weight = np.linspace(-1, 1, 64, dtype=np.float64).reshape(2, 32)
    weight = (weight * size).astype(np.float32)
    packed = quantize(weight, QuantSpec(8, 32, symmetric, method))
    assert np.isfinite(packed.scales).all()
    assert np.abs(dequantize(packed).astype(np.float64) - weight).max() <= max(size / 100, 2.0**-118)


def test_the_scale_type_follows_the_largest_weight():
    assert choose_scale_dtype(0.1, 4) is np.float16
    assert choose_scale_dtype(0.1, 8) is np.float16
    assert choose_scale_dtype(2e-3, 4) is np.float16
    assert choose_scale_dtype(1e-3, 4) is np.float32
    assert choose_scale_dtype(1e7, 8) is np.float32
    assert choose_scale_dtype(0.0, 4) is np.float32


@pytest.mark.parametrize("half", [True, False])
@given(scale=st.floats(-1e38, 1e38))
def test_a_stored_scale_is_the_nearest_that_is_neither_zero_nor_infinite(half, scale):
    stored = grids.to_stored(scale, half)
    assert stored == naive_quantize.to_stored(scale, half)
    if half:
        assert float(np.float16(stored)) == stored


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_helps_where_weights_are_normal(symmetric):
    weight = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    errors = [
        ((dequantize(quantize(weight, QuantSpec(4, 32, symmetric, method))) - weight) ** 2).sum()
        for method in ("rtn", "clip")
    ]
    assert errors[1] < 0.93 * errors[0]


def test_importance_moves_the_error_to_where_it_matters_less():
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(64, 256)).astype(np.float32)
    importance = np.where(np.arange(256) % 4 == 0, 50, 1).astype(np.float32)

    def cost(**known):
        return (importance * (dequantize(quantize(weight, QuantSpec(4, 32), **known)) - weight) ** 2).sum()

    assert cost(importance=importance) < 0.8 * cost()
    by_moments = Moments(np.diag(importance), count=1)
    assert cost(moments=by_moments) < 0.8 * cost()


@given(weight=matrices(), spec=specs, cut=st.integers(1, 4), cpus=st.integers(1, 9))
def test_rows_are_quantized_alike_in_any_company(weight, spec, cut, cpus):
    dtype = choose_scale_dtype(float(np.abs(weight).max()), spec.bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer.os, "cpu_count", lambda: cpus)
        one = Quantizer(spec, scale_dtype=dtype)
        whole = one.quantize(weight)
    parts = [one.quantize(weight[i : i + cut]) for i in range(0, len(weight), cut)]
    joined = PackedMatrix.join(parts)
    for name in ("data", "high", "scales", "zero_points"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name)), name
    assert np.array_equal(dequantize(whole.rows(0, 3)), dequantize(whole)[0:3])


@given(data=st.data(), rows=st.integers(1, 4), blocks=st.integers(1, 5), spec=specs)
def test_packing_loses_nothing(data, rows, blocks, spec):
    code = st.integers(0, 2**spec.bits - 1)
    codes = data.draw(hnp.arrays(np.uint8, (rows, blocks * spec.block_size), elements=code))
    zeros = data.draw(hnp.arrays(np.uint8, (rows, blocks), elements=code))
    if spec.bits in (5, 6):
        packed = pack(codes, np.ones((rows, blocks), np.float16), None, spec.bits, codes.shape[1])
        assert np.array_equal(unpack_codes(packed).reshape(rows, -1), codes)
        assert (unpack_zero_points(packed) == 2 ** (spec.bits - 1)).all()
        assert packed.data.nbytes + packed.high.nbytes == codes.size * spec.bits // 8
        return
    packed = pack(codes, np.ones((rows, blocks), np.float16), zeros, spec.bits, codes.shape[1])
    assert np.array_equal(unpack_codes(packed).reshape(rows, -1), codes)
    assert np.array_equal(unpack_zero_points(packed), zeros)
    assert packed.data.nbytes == codes.size * spec.bits // 8
    assert packed.zero_points.nbytes == rows * -(-blocks * spec.bits // 8)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@settings(max_examples=40)
@given(
    data=st.data(),
    weight=matrices(),
    spec=specs,
    way=st.sampled_from([rounding.MINMAX, rounding.SEARCH, rounding.HQQ]),
    half=st.booleans(),
    candidates=st.sampled_from([0, 1, 2, 7, grids.SCALE_CANDIDATES]),
)
def test_the_kernels_equal_their_plain_twins(compiled, data, weight, spec, way, half, candidates):
    weight = weight[:2, :70]
    importance = data.draw(importances(weight.shape[1])) + np.float32(1e-6)
    blocks = -(-weight.shape[1] // spec.block_size)
    scales, zeros = np.full((2, len(weight), blocks), np.nan, np.float32)
    codes = np.full((len(weight), blocks * spec.block_size), 255, np.uint8)
    choose, apply = (
        kernel if compiled else naive_quantize.as_python(kernel)
        for kernel in (rounding.choose_grids, rounding.round_blocks)
    )
    given = (spec.block_size, spec.bits, spec.symmetric, way, half, candidates)
    choose(weight, importance, *given, scales, zeros)
    expected = naive_quantize.choose_grids(weight, importance, *given)
    assert np.array_equal(scales, expected[0])
    assert np.array_equal(zeros, expected[1])
    top = 2.0**spec.bits - 1
    apply(weight, scales, zeros, spec.block_size, top, codes)
    assert np.array_equal(codes, naive_quantize.round_blocks(weight, scales, zeros, spec.block_size, top))
