"""What holds for every method without calibration, and for packing. What holds for one is in its own file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import naive_quantize
from edgelm_export.quantize import grids, quantizer
from edgelm_export.quantize.methods import load_method, method_names
from edgelm_export.quantize.pack import PackedMatrix, dequantize, pack_codes, unpack_codes, unpack_zero_points
from edgelm_export.quantize.quantizer import Quantizer, choose_scale_dtype
from edgelm_export.quantize.spec import QuantSpec
from quantize_cases import blocks_of, matrices, quantize, specs

METHODS = [name for name in method_names() if not load_method(name).needs_moments]
"""The methods that need no calibration; new ones are tested without a change here."""


@pytest.mark.parametrize("name", method_names())
def test_a_method_that_needs_moments_has_a_fallback_that_does_not(name):
    method = load_method(name)
    assert method.needs_moments == (method.fallback is not None)
    assert method.fallback in (None, *METHODS)


@given(weight=matrices(), spec=specs(METHODS))
def test_a_weight_inside_the_range_moves_at_most_half_a_step(weight, spec):
    packed = quantize(weight, spec)
    codes = unpack_codes(packed)
    step = np.abs(packed.scales.astype(np.float64))[:, :, None]
    error = np.abs(blocks_of(weight, spec.block_size) - blocks_of(dequantize(packed), spec.block_size))
    inside = (codes > 0) & (codes < 2**spec.bits - 1)
    assert (error <= np.where(inside, step / 2, np.inf) * (1 + 1e-5) + 1e-37).all()


@given(weight=matrices(), spec=specs(METHODS))
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
def test_a_rounded_scale_is_the_nearest_that_is_neither_zero_nor_infinite(half, scale):
    stored = grids.round_scale(scale, half)
    assert stored == naive_quantize.to_stored(scale, half)
    if half:
        assert float(np.float16(stored)) == stored


@given(weight=matrices(), spec=specs(METHODS), cut=st.integers(1, 4), cpus=st.integers(1, 9))
def test_the_codes_of_a_row_do_not_depend_on_the_other_rows(weight, spec, cut, cpus):
    dtype = choose_scale_dtype(float(np.abs(weight).max()), spec.bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer.os, "cpu_count", lambda: cpus)
        one = Quantizer(spec, scale_dtype=dtype)
        whole = one.quantize(weight)
    parts = [one.quantize(weight[i : i + cut]) for i in range(0, len(weight), cut)]
    joined = PackedMatrix.join_rows(parts)
    for name in ("data", "high_bits", "scales", "zero_points"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name)), name
    assert np.array_equal(dequantize(whole.rows(0, 3)), dequantize(whole)[0:3])


@given(data=st.data(), rows=st.integers(1, 4), blocks=st.integers(1, 5), spec=specs(METHODS))
def test_packed_codes_and_zero_points_are_unpacked_unchanged(data, rows, blocks, spec):
    code = st.integers(0, 2**spec.bits - 1)
    codes = data.draw(hnp.arrays(np.uint8, (rows, blocks * spec.block_size), elements=code))
    zeros = data.draw(hnp.arrays(np.uint8, (rows, blocks), elements=code))
    if spec.bits in (5, 6):
        packed = pack_codes(codes, np.ones((rows, blocks), np.float16), None, spec.bits, codes.shape[1])
        assert np.array_equal(unpack_codes(packed).reshape(rows, -1), codes)
        assert (unpack_zero_points(packed) == 2 ** (spec.bits - 1)).all()
        assert packed.data.nbytes + packed.high_bits.nbytes == codes.size * spec.bits // 8
        return
    packed = pack_codes(codes, np.ones((rows, blocks), np.float16), zeros, spec.bits, codes.shape[1])
    assert np.array_equal(unpack_codes(packed).reshape(rows, -1), codes)
    assert np.array_equal(unpack_zero_points(packed), zeros)
    assert packed.data.nbytes == codes.size * spec.bits // 8
    assert packed.zero_points.nbytes == rows * -(-blocks * spec.bits // 8)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@settings(max_examples=40)
@given(weight=matrices(), spec=specs(METHODS), seed=st.integers(0, 99))
def test_the_rounding_kernel_equals_its_plain_twin(compiled, weight, spec, seed):
    generator = np.random.default_rng(seed)
    weight, max_code = weight[:2, :70], 2.0**spec.bits - 1
    blocks = -(-weight.shape[1] // spec.block_size)
    scales = (np.abs(weight).max() + np.float32(1e-3)) * generator.uniform(0.01, 0.2, (len(weight), blocks))
    scales = scales.astype(np.float32)
    zeros = generator.integers(0, max_code + 1, scales.shape).astype(np.float32)
    codes = np.full((len(weight), blocks * spec.block_size), 255, np.uint8)
    round_blocks = grids.round_blocks if compiled else naive_quantize.as_python(grids.round_blocks)
    round_blocks(weight, scales, zeros, spec.block_size, max_code, codes)
    assert np.array_equal(codes, naive_quantize.round_blocks(weight, scales, zeros, spec.block_size, max_code))
