"""Rows of a growing cache against lists of tokens, on a graph whose logits depend on every past token and position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.bundle.manifest import KVCacheShape, Manifest
from edgelm.runtime.dynamic_runner import DynamicRunner

ort = pytest.importorskip("onnxruntime", reason="needs pip install 'edgelm[cpu]'")
onnx = pytest.importorskip("onnx", reason="building the graph needs pip install 'edgelm[export]'")

VOCAB, SIZE, ROWS, CONTEXT = 7, 3, 4, 24
TABLE = np.random.default_rng(0).integers(-9, 9, (VOCAB, SIZE)).astype(np.float32)


def running_sums(chosen: bool) -> bytes:
    """A model: logits[t] = sums of keys and of values over positions 0 .. t, times mask and position of t; integers."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    constants = {
        "tables": np.stack([TABLE, 2 * TABLE]),  # [2, V, D]: keys and values
        "two": np.array([2], np.int64),
        "wide": np.array([1, -1, 2 * SIZE], np.int64),
        "flat": np.array([-1, 2 * SIZE], np.int64),
        "line": np.array([-1], np.int64),
        "axis": np.array(2, np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["tables", "input_ids"], ["both"], axis=1),  # [2, 1, S, D]
        node("Split", ["both"], ["key", "value"], axis=0, num_outputs=2),
        node("Concat", ["past_key_values.0.key", "key"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "value"], ["present.0.value"], axis=2),
        node("CumSum", ["present.0.key", "axis"], ["keys"]),
        node("CumSum", ["present.0.value", "axis"], ["values"]),
        node("Concat", ["keys", "values"], ["sums"], axis=-1),
        node("Reshape", ["sums", "wide"], ["wide_sums"]),
        node("Reshape", ["position_ids", "line"], ["places"]),
        node("Gather", ["wide_sums", "places"], ["own"], axis=1),  # [1, S, 2 D]
        node("Gather", ["attention_mask", "places"], ["seen"], axis=1),
        node("Mul", ["seen", "position_ids"], ["weight"]),
        node("Cast", ["weight"], ["number"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["number", "two"], ["numbers"]),
        node("Mul", ["own", "numbers"], ["everywhere" if chosen else "logits"]),
    ]
    inputs = [
        value("input_ids", TensorProto.INT64, [1, "S"]),
        value("attention_mask", TensorProto.INT64, [1, "T"]),
        value("position_ids", TensorProto.INT64, [1, "S"]),
        *(value(f"past_key_values.0.{part}", TensorProto.FLOAT, [1, 1, "P", SIZE]) for part in ("key", "value")),
    ]
    logits = value("logits", TensorProto.FLOAT, [1, "S", 2 * SIZE])
    if chosen:
        nodes += [
            node("Reshape", ["everywhere", "flat"], ["flat_logits"]),
            node("Gather", ["flat_logits", "rows"], ["logits"], axis=0),
        ]
        inputs.append(value("rows", TensorProto.INT64, ["R"]))
        logits = value("logits", TensorProto.FLOAT, ["R", 2 * SIZE])
    present = [value(f"present.0.{part}", TensorProto.FLOAT, [1, 1, "T", SIZE]) for part in ("key", "value")]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "sums", inputs, [logits, *present], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def expected(tokens: list[int]) -> np.ndarray:
    """The same with a loop. float32 [n, 2 D]."""
    result, keys = [], np.zeros(SIZE, np.float32)
    for place, token in enumerate(tokens):
        keys = keys + TABLE[token]
        result.append(np.concatenate([keys, 2 * keys]) * place)
    return np.array(result)


@pytest.fixture(scope="module", params=[True, False], ids=["chosen rows", "every position"])
def runner(request):
    manifest = Manifest(
        architecture="sums",
        context=CONTEXT,
        vocab_size=2 * SIZE,
        cache=KVCacheShape("growing", 1, 1, SIZE),
        quant="fp32",
        matrices=(),
        bos_token=None,
        eos_tokens=(),
        parameters=0,
        shapes={},
    )
    graph = ort.InferenceSession(running_sums(request.param), providers=["CPUExecutionProvider"])
    return DynamicRunner(graph, manifest, ROWS, CONTEXT)


def tokens_of(least, most):
    return st.lists(st.integers(0, VOCAB - 1), min_size=least, max_size=most)


def prefill(runner, held, row, tokens, start, all_logits):
    held[row] = held[row][:start] + tokens
    logits = runner.prefill(row, np.array(tokens, np.int64), start, all_logits=all_logits)
    np.testing.assert_array_equal(logits, expected(held[row])[start:] if all_logits else expected(held[row])[-1:])


@given(st.data())
def test_rows_are_lists_of_tokens(runner, data):
    """Prefill from anywhere in a row, decode, move and cut rows, in any order."""
    held = [[] for _ in range(ROWS)]
    for row in range(ROWS):
        prefill(runner, held, row, data.draw(tokens_of(1, 4)), 0, all_logits=False)
    for _ in range(data.draw(st.integers(1, 6))):
        row = data.draw(st.integers(0, ROWS - 1))
        action = data.draw(st.sampled_from(["prefill", "decode", "copy", "begin"]))
        if action == "prefill":
            start = data.draw(st.integers(0, len(held[row])))
            prefill(runner, held, row, data.draw(tokens_of(1, 5)), start, data.draw(st.booleans()))
        elif action == "decode":
            batch = data.draw(tokens_of(1, ROWS))
            lengths = np.array([len(held[i]) for i in range(len(batch))], np.int32)
            logits = runner.decode(np.array(batch, np.int64), lengths)
            for i, token in enumerate(batch):
                held[i].append(token)
                np.testing.assert_array_equal(logits[i], expected(held[i])[-1])
        elif action == "begin":
            target, ends = data.draw(st.integers(0, ROWS - 1)), data.draw(st.lists(st.integers(1, 5), max_size=4))
            ends = sorted({min(end, len(held[row])) for end in ends} - {0})
            if ends:
                pieces = [runner.read_row(row, start, end) for start, end in zip([0, *ends], ends, strict=False)]
                runner.write_row(target, pieces)
                held[target] = held[row][: ends[-1]]
        else:
            target, length = data.draw(st.integers(0, ROWS - 1)), data.draw(st.integers(0, len(held[row])))
            runner.copy_row(row, target, length)
            held[target] = held[row][:length]
    for row in range(ROWS):
        prefill(runner, held, row, [1], len(held[row]), all_logits=True)


@given(tokens_of(1, CONTEXT), st.data())
def test_logits_do_not_depend_on_the_division_into_chunks(runner, tokens, data):
    ends = sorted({*data.draw(st.lists(st.integers(1, len(tokens)), max_size=4)), len(tokens)})
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        parts.append(np.array(runner.prefill(0, np.array(tokens[start:end], np.int64), start, all_logits=True)))
    np.testing.assert_array_equal(np.concatenate(parts), expected(tokens))


def test_a_row_cannot_be_read_beyond_its_length(runner):
    runner.prefill(0, np.array([1, 2], np.int64), 0)
    with pytest.raises(AssertionError):
        runner.prefill(0, np.array([1], np.int64), 3)
