"""ONNX models read and written at run time, compared with the onnx package."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgelm.graph.onnx_model import (
    FLOAT,
    add_metadata,
    change_attribute,
    encode_model,
    encode_node,
    encode_tensor,
    read_model,
)

names = st.text("abc.é_0", min_size=1, max_size=8)
numbers = st.integers(-(2**63), 2**63 - 1)
nodes = st.builds(
    lambda inputs, outputs, number, real: helper.make_node(
        "Thing", inputs, outputs, domain="com.x", number=number, real=real, text="t", several=[1, 2]
    ),
    st.lists(st.one_of(names, st.just("")), max_size=3),
    st.lists(names, min_size=1, max_size=3),
    numbers,
    st.floats(width=32, allow_nan=False),
)
arrays = st.builds(
    lambda shape, dtype: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([np.float32, np.float16, np.uint8, np.int64]),
)


@st.composite
def models(draw):
    values = {f"t{i}": array for i, array in enumerate(draw(st.lists(arrays, max_size=3)))}
    tensors = [numpy_helper.from_array(array, name) for name, array in values.items()]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        draw(st.lists(nodes, max_size=4)), "g", [info("x", 1, ["n"])], [info("y", 1, ["n", 2])], tensors
    )
    return helper.make_model(graph, producer_name="edgelm"), values


@given(models())
def test_a_model_is_read_as_onnx_reads_it(given_model):
    model, values = given_model
    read = read_model(model.SerializeToString())
    assert read.outputs.keys() == {"y"}
    for found, expected in zip(read.nodes, model.graph.node, strict=True):
        assert (found.op_type, list(found.inputs)) == (expected.op_type, list(expected.input))
        assert list(found.outputs) == list(expected.output)
        plain = {attribute.name: attribute for attribute in expected.attribute}
        assert found.attributes == {"number": plain["number"].i, "real": plain["real"].f}
    for name, array in values.items():
        tensor = read.tensors[name]
        assert (tensor.shape, tensor.external_range) == (array.shape, None)
        assert tensor.raw == array.tobytes()


@given(models(), numbers)
def test_a_model_is_written_unchanged_except_for_additions(given_model, number):
    model, _ = given_model
    read = read_model(model.SerializeToString())
    same_tensors = [tensor.encoded for tensor in read.tensors.values()]
    added = encode_node("é", "Other", "edgelm", ["a", "b"], ["c"], {"K": 2**40, "NORM": -1, "N": number})
    outside = encode_tensor("far", [2, 3], FLOAT, "data", 128, 24)
    nodes = [*(node.encoded for node in read.nodes), added]
    found = onnx.ModelProto.FromString(encode_model(read, nodes, [*same_tensors, outside], "edgelm"))
    kind = {"K": 2**40, "NORM": -1, "N": number}
    node = helper.make_node("Other", ["a", "b"], ["c"], "é", domain="edgelm", **kind)
    del node.attribute[:]  # make_node sorts them
    node.attribute.extend(helper.make_attribute(name, value) for name, value in kind.items())
    model.graph.node.append(node)
    model.opset_import.append(helper.make_opsetid("edgelm", 1))
    tensor = TensorProto(name="far", dims=[2, 3], data_type=1, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "data"), ("offset", "128"), ("length", "24")):
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    assert found == model
    again = read_model(found.SerializeToString())
    assert again.tensors["far"].external_range == slice(128, 152)
    assert again.nodes[-1].attributes == kind


@given(models(), numbers)
def test_an_attribute_is_changed_in_every_node(given_model, number):
    model, _ = given_model
    model.functions.add(name="kept as it is")
    changed = onnx.ModelProto.FromString(change_attribute(model.SerializeToString(), "number", lambda _: number))
    for node in model.graph.node:
        next(attribute for attribute in node.attribute if attribute.name == "number").i = number
    assert changed == model
    same = model.SerializeToString()
    assert change_attribute(same, "absent", lambda _: number) == same


def test_metadata_is_added():
    model = helper.make_model(helper.make_graph([], "g", [], []))
    helper.set_model_props(model, {"first": "é"})
    found = onnx.ModelProto.FromString(add_metadata(model.SerializeToString(), "key", "1"))
    assert {entry.key: entry.value for entry in found.metadata_props} == {"first": "é", "key": "1"}
    assert found.graph == model.graph


@pytest.mark.parametrize("levels", [50, 3_000])
def test_deeply_nested_graphs_are_refused(levels):
    """Protobuf itself has a limit."""
    graph = b""
    for _ in range(levels):
        for key in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            size = len(graph)
            graph = key + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + graph
    size = len(graph)
    with pytest.raises(ValueError, match="not an ONNX model"):
        read_model(b"\x3a" + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + graph)


def test_a_string_that_is_not_utf8_is_refused():
    graph = b"\x0a\x03\x22\x01\xff"  # a node whose op_type is one byte
    with pytest.raises(ValueError, match="not an ONNX model"):
        read_model(b"\x3a" + bytes([len(graph)]) + graph)


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(data):
    try:
        read_model(data)
    except ValueError:
        return


def test_a_packed_shape_is_read():
    tensor = onnx.TensorProto(name="t", data_type=1)
    entry = tensor.SerializeToString() + b"\x0a\x03\x80\x01\x05"  # dims [128, 5] in one field
    graph = b"\x2a" + bytes([len(entry)]) + entry
    read = read_model(b"\x3a" + bytes([len(graph)]) + graph)
    assert read.tensors["t"].shape == (128, 5)
