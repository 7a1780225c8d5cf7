"""Rewritten products and lookups, in every form of an exported graph, against numpy on the quantized weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'edgelm[cpu]'")

import onnx
import onnxruntime as ort
from edgelm_export.checkpoint.matrix_reader import LazyMatrix
from edgelm_export.graph.initializers import FileInitializers
from edgelm_export.graph.onnx_graph import OnnxGraph
from edgelm_export.optimum.requantize import OnnxQuantizer
from edgelm_export.quantize.matrix_plan import QuantPlan
from edgelm_export.quantize.pack import dequantize
from edgelm_export.quantize.spec import QuantSpec
from edgelm_export.write.matrix_store import quantize_matrix

FLOAT, INT = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
PLANS = st.sampled_from(
    [
        QuantPlan(None),
        *(QuantPlan(QuantSpec(*each, "rtn")) for each in ((8, 32, True), (4, 32, True), (4, 64, True), (4, 16, False))),
    ]
)
SIZES = st.integers(1, 70)


def value(name, kind, shape):
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def node(operator, inputs, output, **attributes):
    return onnx.helper.make_node(operator, inputs, [output], name=f"/place/{output}/{operator}", **attributes)


def rewrite(nodes, inputs, outputs, tensors, plan, feed):
    """Return (the rewritten model's outputs, its graph, the matrices it lists)."""
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "test", inputs, outputs, stored)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        # All data external, as it is for a model of more than 2 GB.
        onnx.save(model, f"{folder}/in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
        with FileInitializers(Path(folder) / "model.onnx.data") as initializers:
            quantizer = OnnxQuantizer(OnnxGraph(Path(folder) / "in.onnx"), plan, initializers)
            rewritten = quantizer.build()
        Path(folder, "model.onnx").write_bytes(rewritten.SerializeToString())
        session = ort.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, feed), rewritten.graph, quantizer.matrices


def seen_as(weight, plan):
    """The weight that a runtime computes with."""
    return weight if plan.default is None else dequantize(quantize_matrix(LazyMatrix.from_array(weight), plan.default))


def bits_of(plan):
    return 32 if plan.default is None else plan.default.bits


def signs(generator, *shape):
    """Activations of -1 and 1, which rounding to int8 does not change."""
    return generator.choice([-1.0, 1.0], shape).astype(np.float32)


