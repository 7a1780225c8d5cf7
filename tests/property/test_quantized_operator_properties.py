"""onnxruntime's operators read the layout that we export: bits, blocks, zero points and float16 scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import onnxruntime as ort
from edgelm_export.graph.initializers import FileInitializers
from edgelm_export.graph.matrices import add_lookup, add_matmul, matrix_tensors, store_packed
from edgelm_export.graph.nodes import GraphBuilder
from edgelm_export.quantize.pack import dequantize
from edgelm_export.quantize.quantizer import Quantizer
from edgelm_export.quantize.spec import QuantSpec
from onnx import TensorProto, helper, numpy_helper

shapes = st.tuples(st.integers(1, 40), st.integers(1, 300))
specs = st.builds(
    QuantSpec,
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32, 64, 128]),
    st.booleans(),
    st.sampled_from(["rtn", "clip"]),
)
dtypes = st.sampled_from([np.float16, np.float32])


def run_node(packed, operator, inputs, **attributes):
    """Run `operator` on (x, codes, scales, zero points), with a Cast of float16 scales."""
    tensors = {"codes": packed.data, "scales": packed.scales}
    if operator == "GatherBlockQuantized":
        tensors["codes"] = packed.data.reshape(len(packed.data), -1)
    names = ["codes", "x"] if operator == "GatherBlockQuantized" else ["x", "codes"]
    if packed.zero_points is not None:
        tensors["zeros"] = packed.zero_points
    nodes = [helper.make_node("Cast", ["scales"], ["wide"], to=TensorProto.FLOAT)]
    names += ["wide", *(["zeros"] if "zeros" in tensors else [])]
    nodes.append(
        helper.make_node(
            operator,
            names,
            ["out"],
            domain="com.microsoft",
            bits=packed.bits,
            block_size=packed.block_size,
            **attributes,
        )
    )
    element = helper.np_dtype_to_tensor_dtype(inputs.dtype)
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", element, inputs.shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": inputs})[0]


@settings(max_examples=50)
@given(shape=shapes, spec=specs, dtype=dtypes, batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_onnxruntime_multiplies_with_the_weights_that_we_dequantize(shape, spec, dtype, batch, seed):
    generator = np.random.default_rng(seed)
    weight = (generator.normal(size=shape) + generator.uniform(-1, 1)).astype(np.float32)
    x = generator.normal(size=(batch, shape[1])).astype(np.float32)
    packed = Quantizer(spec, scale_dtype=dtype).quantize(weight)
    assert packed.scales.dtype == dtype
    expected = x @ dequantize(packed).T
    for level, tolerance in ((0, 1e-5), (4, 0.03)):  # level 4 rounds x to int8, a block at a time
        out = run_node(packed, "MatMulNBits", x, K=shape[1], N=shape[0], accuracy_level=level)
        size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(dequantize(packed), axis=1)
        assert (np.abs(out - expected) <= tolerance * size + 1e-6).all()


@settings(max_examples=50)
@given(shape=shapes, spec=specs, dtype=dtypes, seed=st.integers(0, 99))
def test_onnxruntime_gathers_the_rows_that_we_dequantize(shape, spec, dtype, seed):
    generator = np.random.default_rng(seed)
    weight = (generator.normal(size=shape) + generator.uniform(-1, 1)).astype(np.float32)
    ids = generator.integers(0, shape[0], (2, 3))
    packed = Quantizer(spec, scale_dtype=dtype).quantize(weight)
    out = run_node(packed, "GatherBlockQuantized", ids, gather_axis=0, quantize_axis=1)
    assert np.array_equal(out[..., : shape[1]], dequantize(packed)[ids])


@settings(max_examples=30)
@given(
    shape=shapes,
    spec=st.builds(
        QuantSpec, st.sampled_from([4, 5, 6, 8]), st.sampled_from([32, 64, 128]), st.just(True), st.just("clip")
    ),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_a_graph_multiplies_and_gathers_the_stored_weights(shape, spec, dtype, seed, tmp_path_factory):
    """Codes of 5 and 6 bits are expanded by nodes that onnxruntime computes once."""
    folder = tmp_path_factory.mktemp("graph")
    generator = np.random.default_rng(seed)
    weight = (generator.normal(size=shape) + generator.uniform(-1, 1)).astype(np.float32)
    x, ids = generator.normal(size=(3, shape[1])).astype(np.float32), generator.integers(0, shape[0], (2, 3))
    packed = Quantizer(spec, scale_dtype=dtype).quantize(weight)
    with FileInitializers(folder / "model.onnx.data") as initializers:
        matrix = store_packed(initializers, "one", packed, spec)
        nodes = GraphBuilder(initializers)
        add_matmul(nodes, matrix, "x", None, "product")
        add_lookup(nodes, matrix, "ids", "rows")
    assert matrix.bytes() == packed.data.nbytes + packed.scales.nbytes + (
        0 if packed.high_bits is None else packed.high_bits.nbytes
    )
    assert {name: tuple(initializers.tensors[name].dims) for name, _, _ in matrix_tensors(matrix)} == {
        name: wanted for name, _, wanted in matrix_tensors(matrix)
    }
    value = helper.make_tensor_value_info
    model = nodes.build_model(
        "one",
        [value("x", TensorProto.FLOAT, x.shape), value("ids", TensorProto.INT64, ids.shape)],
        [value(name, TensorProto.FLOAT, None) for name in ("product", "rows")],
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    product, rows = session.run(None, {"x": x, "ids": ids})
    assert np.array_equal(rows, dequantize(packed)[ids])
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(dequantize(packed), axis=1)
    assert (np.abs(product - x @ dequantize(packed).T) <= 0.03 * size + 1e-6).all()
