"""Which attention nodes of a graph are replaced by ours, and which stay onnxruntime's."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgelm.graph.onnx_model import read_model
from edgelm.kernels.rewrite.attention_lowering import lower_attention

SIZE = 64
INPUTS = ("packed", "", "", "past.0.key", "past.0.value", "seqlens_k", "total_sequence_length", "cos", "sin")


def found(inputs=INPUTS, *, size=SIZE, cache=TensorProto.FLOAT, table=True, **attributes):
    """Return what replaces a model's only node; None if it stays."""
    given = {"num_heads": 6, "kv_num_heads": 2, "do_rotary": 1, "rotary_interleaved": 0, "scale": 0.5} | attributes
    node = helper.make_node(
        "GroupQueryAttention", inputs, ["y", "present.0.key", "present.0.value"], domain="com.microsoft", **given
    )
    past = [
        helper.make_tensor_value_info(f"past.0.{part}", cache, ["batch", 2, "capacity", size])
        for part in ("key", "value")
    ]
    tables = [numpy_helper.from_array(np.ones((9, 24), np.float32), name) for name in ("cos", "sin")]
    model = helper.make_model(helper.make_graph([node], "g", past, [], tables if table else []))
    read = read_model(model.SerializeToString())
    result = lower_attention(read, read.nodes[0])
    if result is None:
        return None
    made = onnx.NodeProto.FromString(result[0])
    assert result[1] == [name for name in made.input if name]
    return made


def numbers(node):
    return {attribute.name: attribute.i for attribute in node.attribute}


def bits(value):
    return int(np.float32(value).view(np.int32))


def test_attention_is_replaced():
    node = found()
    assert (node.domain, node.op_type, node.name) == ("edgelm", "Attention", "y")
    assert list(node.input) == ["packed", "", "", "past.0.key", "past.0.value", "seqlens_k", "cos", "sin"]
    assert list(node.output) == ["y", "present.0.key", "present.0.value", "y.scratch"]
    plain = {"HEADS": 6, "KV_HEADS": 2, "HALF": 24, "WINDOW": 0, "SCALE": bits(0.5), "SOFTCAP": 0}
    assert numbers(node) == plain
    assert numbers(found(scale=0.0)) == plain | {"SCALE": bits(0.125)}
    assert numbers(found(local_window_size=7, softcap=30.0)) == plain | {"WINDOW": 7, "SOFTCAP": bits(30)}
    assert numbers(found(local_window_size=-1)) == plain


def test_positions_and_separate_projections_are_passed_on():
    node = found(("q", "k", "v", *INPUTS[3:], "positions"))
    assert list(node.input) == ["q", "k", "v", "past.0.key", "past.0.value", "seqlens_k", "cos", "sin", "positions"]
    node = found(INPUTS[:7], do_rotary=0)
    assert list(node.input) == list(INPUTS[:6])
    assert numbers(node)["HALF"] == 0


@pytest.mark.parametrize(
    "other",
    [
        {"size": 40}, {"size": 272}, {"cache": TensorProto.INT8}, {"cache": TensorProto.FLOAT16}, {"table": False},
        {"rotary_interleaved": 1}, {"num_heads": 66}, {"smooth_softmax": 1}, {"kv_cache_bit_width": 8},
        {"inputs": (*INPUTS, "positions", "bias")}, {"inputs": ("packed", "k", *INPUTS[2:])},
        {"inputs": ("packed", "", "", "computed", *INPUTS[4:])},
    ],
    ids=str,
)  # fmt: skip
def test_unsupported_attention_stays(other):
    assert found(**other) is None