@st.composite
def products(draw):
    """(nodes, tensors, weight [N, K], bias [N] or None) of one product of `x` with a constant, giving `y`."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    columns, rows = draw(SIZES), draw(SIZES)
    weight = generator.normal(0, 1, (rows, columns)).astype(np.float32)
    bias = generator.normal(0, 1, rows).astype(np.float32) if draw(st.booleans()) else None
    tensors, nodes = {"w": weight.T.copy()}, []
    if bias is not None:
        tensors["b"] = bias
    names = {}
    for name in tensors:  # exporters name equal tensors once, and reach them through Identity
        names[name] = name
        if draw(st.booleans()):
            nodes.append(node("Identity", [name], f"same_{name}"))
            names[name] = f"same_{name}"
    if draw(st.booleans()):
        alpha, beta = draw(st.sampled_from([1.0, 0.5])), draw(st.sampled_from([1.0, 2.0]))
        turned = draw(st.booleans())
        if turned:
            tensors["w"] = weight
        given = [names["b"]] if bias is not None else []
        nodes.append(node("Gemm", ["x", names["w"], *given], "y", alpha=alpha, beta=beta, transB=int(turned)))
        return nodes, tensors, weight * np.float32(alpha), None if bias is None else bias * np.float32(beta)
    nodes.append(node("MatMul", ["x", names["w"]], "y" if bias is None else "product"))
    if bias is not None:
        order = ["product", names["b"]]
        nodes.append(node("Add", order if draw(st.booleans()) else order[::-1], "y"))
    return nodes, tensors, weight, bias


@given(products(), PLANS, st.integers(1, 5), st.booleans())
def test_a_product_computes_with_the_quantized_weight(product, plan, count, shown):
    """`shown`: the product before its bias is an output of the graph and must be kept."""
    nodes, tensors, weight, bias = product
    rows, columns = weight.shape
    x = signs(np.random.default_rng(count), count, columns)
    outputs = [value("y", FLOAT, [None, rows])]
    shown = shown and any("product" in each.output for each in nodes)
    if shown:
        outputs.append(value("product", FLOAT, [None, rows]))
    got, graph, matrices = rewrite(nodes, [value("x", FLOAT, [None, columns])], outputs, tensors, plan, {"x": x})
    want = x.astype(np.float64) @ seen_as(weight, plan).T
    if shown:
        np.testing.assert_allclose(got[1], want, rtol=0, atol=1e-3)
    np.testing.assert_allclose(got[0], want if bias is None else want + bias, rtol=0, atol=1e-3)
    assert [(matrix.rows, matrix.columns, matrix.bits) for matrix in matrices] == [(rows, columns, bits_of(plan))]
    operators = [each.op_type for each in graph.node]
    if plan.default is not None:
        assert operators.count("MatMulNBits") == 1
        assert ("Add" in operators) == (bias is not None and shown)
        assert "w" not in {tensor.name for tensor in graph.initializer}


@given(SIZES, SIZES, PLANS, st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_a_tied_head_shares_the_table_and_computes_selected_rows(vocab, width, plan, tied, softened, seed):
    """Logits after elementwise nodes are computed for `rows` only, from the same bytes as the lookup."""
    generator = np.random.default_rng(seed)
    table = signs(generator, vocab, width)
    head = table if tied else signs(generator, vocab, width)
    tensors = {"table": table, "w": head.T.copy(), "line": np.array([-1], np.int64), "cap": np.float32(0.01)}
    tensors["front"] = np.array([0], np.int64)
    nodes = [
        node("Reshape", ["input_ids", "line"], "flat_ids"),
        node("Gather", ["table", "flat_ids"], "looked_up"),
        node("Sign", ["looked_up"], "x"),
        node("Unsqueeze", ["x", "front"], "hidden"),
        node("MatMul", ["hidden", "w"], "raw"),
        node("Mul", ["raw", "cap"], "scaled"),
        node("Softmax" if softened else "Tanh", ["scaled"], "logits"),
    ]
    ids = generator.integers(0, vocab, (1, 6))
    rows = np.array([5, 1], np.int64)
    inputs = [value("input_ids", INT, [1, "S"])]
    outputs = [value("logits", FLOAT, [1, "S", vocab]), value("looked_up", FLOAT, ["S", width])]
    feed = {"input_ids": ids} if softened else {"input_ids": ids, "rows": rows}
    (logits, looked_up), graph, matrices = rewrite(nodes, inputs, outputs, tensors, plan, feed)
    np.testing.assert_allclose(looked_up, seen_as(table, plan)[ids[0]], rtol=0, atol=1e-6)
    raw = 0.01 * np.sign(table[ids[0]]).astype(np.float64) @ seen_as(head, plan).T
    exponents = np.exp(raw)
    want = exponents[None] / exponents.sum(-1, keepdims=True) if softened else np.tanh(raw)[rows]
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5)
    assert [each.name for each in graph.input] == list(feed)
    equal = np.array_equal(table, head)
    assert len(matrices) == (1 if equal and not (softened and plan.default is None) else 2)


def test_a_position_table_is_unchanged():
    """Only a table that token ids look up is quantized; a position table with as many rows is not."""
    table = signs(np.random.default_rng(0), 8, 16)
    nodes = [
        node("Gather", ["places", "position_ids"], "p"),
        node("Gather", ["table", "input_ids"], "t"),
        node("Add", ["p", "t"], "y"),
    ]
    inputs = [value(name, INT, [None]) for name in ("input_ids", "position_ids")]
    feed = {"input_ids": np.array([1, 2]), "position_ids": np.array([3, 4])}
    places = np.random.default_rng(1).normal(0, 1, (8, 16)).astype(np.float32)
    tensors = {"places": places, "table": table}
    outputs = [value("y", FLOAT, [None, 16])]
    (got,), graph, matrices = rewrite(nodes, inputs, outputs, tensors, QuantPlan(QuantSpec(8, 32, True, "rtn")), feed)
    np.testing.assert_allclose(got, places[[3, 4]] + table[[1, 2]], rtol=0, atol=0.02)
    assert [matrix.name for matrix in matrices] == ["place.t"]
    assert "places" in {tensor.name for tensor in graph.initializer}
