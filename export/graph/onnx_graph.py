"""Queries on an ONNX file: the producer of a name, constants, and the nodes that outputs depend on.

Knows the file format and a few operators that pass values through, not quantization.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from edgelm.errors import CheckpointError

PASS_THROUGH_OPERATORS: Final = {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten"}
"""Operators that do not change token ids."""


class OnnxGraph:
    """The nodes and constants of a file. Large tensors stay on disk until `array` reads them."""

    def __init__(self, file: Path) -> None:
        self._directory = file.parent
        self.model = onnx.load(file, load_external_data=False)
        self.nodes = list(self.model.graph.node)
        self.inputs = {value.name: value for value in self.model.graph.input}
        self.outputs = {value.name: value for value in self.model.graph.output}
        self._tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._producers: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output}
        self._uses = Counter(name for node in self.nodes for name in node_inputs(node))
        self._uses.update(list(self.outputs))

    def producer(self, name: str) -> NodeProto | None:
        """Return the node that computes a name."""
        return self._producers.get(name)

    def sole_consumer(self, name: str) -> NodeProto | None:
        """Return the only node that reads a name; None if there are several or the name is a graph output."""
        if self._uses[name] != 1 or name in self.outputs:
            return None
        return next((node for node in self.nodes if name in node.input), None)

    def constant(self, name: str) -> TensorProto | None:
        """Return the tensor of a constant name, otherwise None."""
        if name in self._tensors:
            return self._tensors[name]
        node = self.producer(name)
        if node is None:
            return None
        if node.op_type == "Identity":
            return self.constant(node.input[0])
        if node.op_type == "Constant":
            value = node_attributes(node).get("value")
            return value if isinstance(value, TensorProto) else None
        return None

    def matrix(self, name: str) -> TensorProto | None:
        """Return the float32 tensor with two dimensions of a constant name, otherwise None."""
        tensor = self.constant(name)
        return (
            tensor if tensor is not None and tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 else None
        )

    def array(self, tensor: TensorProto) -> NDArray[Any]:
        """Read a tensor. Raises `CheckpointError` if it holds NaN; infinity is allowed, masks use it."""
        values: NDArray[Any] = numpy_helper.to_array(tensor, str(self._directory))
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise CheckpointError(f"the tensor {tensor.name} holds NaN")
        return values

    def is_token_ids(self, name: str) -> bool:
        """Return whether a name is the graph's token ids, possibly in another shape."""
        while name != "input_ids":
            node = self.producer(name)
            if node is None or node.op_type not in PASS_THROUGH_OPERATORS:
                return False
            name = node.input[0]
        return True

    def initializers(self, names: Iterable[str]) -> Iterator[tuple[str, TensorProto]]:
        """Yield the named tensors of the graph itself, in the graph's order."""
        wanted = set(names)
        for name, tensor in self._tensors.items():
            if name in wanted:
                yield name, tensor


def node_inputs(node: NodeProto) -> Iterator[str]:
    """Yield every name that a node reads, including names read inside its branches and loops."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from node_inputs(inner)
            yield from (value.name for value in attribute.g.output)


def node_attributes(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def required_nodes(nodes: list[NodeProto], outputs: Iterable[str]) -> tuple[list[NodeProto], set[str]]:
    """Return the nodes that the outputs depend on, in their order, and every name that these nodes read."""
    names = set(outputs)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if names.intersection(node.output):
            kept.append(node)
            names.update(node_inputs(node))
    return kept[::-1], names


def value_shape(value: onnx.ValueInfoProto) -> list[int | None]:
    """Return the shape of an input or output; None for a free dimension."""
    return [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]
