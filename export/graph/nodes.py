"""GraphBuilder: the nodes of a graph in order, and the constants they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

MICROSOFT_DOMAIN: Final = "com.microsoft"
OPSET: Final = 18
IR_VERSION: Final = 10
"""Old enough for onnxruntime 1.23, the newest version on Python 3.10."""


class InitializerStore(Protocol):
    """Where a graph's tensors are stored; see `graph.initializers`."""

    tensors: dict[str, TensorProto]

    def add(self, name: str, array: NDArray[Any]) -> str:
        """Store an array under a new name and return the name."""

    def alias(self, name: str, of: str, shape: tuple[int, ...]) -> str:
        """Give the bytes of another tensor a second name and shape; return the name."""


class GraphBuilder:
    """Collects nodes of one graph. A node is named after its first output."""

    def __init__(self, constants: InitializerStore) -> None:
        self.constants = constants
        self.nodes: list[NodeProto] = []
        self._made: set[str] = set()

    def add_node(
        self, operator: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any
    ) -> str:
        """Append a node with one output and return the output's name."""
        return self.add_node_with_outputs(operator, inputs, [output], domain=domain, **attributes)[0]

    def add_node_with_outputs(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node with several outputs, "" for unused ones; return the names."""
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        self._made.update(outputs)
        return list(outputs)

    def has_output(self, name: str) -> bool:
        """Return whether a node already computes a name."""
        return name in self._made

    def int64_constant(self, name: str, values: Sequence[int]) -> str:
        """Store a constant int64 [n] unless it exists; return its name."""
        if name not in self.constants.tensors:
            self.constants.add(name, np.asarray(values, np.int64))
        return name

    def uint8_constant(self, name: str, values: Sequence[int]) -> str:
        """Store a constant uint8 [n] unless it exists; return its name."""
        if name not in self.constants.tensors:
            self.constants.add(name, np.asarray(values, np.uint8))
        return name

    def float_constant(self, name: str, value: float) -> str:
        """Store a constant float32 scalar unless it exists; return its name."""
        if name not in self.constants.tensors:
            self.constants.add(name, np.asarray(value, np.float32))
        return name

    def rms_norm(self, value: str, factors: str, output: str, epsilon: float) -> str:
        """Append an RMS norm over the last axis."""
        inputs = [value, factors]
        return self.add_node("SimplifiedLayerNormalization", inputs, output, epsilon=epsilon, axis=-1, stash_type=1)

    def build_model(self, name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> ModelProto:
        """Return the model with all constants that its nodes read."""
        read = {value for node in self.nodes for value in node.input}
        tensors = [tensor for key, tensor in self.constants.tensors.items() if key in read]
        graph = helper.make_graph(self.nodes, name, inputs, outputs, tensors)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT_DOMAIN, 1)]
        model: ModelProto = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgelm"
        )
        return model
