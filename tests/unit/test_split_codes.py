"""Matrices of 5 and 6 bits, which a graph stores in two parts: the nodes that expand them are recognized exactly."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import numpy as np
from edgelm_export.graph.initializers import InlineInitializers
from edgelm_export.graph.matrices import add_lookup, add_matmul, store_packed
from edgelm_export.graph.nodes import GraphBuilder
from edgelm_export.quantize.pack import pack_codes
from edgelm_export.quantize.spec import QuantSpec
from kernel_graphs import assert_close, rewritten, run_both
from onnx import helper, numpy_helper

from edgelm.kernels import compiler as compiler
from edgelm.kernels.abi import SUPPORTED_FORMATS, WeightFormat

COLUMNS = 40
SPLIT = [fmt for fmt in SUPPORTED_FORMATS if fmt.high_bits]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "kernels.so"
    refused = compiler.main([str(file), *(f"{fmt.bits}:{fmt.block_size}" for fmt in SPLIT)])
    if compiler.find_host_target() is None:
        pytest.skip(refused)
    assert refused is None
    return file


def graph_of(fmt, size):
    """Return nodes and tensors of a table whose rows are gathered and that is also multiplied with x."""
    rng = np.random.default_rng(fmt.bits + size)
    blocks = -(-size // fmt.block_size)
    codes = rng.integers(0, 2**fmt.bits, (COLUMNS, blocks * fmt.block_size)).astype(np.uint8)
    scales = (rng.random((COLUMNS, blocks)) * 0.02).astype(np.float16)
    constants = InlineInitializers()
    packed = pack_codes(codes, scales, None, fmt.bits, size)
    matrix = store_packed(constants, "m", packed, QuantSpec(fmt.bits, fmt.block_size))
    nodes = GraphBuilder(constants)
    add_lookup(nodes, matrix, "ids", "rows")
    add_matmul(nodes, matrix, "x", None, "y")
    return list(nodes.nodes), {name: numpy_helper.to_array(tensor) for name, tensor in constants.tensors.items()}


@pytest.mark.parametrize("fmt", SPLIT, ids=str)
@pytest.mark.parametrize("short", [0, 10])
def test_products_and_rows_are_those_of_the_expanded_codes(library, tmp_path, fmt, short):
    size = 3 * fmt.block_size - short
    nodes, values = graph_of(fmt, size)
    rng = np.random.default_rng(0)
    feeds = {"ids": rng.integers(0, COLUMNS, (2, 5)), "x": rng.normal(size=(2, 5, size)).astype(np.float32)}
    model, ((their_rows, our_rows), products) = run_both(library, tmp_path, nodes, values, feeds, ["rows", "y"])
    operators = [node.op_type for node in model.graph.node if node.op_type != "Slice"]
    assert sorted(operators) == sorted([fmt.gather_op_type, fmt.matmul_op_type])
    np.testing.assert_array_equal(our_rows, their_rows)
    assert_close([products])
    held = sum(np.prod(tensor.dims, dtype=int) for tensor in model.graph.initializer)
    assert held <= 3, "only the bounds of the slice"


def named(nodes, name):
    return next(node for node in nodes if node.output[0] == name)


OTHERS = {
    "codes.flip.1": [0x60], "codes.mask.4": [7], "codes.mask.1": [3], "codes.shifts.4": [4, 0],
    "codes.shifts.1": [1, 0, 2, 3, 4, 5, 6, 7], "codes.shift.4": [3], "codes.shift.2": [1], "last_axis": [1],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_codes_expanded_with_other_constants_are_unchanged(tmp_path, name):
    nodes, values = graph_of(WeightFormat(5, 32), 64)
    assert values[name].tolist() != OTHERS[name]
    values[name] = np.array(OTHERS[name], values[name].dtype)
    assert rewritten(tmp_path, nodes, values, ["ids", "x"], ["rows", "y"]) == ([], None)


@pytest.mark.parametrize("what", ["direction", "operator", "part", "shape", "input", "size", "one bit"])
def test_codes_expanded_by_other_nodes_are_unchanged(tmp_path, what):
    nodes, values = graph_of(WeightFormat(5, 32), 64)
    if what == "direction":
        named(nodes, "m.codes.high.moved").attribute[0].s = b"RIGHT"
    elif what == "operator":
        named(nodes, "m.codes.joined.4").op_type = "BitwiseXor"
    elif what == "part":
        named(nodes, "m.codes.low.bytes").input[0] = "m.codes.high"
    elif what == "shape":
        values["m.codes.shape"] = np.array([COLUMNS, 1, 64])
    elif what == "input":
        values.pop("m.codes.low")
        nodes.insert(0, helper.make_node("Identity", ["other"], ["m.codes.low"]))
    elif what == "size":
        values["m.codes.high"] = np.zeros((COLUMNS, 2, 5), np.uint8)
    else:
        named(nodes, "m.codes").input[0] = "m.codes.joined.6"
    assert rewritten(tmp_path, nodes, values, ["ids", "x"], ["rows", "y"]) == ([], None)


@pytest.mark.parametrize("what", ["axis", "block", "zero points", "shape", "indices"])
def test_other_gathers_are_unchanged(tmp_path, what):
    fmt = WeightFormat(6, 32)
    nodes, values = graph_of(fmt, 64)
    gather = named(nodes, "rows")
    attributes = {attribute.name: attribute for attribute in gather.attribute}
    if what == "axis":
        attributes["gather_axis"].i = 1
    elif what == "block":
        attributes["block_size"].i = 64
    elif what == "zero points":
        gather.input.append("zeros")
        values["zeros"] = np.zeros((COLUMNS, 2), np.uint8)
    elif what == "shape":
        values["m.rows.shape"] = np.array([COLUMNS // 2, 128])
    else:
        gather.input[1] = "counted"
        nodes.insert(0, helper.make_node("Neg", ["ids"], ["counted"]))
    formats, model = rewritten(tmp_path, nodes, values, ["ids", "x"], ["rows", "y"])
    assert formats == [fmt]
    operators = [node.op_type for node in model.graph.node]
    assert "GatherBlockQuantized" in operators
    assert fmt.matmul_op_type in operators


def test_a_table_with_separate_scales_has_separate_panels(library, tmp_path):
    nodes, values = graph_of(WeightFormat(6, 32), 64)
    named(nodes, "rows").input[2] = "other"
    values["other"] = np.linspace(0.5, 1, 2 * COLUMNS).astype(np.float16).reshape(COLUMNS, 2).astype(np.float32)
    feeds = {"ids": np.arange(COLUMNS)[None], "x": np.ones((1, 1, 64), np.float32)}
    model, ((their_rows, our_rows), products) = run_both(library, tmp_path, nodes, values, feeds, ["rows", "y"])
    assert [node.op_type for node in model.graph.node] == ["LookUpInt6Block32", "MatMulInt6Block32"]
    np.testing.assert_array_equal(our_rows, their_rows)
    assert_close([products])


def test_a_table_with_float16_rows_is_unchanged(tmp_path):
    nodes, values = graph_of(WeightFormat(6, 32), 64)
    named(nodes, "rows").input[2] = "other"
    values["other"] = np.ones((COLUMNS, 2), np.float16)
    _, model = rewritten(tmp_path, nodes, values, ["ids", "x"], ["rows", "y"])
    assert "GatherBlockQuantized" in [node.op_type for node in model.graph.node]
