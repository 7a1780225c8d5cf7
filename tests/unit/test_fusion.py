"""Which nodes around a product are fused into it, that the graph computes the same, and which nodes stay."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import numpy as np
from kernel_graphs import BLOCK, assert_close, attributes, matrix, product, rewritten, run_both, stored
from onnx import helper

from edgelm.kernels import compiler as compiler

IN, SIZE, OUT = 96, 40, 20
OURS = "MatMulInt4Block32"
NORM, SKIP_NORM = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"
EPSILON = 0.25


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "kernels.so"
    refused = compiler.main([str(file), f"4:{BLOCK}"])
    if compiler.find_host_target() is None:
        pytest.skip(refused)
    assert refused is None
    return file


def tensors(**more):
    """Matrices IN x SIZE, SIZE x SIZE and SIZE x OUT, and the weights of two normalizations."""
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=SIZE).astype(np.float32) for name in ("weight", "weight2")}
    return matrix("first", IN, SIZE) | matrix("middle", SIZE, SIZE) | matrix("last", SIZE, OUT) | weights | more


def feeds(**sizes):
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=(2, 5, size)).astype(np.float32) for name, size in sizes.items()}


FEEDS = feeds(x=IN, stream=SIZE)
BEGUN = feeds(x=IN, begun=SIZE)
STREAM = helper.make_node("Neg", ["begun"], ["stream"])
"""A node computes the value that is added: a graph input could have another shape and be broadcast."""


def first(y="a"):
    return product("first", "x", y, IN, SIZE)


def last(x="normed"):
    return product("last", x, "y", SIZE, OUT)


def skip_norm(one="a", other="stream", outputs=("normed", "", "", "sum"), more=()):
    kind = {"domain": "com.microsoft", "epsilon": EPSILON}
    return [helper.make_node(SKIP_NORM, [one, other, "weight", *more], outputs, **kind)]


def norm(x="stream", axis=-1):
    return [helper.make_node(NORM, [x, "weight"], ["normed"], axis=axis, epsilon=EPSILON)]


def operators(model):
    return [node.op_type for node in model.graph.node]


def assert_normed(folder, node, weight):
    """Check a node's norm: zeros fill up the last block of its weight."""
    padded = np.concatenate([weight, np.zeros(-len(weight) % BLOCK, np.float32)])
    np.testing.assert_array_equal(stored(folder, node, "NORM", padded), padded)
    assert attributes(node)["EPSILON"] == int(np.float32(EPSILON).view(np.int32))


@pytest.mark.parametrize("order", [("a", "stream"), ("stream", "a")], ids=str)
def test_addition_and_norm_between_products_are_fused_into_both(library, tmp_path, order):
    nodes, values = [STREAM, *first(), *skip_norm(*order), *last()], tensors()
    model, pairs = run_both(library, tmp_path, nodes, values, BEGUN, ["y", "sum"])
    _, one, other = model.graph.node
    assert (one.op_type, list(one.input), one.output[0], one.name) == (OURS, ["x", "stream"], "sum", "a")
    assert (other.op_type, list(other.input), other.output[0], other.name) == (OURS, ["sum"], "y", "y")
    assert attributes(one)["NORM"] == -1
    assert_normed(tmp_path, other, values["weight"])
    assert list(model.graph.initializer) == []
    assert_close(pairs)


def test_a_norm_without_the_sum_as_output_is_fused(library, tmp_path):
    nodes = [STREAM, *first(), *skip_norm(outputs=["normed"]), *last()]
    model, pairs = run_both(library, tmp_path, nodes, tensors(), BEGUN)
    _, one, other = model.graph.node
    assert (one.op_type, other.op_type, list(one.input)) == (OURS, OURS, ["x", "stream"])
    assert list(other.input) == [one.output[0]]
    assert_close(pairs)


def test_a_norm_in_front_of_a_product_is_fused_into_it(library, tmp_path):
    values = tensors()
    model, pairs = run_both(library, tmp_path, [*norm(), *last()], values, feeds(stream=SIZE))
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), node.output[0]) == (OURS, ["stream"], "y")
    assert_normed(tmp_path, node, values["weight"])
    assert_close(pairs)


def test_the_stream_passes_from_product_to_product(library, tmp_path):
    """The product in the middle has both a norm in front of it and an addition after it."""
    second = {"domain": "com.microsoft", "epsilon": 1e-6}
    nodes = [
        STREAM, *first(), *skip_norm(), *product("middle", "normed", "b", SIZE, SIZE),
        helper.make_node(SKIP_NORM, ["b", "sum", "weight2"], ["normed2", "", "", "sum2"], **second), *last("normed2"),
    ]  # fmt: skip
    model, pairs = run_both(library, tmp_path, nodes, tensors(), BEGUN, ["y", "sum2"])
    assert [(node.op_type, list(node.input), node.output[0]) for node in model.graph.node][1:] == [
        (OURS, ["x", "stream"], "sum"),
        (OURS, ["sum", "sum"], "sum2"),
        (OURS, ["sum2"], "y"),
    ]
    assert_close(pairs)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")], ids=str)
