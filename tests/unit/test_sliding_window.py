"""Changing sliding windows in an encoded model, compared with the onnx package."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import onnx

from edgelm.runtime.sliding_window import has_windows, shrink_sliding_windows

WINDOWS = st.lists(st.one_of(st.none(), st.integers(1, 2**31)), max_size=4)


def model_with(windows):
    nodes = [onnx.helper.make_node("Relu", ["x"], ["y0"], name="local_window_size", doc_string="\x08\x01")]
    for i, window in enumerate(windows):
        given = {} if window is None else {"local_window_size": window}
        nodes.append(
            onnx.helper.make_node(
                "GroupQueryAttention", [f"y{i}"], [f"y{i + 1}"], domain="com.microsoft", num_heads=3, scale=0.5, **given
            )
        )
    value = onnx.helper.make_tensor_value_info
    tensor = onnx.helper.make_tensor("local_window_size", onnx.TensorProto.INT64, [2], [7, 2**40])
    graph = onnx.helper.make_graph(
        nodes, "local_window_size", [value("x", 1, ["n"])], [value(f"y{len(windows)}", 1, ["n"])], [tensor]
    )
    return onnx.helper.make_model(graph, producer_name="edgelm")


@given(WINDOWS)
def test_only_windows_change_by_one(windows):
    model = model_with(windows)
    found = onnx.ModelProto.FromString(shrink_sliding_windows(model.SerializeToString()))
    expected = model_with([None if window is None else window - 1 for window in windows])
    assert found == expected
    assert has_windows(model.SerializeToString())


@given(st.binary(max_size=60))
def test_data_that_is_not_a_model_is_refused_or_unchanged(data):
    try:
        changed = shrink_sliding_windows(data)
    except ValueError:
        return
    assert len(changed) == len(data) or b"local_window_size" in data


def test_a_model_cut_short_is_refused():
    data = model_with([5]).SerializeToString()
    for end in (1, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="ONNX"):
            shrink_sliding_windows(data[:end])
