"""Quantized matrices: how far weights move, that the search only helps, and that onnxruntime reads our layout."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

onnx = pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import naive_quantize  # noqa: E402
import onnxruntime as ort  # noqa: E402
from edgelm_export.quantize import rounding  # noqa: E402
from edgelm_export.quantize.pack import dequantize, quantize  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

BITS = st.sampled_from([4, 8])
BLOCKS = st.sampled_from([32, 64, 128])
METHODS = st.sampled_from(["rtn", "clip"])


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


def blocks_of(values, block_size):
    rows, columns = values.shape
    padded = np.pad(values, ((0, 0), (0, -columns % block_size)))
    return padded.reshape(rows, -1, block_size).astype(np.float64)


@given(weight=matrices(), bits=BITS, block_size=BLOCKS)
def test_rounding_moves_a_weight_at_most_half_a_step_unless_the_range_ends(weight, bits, block_size):
    packed = quantize(weight, bits, block_size, "rtn")
    values, read = blocks_of(weight, block_size), blocks_of(dequantize(packed), block_size)
    step = np.abs(packed.scales.astype(np.float64))[:, :, None]
    error = np.abs(values - read)
    top = (1 << (bits - 1)) - 1
    at_the_end = np.rint(read / packed.scales[:, :, None]) == top
    slack = 1 + 1e-5
    tiny = 2.0**-120  # blocks smaller than that are stored as zeros
    assert (error <= step * np.where(at_the_end, 1, 0.5) * slack + tiny).all()


@given(weight=matrices(), bits=BITS, block_size=BLOCKS, method=METHODS)
def test_zero_stays_zero_and_padding_is_zero(weight, bits, block_size, method):
    weight[:, ::3] = 0
    packed = quantize(weight, bits, block_size, method)
    assert np.isfinite(packed.scales).all()
    assert (packed.scales != 0).all()
    assert (dequantize(packed)[weight == 0] == 0).all()
    codes = packed.data.reshape(len(weight), -1)
    codes = np.stack([codes & 15, codes >> 4], -1).reshape(len(weight), -1) if bits == 4 else codes
    assert (codes[:, weight.shape[1] :] == 1 << (bits - 1)).all()


@given(weight=matrices(), bits=BITS, block_size=BLOCKS)
def test_the_search_never_does_worse_than_rounding(weight, bits, block_size):
    def error(method):
        read = dequantize(quantize(weight, bits, block_size, method))
        return ((blocks_of(weight, block_size) - blocks_of(read, block_size)) ** 2).sum(axis=2)

    rounded = error("rtn")
    assert (error("clip") <= rounded * (1 + 1e-5) + 1e-12 * (blocks_of(weight, block_size) ** 2).sum(axis=2)).all()


@pytest.mark.parametrize("method", ["rtn", "clip"])
@pytest.mark.parametrize("size", [1e-45, 4e-44, 1e-40, 1e-38, 3e38])
def test_blocks_of_extreme_size_stay_finite_and_close(size, method):
    weight = np.linspace(-1, 1, 64, dtype=np.float64).reshape(2, 32)
    weight = (weight * size).astype(np.float32)
    packed = quantize(weight, 8, 32, method)
    assert np.isfinite(packed.scales).all()
    assert (np.abs(packed.scales) >= 2.0**-127).all()  # a step below what kernels may flush to zero
    assert np.abs(dequantize(packed).astype(np.float64) - weight).max() <= max(size / 100, 2.0**-118)


def test_the_search_helps_where_weights_are_normal():
    weight = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    errors = [((dequantize(quantize(weight, 4, 32, method)) - weight) ** 2).sum() for method in ("rtn", "clip")]
    assert errors[1] < 0.9 * errors[0]


@functools.cache
def as_python():
    """The kernel as its Python source says it, its helpers too."""
    names = dict(vars(rounding))
    for name in ("_error", "_extreme"):
        names[name] = vars(rounding)[name].py_func
    function = rounding.round_blocks.py_func
    return type(function)(function.__code__, names)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@settings(max_examples=30)
@given(
    weight=matrices(),
    bits=BITS,
    block_size=st.sampled_from([32, 64]),
    candidates=st.sampled_from([0, 1, 2, 7, rounding.CANDIDATES]),
)
def test_the_kernel_equals_its_plain_twin(compiled, weight, bits, block_size, candidates):
    weight = weight[:2, :70]
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    codes = np.full((rows, blocks * block_size), 255, np.uint8)
    scales = np.full((rows, blocks), np.nan, np.float32)
    kernel = rounding.round_blocks if compiled else as_python()
    kernel(weight, block_size, bits, candidates, codes, scales)
    expected_codes, expected_scales = naive_quantize.round_blocks(weight, block_size, bits, candidates)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(codes, expected_codes)


# --- what onnxruntime makes of it ---


def run_node(node, initializers, inputs, output_type):
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in inputs.items()
        ],
        [helper.make_tensor_value_info("out", output_type, None)],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


shapes = st.tuples(st.integers(1, 40), st.integers(1, 300))


@settings(max_examples=25)
@given(shape=shapes, bits=BITS, block_size=BLOCKS, method=METHODS, batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_onnxruntime_multiplies_by_what_we_dequantize(shape, bits, block_size, method, batch, seed):
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=shape).astype(np.float32)
    x = generator.normal(size=(batch, shape[1])).astype(np.float32)
    packed = quantize(weight, bits, block_size, method)
    expected = x @ dequantize(packed).T
    for level, tolerance in ((0, 1e-5), (4, 0.03)):  # level 4 rounds x to int8, a block at a time
        node = helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales"],
            ["out"],
            domain="com.microsoft",
            K=shape[1],
            N=shape[0],
            bits=bits,
            block_size=block_size,
            accuracy_level=level,
        )
        out = run_node(node, {"codes": packed.data, "scales": packed.scales}, {"x": x}, TensorProto.FLOAT)
        size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(dequantize(packed), axis=1)
        assert (np.abs(out - expected) <= tolerance * size + 1e-6).all()


@settings(max_examples=25)
@given(shape=shapes, bits=BITS, block_size=BLOCKS, method=METHODS, seed=st.integers(0, 99))
def test_onnxruntime_gathers_what_we_dequantize(shape, bits, block_size, method, seed):
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=shape).astype(np.float32)
    ids = generator.integers(0, shape[0], (2, 3))
    packed = quantize(weight, bits, block_size, method)
    node = helper.make_node(
        "GatherBlockQuantized",
        ["rows", "ids", "scales"],
        ["out"],
        domain="com.microsoft",
        bits=bits,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    rows = packed.data.reshape(shape[0], -1)
    out = run_node(node, {"rows": rows, "scales": packed.scales}, {"ids": ids}, TensorProto.FLOAT)
    assert np.array_equal(out[..., : shape[1]], dequantize(packed)[ids])