def test_the_later_of_two_products_adds_the_other(library, tmp_path, order):
    nodes = [*first(), *product("middle", "stream", "b", SIZE, SIZE), *skip_norm(*order), *last()]
    model, pairs = run_both(library, tmp_path, nodes, tensors(), FEEDS, ["y", "sum"])
    assert [list(node.input) for node in model.graph.node] == [["x"], ["stream", "a"], ["sum"]]
    assert_close(pairs)


def test_a_sum_is_kept_if_the_product_after_it_is_dropped(library, tmp_path):
    nodes = [STREAM, *first(), *skip_norm(), *last()]
    model, pairs = run_both(library, tmp_path, nodes, tensors(), BEGUN, ["sum"])
    assert [(node.op_type, node.output[0]) for node in model.graph.node][1:] == [(OURS, "sum")]
    assert_close(pairs)


ADD = helper.make_node("Add", ["normed", "normed"], ["z"])
LATER = helper.make_node("Relu", ["stream"], ["later"])
NOT_FUSED = {
    "normed is read twice": ([*first(), *skip_norm(), *last(), ADD], ["y", "z"]),
    "normed is an output": ([*first(), *skip_norm(), *last()], ["y", "normed"]),
    "two products read normed": (
        [*first(), *skip_norm(), *last(), *product("middle", "normed", "z", SIZE, SIZE)], ["y", "z"],
    ),
    "product is read twice": ([*first(), *skip_norm(), *last(), helper.make_node("Neg", ["a"], ["z"])], ["y", "z"]),
    "product is an output": ([*first(), *skip_norm(), *last()], ["y", "a"]),
    "product is added to itself": ([*first(), *skip_norm("a", "a"), *last()], ["y"]),
    "skip is computed later": ([*first(), LATER, *skip_norm(other="later"), *last()], ["y"]),
    "skip is computed from the product": (
        [*first(), helper.make_node("Relu", ["a"], ["later"]), *skip_norm(other="later"), *last()], ["y"],
    ),
    "skip is an input": ([*first(), *skip_norm(), *last()], ["y", "sum"]),
    "there is no product before": ([*skip_norm("stream", "stream"), *last()], ["y"]),
    "norm has a bias": ([*first(), *skip_norm(more=["weight2"]), *last()], ["y", "sum"]),
    "sum, not normed, is read": ([*first(), *skip_norm(), *last("sum")], ["y", "normed"]),
    "only the sum is read": ([*first(), *skip_norm(), *last("sum")], ["y"]),
    "norm is read twice": ([*norm(), *last(), ADD], ["y", "z"]),
    "norm is an output": ([*norm(), *last()], ["y", "normed"]),
    "axis is counted from the front": ([*norm(axis=1), *last()], ["y"]),
}  # fmt: skip


@pytest.mark.parametrize("why", NOT_FUSED)
def test_nodes_that_cannot_be_fused_stay_and_compute_the_same(library, tmp_path, why):
    nodes, outputs = NOT_FUSED[why]
    used = {name for node in nodes for name in node.input}
    given = {name: value.reshape(10, -1) for name, value in FEEDS.items() if name in used}
    model, pairs = run_both(library, tmp_path, nodes, tensors(), given, outputs)
    expected = [OURS if node.op_type == "MatMulNBits" else node.op_type for node in nodes if node.op_type != "Cast"]
    assert operators(model) == expected
    for node in model.graph.node:
        if node.op_type == OURS:
            assert (len(node.input), attributes(node)["NORM"]) == (1, -1)
    assert_close(pairs)


@pytest.mark.parametrize("what", ["mean is given", "weight is an input", "float16", "short", "long", "one axis more"])
@pytest.mark.parametrize("kind", [SKIP_NORM, NORM])
def test_unsupported_norms_stay(tmp_path, what, kind):
    """onnxruntime would refuse some of these."""
    values, inputs = tensors(), ["x", "stream"]
    nodes = [*first(), *(skip_norm() if kind == SKIP_NORM else norm("a")), *last()]
    weight = values["weight"]
    if what == "weight is an input":
        del values["weight"]
        inputs.append("weight")
    elif what == "mean is given":
        nodes[2].output[:] = ["normed", "mean"]
    else:
        shapes = {"short": weight[:1], "long": np.tile(weight, 2), "one axis more": weight[None]}
        values["weight"] = shapes.get(what, weight.astype(np.float16))
    _, model = rewritten(tmp_path, nodes, values, inputs)
    assert operators(model) == [OURS, kind, OURS]
    assert [len(node.input) for node in model.graph.node] == [1, len(nodes[2].input), 1]
    assert [attributes(node)["NORM"] for node in model.graph.node if node.op_type == OURS] == [-1, -1]


@pytest.mark.parametrize("stays", ["first", "last"])
def test_nothing_is_fused_into_products_without_kernels(library, tmp_path, stays):
    nodes = [*first(), *skip_norm(), *last()]
    theirs = nodes[1 if stays == "first" else 4]
    next(attribute for attribute in theirs.attribute if attribute.name == "accuracy_level").i = 0
    model, pairs = run_both(library, tmp_path, nodes, tensors(), FEEDS, ["y", "sum"])
    kept = [operator for operator in operators(model) if operator != "Cast"]
    assert kept == (["MatMulNBits", SKIP_NORM, OURS] if stays == "first" else [OURS, SKIP_NORM, "MatMulNBits"])
    assert_close(pairs)
