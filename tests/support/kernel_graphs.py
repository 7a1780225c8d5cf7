"""Small graphs of MatMulNBits, and their rewrites for the kernels. Inputs are float32, except `ids`, int64."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from edgelm.kernels.custom_ops import CustomOpLibrary
from edgelm.kernels.rewrite.graph_rewriter import DATA, GRAPH, rewrite_graph
from edgelm.system.digest import file_sha256

BLOCK = 32


def matrix(name, size, columns):
    """Return the tensors of a 4-bit matrix with float16 scales."""
    rng = np.random.default_rng(len(name) + size)
    blocks = -(-size // BLOCK)
    codes = rng.integers(0, 256, (columns, blocks, BLOCK // 2), np.uint8)
    scales = (rng.random((columns, blocks)) * 0.02).astype(np.float16)
    return {f"{name}.codes": codes, f"{name}.scales16": scales}


def product(name, x, y, size, columns, inputs=(), *, block=BLOCK, accuracy=4):
    """Return the nodes of a product with a matrix."""
    return [
        helper.make_node("Cast", [f"{name}.scales16"], [f"{name}.scales"], to=TensorProto.FLOAT),
        helper.make_node(
            "MatMulNBits", [x, f"{name}.codes", f"{name}.scales", *inputs], [y], f"{y}.node", domain="com.microsoft",
            K=size, N=columns, bits=4, block_size=block, accuracy_level=accuracy,
        ),
    ]  # fmt: skip


def model_of(nodes, values, inputs, outputs):
    """Return an encoded model with inline tensors."""
    info = helper.make_tensor_value_info
    types = {"ids": TensorProto.INT64}
    graph = helper.make_graph(
        nodes, "g", [info(name, types.get(name, TensorProto.FLOAT), None) for name in inputs],
        [info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def rewritten(folder, nodes, values, inputs=("x",), outputs=("y",)):
    """Rewrite a graph for the kernels; return the formats, and the new model or None."""
    formats = rewrite_graph(model_of(nodes, values, inputs, outputs), folder / "absent", folder)
    return formats, onnx.load(folder / GRAPH, load_external_data=False) if formats else None


def attributes(node):
    return {attribute.name: attribute.i for attribute in node.attribute}


def stored(folder, node, name, like):
    """Return the array in the data file at a node's offset attribute, with the shape and dtype of `like`."""
    start = attributes(node)[name]
    assert start % 64 == 0
    return np.frombuffer((folder / DATA).read_bytes()[start : start + like.nbytes], like.dtype).reshape(like.shape)


def run_both(library, folder, nodes, values, feeds, outputs=("y",)):
    """Return the rewritten model and the outputs of onnxruntime's and of our kernels: [(theirs, ours), ...]."""
    formats, model = rewritten(folder, nodes, values, feeds, outputs)
    results = []
    for graph in (model_of(nodes, values, feeds, outputs), str(folder / GRAPH)):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 2, 4
        if isinstance(graph, str):
            CustomOpLibrary(library, formats, folder / DATA, file_sha256(library)).register(options)
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        results.append(session.run(list(outputs), feeds))
    return model, list(zip(*results, strict=True))


def assert_close(pairs):
    """Compare the outputs. Both quantize activations to 8 bits and may round values between two codes differently."""
    for theirs, ours in pairs:
        apart = abs(ours - theirs) / theirs.std()
        assert ours.shape == theirs.shape
        assert apart.max() < 0.02
        assert np.median(apart) < 1e-4
