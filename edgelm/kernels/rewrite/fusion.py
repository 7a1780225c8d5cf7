"""Plans which nodes around a product are fused into it: SwiGLU, RMSNorm, the addition of the residual stream.

    x -> [RMSNorm | SwiGLU] -> product -> [+ skip]

A normalization is fused if the product is its only reader, an addition if it is the only reader of the product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from edgelm.graph.onnx_model import FLOAT, Model, Node, is_ort_operator

NORM: Final = "SimplifiedLayerNormalization"
SKIP_NORM: Final = "SkipSimplifiedLayerNormalization"
EPSILON: Final = {NORM: 1e-5, SKIP_NORM: 1e-12}
"""onnxruntime's defaults of the attribute."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """What a node reads and writes after fusion. `skip` is the value that is added, `norm` the RMSNorm's weight."""

    x: str
    output: str
    skip: str | None = None
    gated: bool = False
    norm: str | None = None
    epsilon: float = 0.0

    @property
    def inputs(self) -> list[str]:
        """Inputs of the product's operator."""
        return [self.x] if self.skip is None else [self.x, self.skip]


class FusionPlan:
    """The fusions of a model. `is_ours` returns whether a node is a product that the kernels compute."""

    def __init__(self, model: Model, producers: Mapping[str, Node], is_ours: Callable[[Node], bool]) -> None:
        self._model = model
        self._producers = producers
        self._readers = Counter([name for node in model.nodes for name in node.inputs] + list(model.outputs))
        self._order = {id(node): index for index, node in enumerate(model.nodes)}
        self._products = {id(node): self._fuse_swiglu(node) for node in model.nodes if is_ours(node)}
        self._fused_norms: set[int] = set()
        for node in model.nodes:
            if id(node) in self._products:
                self._fuse_norm(node)

    def fusion_of(self, node: Node) -> Fusion | None:
        """Return the fusion of a node; None if a product computes the node."""
        if id(node) in self._fused_norms:
            return None
        return self._products.get(id(node)) or Fusion(node.inputs[0] if node.inputs else "", node.outputs[0])

    def _fuse_swiglu(self, node: Node) -> Fusion:
        """Return the fusion of a product with the SwiGLU in front of it, if there is one."""
        gated = self._match_swiglu(node.inputs[0])
        return Fusion(gated or node.inputs[0], node.outputs[0], gated=gated is not None)

    def _match_swiglu(self, name: str) -> str | None:
        """Return the input of the SwiGLU, gates and then values, that computes a value; None if another node does."""
        product = self._producers.get(name)
        if product is None or not is_ort_operator(product, "Mul"):
            return None
        gate = self._producers.get(product.inputs[0])
        if gate is None or not is_ort_operator(gate, "QuickGelu") or gate.attributes.get("alpha") != 1.0:
            return None
        split = self._producers.get(gate.inputs[0])
        if split is None or not is_ort_operator(split, "Split") or split.attributes.get("axis") != -1:
            return None
        return split.inputs[0] if split.outputs == (gate.inputs[0], product.inputs[1]) else None

    def _fuse_norm(self, node: Node) -> None:
        """Fuse the RMSNorm in front of a product into it, and the addition of that RMSNorm into an earlier product."""
        norm = self._producers.get(node.inputs[0])
        if (
            norm is None
            or not is_ort_operator(norm, NORM, SKIP_NORM)
            or self._readers[node.inputs[0]] != 1
            or norm.outputs[0] != node.inputs[0]
        ):
            return
        if (
            norm.op_type == NORM
            and norm.attributes.get("axis") == -1
            and (len(norm.inputs), len(norm.outputs)) == (2, 1)
        ):
            x, weight = norm.inputs
        elif norm.op_type == SKIP_NORM and len(norm.inputs) == 3 and not any(norm.outputs[1:3]):
            weight = norm.inputs[2]
            x = (*norm.outputs, "", "", "")[3] or f"{norm.outputs[0]}.sum"
        else:
            return
        tensor = self._model.tensors.get(weight)
        if tensor is None or tensor.dtype != FLOAT or tensor.shape != (int(node.attributes["K"]),):
            return
        if norm.op_type == SKIP_NORM and not self._fuse_addition(norm, x):
            return
        self._fused_norms.add(id(norm))
        epsilon = norm.attributes.get("epsilon", EPSILON[norm.op_type])
        self._products[id(node)] = replace(self._products[id(node)], x=x, norm=weight, epsilon=epsilon)

    def _fuse_addition(self, norm: Node, output: str) -> bool:
        """Fuse the addition of a normalization into the product whose result it adds; return whether there is one."""
        for name, other in (norm.inputs[1::-1], norm.inputs[:2]):
            product = self._producers.get(name)
            if product is None or id(product) not in self._products or self._readers[name] != 1:
                continue
            source = self._producers.get(other)  # constants and inputs may have another shape and be broadcast
            if source is not None and self._order[id(source)] < self._order[id(product)]:
                self._products[id(product)] = replace(self._products[id(product)], skip=other, output=output)
                return True
        return False
