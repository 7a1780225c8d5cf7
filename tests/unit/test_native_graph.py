"""What of a graph is replaced by operators of our own, and what is left alone."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgelm.native.formats import Format
from edgelm.native.graph import GRAPH, write_panels

SIZE, COLUMNS, BLOCK = 64, 20, 32


def tensors(**more):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (COLUMNS, SIZE // BLOCK, BLOCK // 2), np.uint8)
    scales = rng.normal(size=(COLUMNS, SIZE // BLOCK)).astype(np.float16)
    return {"codes": codes, "scales16": scales, **more}


def swiglu(*, alpha=1.0, axis=-1, order=("active", "value")):
    return [
        helper.make_node("Split", ["x"], ["gate", "value"], axis=axis, num_outputs=2),
        helper.make_node("QuickGelu", ["gate"], ["active"], domain="com.microsoft", alpha=alpha),
        helper.make_node("Mul", order, ["gated"]),
    ]


def product(x="x", inputs=(), *, block=BLOCK, accuracy=4):
    return [
        helper.make_node("Cast", ["scales16"], ["scales"], to=TensorProto.FLOAT),
        helper.make_node(
            "MatMulNBits", [x, "codes", "scales", *inputs], ["y"], domain="com.microsoft",
            K=SIZE, N=COLUMNS, bits=4, block_size=block, accuracy_level=accuracy,
        ),
    ]  # fmt: skip


def rewritten(folder, nodes, values, output="y"):
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", 1, None)], [info(output, 1, None)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    formats = write_panels(model.SerializeToString(), folder / "absent", folder)
    return formats, onnx.load(folder / GRAPH, load_external_data=False) if formats else None


def test_a_product_and_the_swiglu_before_it_are_one_node(tmp_path):
    formats, model = rewritten(tmp_path, [*swiglu(), *product("gated")], tensors())
    assert formats == [Format(4, 32)]
    (node,) = model.graph.node
    assert (node.domain, node.op_type, node.input[0]) == ("edgelm", "MatMulInt4Block32", "x")
    assert {attribute.name: attribute.i for attribute in node.attribute} == {"K": SIZE, "N": COLUMNS, "GATED": 1}
    assert {tensor.name for tensor in model.graph.initializer} == set(node.input[1:])


@pytest.mark.parametrize(
    "other", [{"alpha": 1.702}, {"axis": 1}, {"order": ("value", "active")}, {"order": ("active", "active")}], ids=str
)
def test_what_is_no_swiglu_stays_before_the_product(tmp_path, other):
    _, model = rewritten(tmp_path, [*swiglu(**other), *product("gated")], tensors())
    *before, node = model.graph.node
    assert [each.op_type for each in before] == ["Split", "QuickGelu", "Mul"]
    assert node.op_type == "MatMulInt4Block32"
    assert node.input[0] == "gated"
    assert next(attribute.i for attribute in node.attribute if attribute.name == "GATED") == 0


def test_gated_values_stay_where_something_else_needs_them(tmp_path):
    further = helper.make_node("Add", ["y", "gated"], ["z"])
    nodes = rewritten(tmp_path, [*swiglu(), *product("gated"), further], tensors(), output="z")[1].graph.node
    assert [node.op_type for node in nodes] == ["Split", "QuickGelu", "Mul", "MatMulInt4Block32", "Add"]


def test_what_nothing_needs_is_dropped(tmp_path):
    further = helper.make_node("Add", ["x", "x"], ["z"])
    nodes = rewritten(tmp_path, [*product(), further], tensors())[1].graph.node
    assert [node.op_type for node in nodes] == ["MatMulInt4Block32"]


@pytest.mark.parametrize("what", ["zero points", "accuracy", "block"])
def test_products_of_other_kinds_are_left_alone(tmp_path, what):
    values = tensors()
    inputs = []
    if what == "zero points":
        values["zeros"], inputs = np.zeros(COLUMNS, np.uint8), ["zeros"]
    nodes = product(inputs=inputs, accuracy=0 if what == "accuracy" else 4, block=256 if what == "block" else BLOCK)
    assert rewritten(tmp_path, nodes, values) == ([], None)
    assert not list(tmp_path.iterdir())


def test_scales_that_float16_cannot_hold_are_left_alone(tmp_path):
    values = tensors()
    values["scales"] = values.pop("scales16").astype(np.float32) + np.float32(1e-6)
    assert rewritten(tmp_path, product()[1:], values) == ([], None)
    assert not list(tmp_path.iterdir())
