"""Quantizes a finished ONNX graph with the same quantizer as the graphs that we build.

A MatMul or Gemm with a constant matrix becomes a MatMulNBits with the bias included. The table that token ids look up
becomes a GatherBlockQuantized, on the same bytes as a tied head. If only elementwise nodes follow the head, it computes
only the positions in the new input `rows` (int64 [R], indices into the flattened positions), and `logits` becomes [R,
vocab]. Position tables, norms and all other nodes stay unchanged.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from edgelm.bundle.manifest import Matrix
from edgelm.errors import CheckpointError

from ..checkpoint.matrix_reader import LazyMatrix
from ..graph.initializers import FileInitializers
from ..graph.matrices import add_lookup, add_matmul, store_packed
from ..graph.nodes import MICROSOFT_DOMAIN, GraphBuilder
from ..graph.onnx_graph import OnnxGraph, node_attributes, required_nodes
from ..progress_callback import ProgressCallback, ignore_progress
from ..quantize.matrix_plan import QuantPlan
from ..write.matrix_store import quantize_matrix

ELEMENTWISE: Final = {"Add", "Mul", "Div", "Sub", "Tanh", "Cast", "Identity"}
"""Operators between head and logits whose result at a position depends on that position alone."""

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Linear:
    """value @ weight.T + bias -> output. weight: float32 [N, K]; bias: float32 [N] or None."""

    name: str
    value: str
    weight: Array
    bias: Array | None
    output: str


class OnnxQuantizer:
    """Rewrites one graph. Call `build` once."""

    def __init__(
        self,
        graph: OnnxGraph,
        plan: QuantPlan,
        initializers: FileInitializers,
        progress: ProgressCallback | None = None,
    ) -> None:
        self._progress = progress or ignore_progress
        self._graph = graph
        self._plan = plan
        self._initializers = initializers
        self._nodes = GraphBuilder(initializers)
        self._stored: dict[bytes, Matrix] = {}
        self._tables: dict[bytes, str] = {}
        self._absorbed: set[str] = set()
        self._names: set[str] = set()
        self.matrices: list[Matrix] = []

    def build(self) -> ModelProto:
        """Return the rewritten model; its large tensors are in the initializers' data file.

        Raises `CheckpointError` for a matrix with NaN or infinity, and for a graph without any matrix.
        """
        head = self._find_head()
        for i, node in enumerate(self._graph.nodes):
            self._progress("node", i, len(self._graph.nodes))
            if not self._absorbed.isdisjoint(node.output):
                continue
            if self._is_table(node):
                self._look_up(node)
            elif (linear := self._linear(node)) is not None:
                self._multiply(node, linear, is_head=node is head)
            else:
                self._nodes.nodes.append(node)
        if not self.matrices:
            raise CheckpointError("the exported graph has no matrix that could be quantized")
        return self._model(chosen=head is not None)

    # --- finding matrices ---

    def _find_head(self) -> NodeProto | None:
        """Return the product that gives the logits, if only elementwise nodes with small constants follow it."""
        name = "logits"
        while (node := self._graph.producer(name)) is not None:
            if name != "logits" and self._graph.sole_consumer(name) is None:
                return None
            if node.op_type == "MatMul" and self._graph.matrix(node.input[1]) is not None:
                return node
            varying = [each for each in node.input if self._graph.constant(each) is None]
            constants = [self._graph.constant(each) for each in node.input]
            if node.op_type not in ELEMENTWISE or len(varying) != 1:
                return None
            if any(tensor is not None and len(tensor.dims) > 1 for tensor in constants):
                return None
            name = varying[0]
        return None

    def _is_table(self, node: NodeProto) -> bool:
        return (
            node.op_type == "Gather"
            and node_attributes(node).get("axis", 0) == 0
            and self._graph.matrix(node.input[0]) is not None
            and self._graph.is_token_ids(node.input[1])
        )

    def _linear(self, node: NodeProto) -> _Linear | None:
        """Return a node as a product with a constant matrix; None if it is not one."""
        if node.op_type not in ("MatMul", "Gemm"):
            return None
        tensor = self._graph.matrix(node.input[1])
        given = node_attributes(node)
        if tensor is None or self._graph.constant(node.input[0]) is not None or given.get("transA", 0):
            return None
        weight = self._read(tensor) * np.float32(given.get("alpha", 1.0))
        if not given.get("transB", 0):
            weight = weight.T
        bias, output = None, node.output[0]
        if len(node.input) > 2 and node.input[2]:
            bias = self._bias(node.input[2], weight.shape[0])
            if bias is None:
                return None
            bias = bias * np.float32(given.get("beta", 1.0))
        elif node.op_type == "MatMul" and self._plan.default is not None:
            following = self._graph.sole_consumer(output)
            if following is not None and following.op_type == "Add":
                other = following.input[1] if following.input[0] == output else following.input[0]
                bias = self._bias(other, weight.shape[0])
                output = output if bias is None else following.output[0]
        return _Linear(self._name(node), node.input[0], np.ascontiguousarray(weight), bias, output)

    def _bias(self, name: str, rows: int) -> Array | None:
        tensor = self._graph.constant(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT or list(tensor.dims) != [rows]:
            return None
        bias: Array = self._graph.array(tensor)
        return bias

    def _read(self, tensor: TensorProto) -> Array:
        values: Array = self._graph.array(tensor)
        if not np.isfinite(values).all():
            raise CheckpointError(f"the tensor {tensor.name} holds NaN or infinite values")
        return values

    def _name(self, node: NodeProto) -> str:
        """Return a matrix name for a node: `/transformer/h.0/attn/c_attn/Gemm` -> `transformer.h.0.attn.c_attn`."""
        parts = [part for part in node.name.split("/") if part]
        name = ".".join(parts[:-1])
        if not name or name in self._names:
            name = node.output[0]
        self._names.add(name)
        return name

    # --- adding nodes ---

    def _look_up(self, node: NodeProto) -> None:
        """Look up the rows of token ids in a table."""
        tensor = self._graph.matrix(node.input[0])
        if tensor is None:
            raise AssertionError("a table is a matrix")
        table, name = self._read(tensor), self._name(node)
        stored = self._store(name, table)
        if stored.bits == 32:
            self._tables[_digest(table)] = node.input[0]
            self._nodes.nodes.append(node)
        else:
            add_lookup(self._nodes, stored, node.input[1], node.output[0])

    def _multiply(self, node: NodeProto, linear: _Linear, *, is_head: bool) -> None:
        value = self._select_rows(linear.value, linear.weight.shape[1]) if is_head else linear.value
        table = self._tables.get(_digest(linear.weight)) if is_head else None
        if table is not None:  # a tied head in float32: the same tensor, transposed
            self._nodes.add_node("Gemm", [value, table], node.output[0], transB=1)
            return
        stored = self._store(linear.name, linear.weight)
        if stored.bits == 32:
            copied = NodeProto()
            copied.CopyFrom(node)
            copied.input[0] = value
            self._nodes.nodes.append(copied)
            return
        bias = None if linear.bias is None else self._initializers.add(f"{linear.name}.bias.row", linear.bias)
        if linear.output != node.output[0]:
            self._absorbed.add(linear.output)
        add_matmul(self._nodes, stored, value, bias, linear.output)

    def _select_rows(self, value: str, width: int) -> str:
        """Select rows: [B, S, width] -> [R, width]."""
        flat = self._nodes.add_node(
            "Reshape", [value, self._nodes.int64_constant("head.shape", [-1, width])], "head.flat"
        )
        return self._nodes.add_node("Gather", [flat, "rows"], "head.chosen", axis=0)

    def _store(self, name: str, weight: Array) -> Matrix:
        """Store a quantized matrix, identical ones once. A float32 matrix stays where the graph has it."""
        spec = self._plan.spec(name)
        if spec is None:
            self.matrices.append(Matrix(name, weight.shape[0], weight.shape[1], 32))
            return self.matrices[-1]
        key = _digest(weight)
        if key not in self._stored:
            packed = quantize_matrix(LazyMatrix.from_array(weight), spec)
            self._stored[key] = store_packed(self._initializers, name, packed, spec)
            self.matrices.append(self._stored[key])
        return self._stored[key]

    def _model(self, *, chosen: bool) -> ModelProto:
        old = self._graph.model
        outputs = list(self._graph.outputs.values())
        inputs = list(self._graph.inputs.values())
        if chosen:
            vocab = outputs[0].type.tensor_type.shape.dim[-1].dim_value
            inputs.append(helper.make_tensor_value_info("rows", TensorProto.INT64, ["rows"]))
            outputs[0] = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", vocab])
        nodes, names = required_nodes(self._nodes.nodes, self._graph.outputs)
        for name, tensor in self._graph.initializers(names):
            self._initializers.add(name, self._graph.array(tensor))
        for node in nodes:
            node.ClearField("doc_string")
            node.ClearField("metadata_props")
        tensors = [tensor for name, tensor in self._initializers.tensors.items() if name in names]
        model: ModelProto = helper.make_model(
            helper.make_graph(nodes, "decoder", inputs, outputs, tensors),
            opset_imports=[
                *(entry for entry in old.opset_import if entry.domain != MICROSOFT_DOMAIN),
                helper.make_opsetid(MICROSOFT_DOMAIN, 1),
            ],
            ir_version=old.ir_version,
            producer_name="edgelm",
        )
        return model


def _digest(weight: Array) -> bytes:
    return hashlib.sha256(repr(weight.shape).encode() + np.ascontiguousarray(weight).tobytes()).digest()
