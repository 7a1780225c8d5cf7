"""Which nodes of a graph are replaced by our operators, and which are left unchanged."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import numpy as np
from kernel_graphs import BLOCK, attributes, matrix, product, rewritten, stored
from onnx import helper

from edgelm.kernels.abi import WeightFormat
from edgelm.kernels.rewrite.panel_layout import pack_codes, pack_scales, pad_bias

SIZE, COLUMNS = 70, 40
"""With these the last block and the last panel are short, and the scales do not fill whole cache lines."""


def swiglu(*, alpha=1.0, axis=-1, order=("active", "value")):
    return [
        helper.make_node("Split", ["x"], ["gate", "value"], axis=axis, num_outputs=2),
        helper.make_node("QuickGelu", ["gate"], ["active"], domain="com.microsoft", alpha=alpha),
        helper.make_node("Mul", order, ["gated"]),
    ]


def one(x="x", inputs=(), **kind):
    return product("m", x, "y", SIZE, COLUMNS, inputs, **kind)


def tensors(**more):
    return {**matrix("m", SIZE, COLUMNS), **more}


def test_a_product_becomes_one_node_with_its_matrix_in_the_data_file(tmp_path):
    values = tensors(bias=np.arange(COLUMNS, dtype=np.float32))
    formats, model = rewritten(tmp_path, one(inputs=["", "", "bias"]), values)
    assert formats == [WeightFormat(4, BLOCK)]
    (node,) = model.graph.node
    assert (node.domain, node.op_type, node.name, list(node.input)) == ("edgelm", "MatMulInt4Block32", "y", ["x"])
    assert len(node.output) == 2
    assert node.output[0] == "y"
    assert list(model.graph.initializer) == []
    for name, expected in (
        ("WEIGHTS", pack_codes(values["m.codes"], 4)),
        ("SCALES", pack_scales(values["m.scales16"])),
        ("BIAS", pad_bias(values["bias"])),
    ):
        np.testing.assert_array_equal(stored(tmp_path, node, name, expected), expected)
    rest = {name: value for name, value in attributes(node).items() if name not in ("WEIGHTS", "SCALES", "BIAS")}
    assert rest == {"K": SIZE, "N": COLUMNS, "GATED": 0, "NORM": -1, "EPSILON": 0}


def test_a_matrix_of_many_panels_is_packed_completely(tmp_path):
    columns = 16 * 64 + 21
    values = matrix("m", SIZE, columns)
    (node,) = rewritten(tmp_path, product("m", "x", "y", SIZE, columns), values)[1].graph.node
    expected = pack_codes(values["m.codes"], 4)
    np.testing.assert_array_equal(stored(tmp_path, node, "WEIGHTS", expected), expected)


def test_products_with_the_same_matrix_share_it(tmp_path):
    again = product("m", "z", "y2", SIZE, COLUMNS)[1:]
    formats, model = rewritten(tmp_path, [*one(), *again], tensors(), ["x", "z"], ["y", "y2"])
    first, second = model.graph.node
    assert attributes(first) == attributes(second)
    assert formats == [WeightFormat(4, BLOCK)]


def test_tensors_that_other_nodes_read_are_kept(tmp_path):
    further = helper.make_node("Add", ["x", "weight"], ["z"])
    _, model = rewritten(tmp_path, [further, *one("z")], tensors(weight=np.ones(SIZE, np.float32)))
    assert [node.op_type for node in model.graph.node] == ["Add", "MatMulInt4Block32"]
    assert [tensor.name for tensor in model.graph.initializer] == ["weight"]


def test_a_product_and_the_swiglu_before_it_become_one_node(tmp_path):
    formats, model = rewritten(tmp_path, [*swiglu(), *one("gated")], tensors())
    assert formats == [WeightFormat(4, BLOCK)]
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), attributes(node)["GATED"]) == ("MatMulInt4Block32", ["x"], 1)


@pytest.mark.parametrize(
    "other", [{"alpha": 1.702}, {"axis": 1}, {"order": ("value", "active")}, {"order": ("active", "active")}], ids=str
)
def test_other_gates_stay_before_the_product(tmp_path, other):
    _, model = rewritten(tmp_path, [*swiglu(**other), *one("gated")], tensors())
    *before, node = model.graph.node
    assert [each.op_type for each in before] == ["Split", "QuickGelu", "Mul"]
    assert (node.op_type, list(node.input), attributes(node)["GATED"]) == ("MatMulInt4Block32", ["gated"], 0)


def test_a_swiglu_with_another_reader_stays(tmp_path):
    further = helper.make_node("Add", ["y", "gated"], ["z"])
    _, model = rewritten(tmp_path, [*swiglu(), *one("gated"), further], tensors(), outputs=["z"])
    assert [node.op_type for node in model.graph.node] == ["Split", "QuickGelu", "Mul", "MatMulInt4Block32", "Add"]


def test_unused_nodes_are_dropped(tmp_path):
    further = helper.make_node("Add", ["x", "x"], ["z"])
    nodes = rewritten(tmp_path, [*one(), further], tensors())[1].graph.node
    assert [node.op_type for node in nodes] == ["MatMulInt4Block32"]


@pytest.mark.parametrize("what", ["zero points", "accuracy", "block"])
def test_unsupported_products_are_unchanged(tmp_path, what):
    values = tensors()
    inputs = []
    if what == "zero points":
        values["zeros"], inputs = np.zeros(COLUMNS, np.uint8), ["zeros"]
    nodes = one(inputs=inputs, accuracy=0 if what == "accuracy" else 4, block=256 if what == "block" else BLOCK)
    assert rewritten(tmp_path, nodes, values) == ([], None)
    assert not list(tmp_path.iterdir())


def test_products_with_scales_that_are_not_float16_are_unchanged(tmp_path):
    values = tensors()
    values["m.scales"] = values.pop("m.scales16").astype(np.float32) + np.float32(1e-6)
    assert rewritten(tmp_path, one()[1:], values) == ([], None)
    assert not list(tmp_path.iterdir())
